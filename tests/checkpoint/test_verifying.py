import errno
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whalejax.checkpoint import CheckpointStore, DamagedError
from whalejax.checkpoint.faults import Flip
from whalejax.checkpoint.manifest import CLOSING, OPENING_BYTES, seal, unseal
from whalejax.checkpoint.verifying import BROKEN
from whalejax.kernels.quantization import quantize
from whalejax.storage import digest

DTYPES = ("float32", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int4", "uint4", "int8", "uint16",
          "int64", "bool", "float64", "complex64")  # fmt: skip
EXTENT_BYTES = 8192
CRC32C = [32 - k for k in range(33) if 0x11EDC6F41 >> k & 1]  # set bits, the highest power first
# where in the manifest's opening what stands
CRC_FIELD, XXH_FIELD = (12, 20), (32, 48)

search = settings(max_examples=20, deadline=None, derandomize=True)


def tree():
    rng = np.random.default_rng(0)
    plain = {
        name: rng.integers(0, 2, (5, 7)).astype(getattr(ml_dtypes, name, name)) for name in DTYPES
    }
    return {
        "plain": plain,
        "large": rng.standard_normal((70, 100), np.float32),  # 4 extents, the last filled up
        "scalar": np.float32(3),
        "empty": np.zeros((0, 3), np.float32),
        "key": jax.random.key(1),
        "quantized": quantize(jnp.ones((4, 256), jnp.bfloat16), tile=(1, 128)),
        "count": 7,
        "name": "blåhval",
    }


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder with a checkpoint that stays as it is."""
    folder = tmp_path_factory.mktemp("written")
    CheckpointStore(folder, extent_bytes=EXTENT_BYTES).save(
        3, tree(), metadata={"losses": [1 / (k + 1) for k in range(300)]}, block=True
    )
    return folder


@pytest.fixture
def store(written, tmp_path):
    shutil.copytree(written, tmp_path / "run")
    return CheckpointStore(tmp_path / "run")


@pytest.fixture(scope="module")
def module_store(written, tmp_path_factory):
    """For tests that put back what they break."""
    folder = tmp_path_factory.mktemp("module") / "run"
    shutil.copytree(written, folder)
    return CheckpointStore(folder)


def path_of(store, file):
    return store.place.root / "3" / file


def flipped(data, *bits):
    changed = bytearray(data)
    for bit in bits:
        changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def files_of(store):
    return sorted(name.removeprefix("3/") for name in store.place.names("3"))


def bytes_of(store):
    return {file: path_of(store, file).read_bytes() for file in files_of(store)}


def same(a, b):
    data = [
        np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x)
        for x in (a, b)
    ]
    return data[0].dtype == data[1].dtype and data[0].tobytes() == data[1].tobytes()


def assert_restores(store, step=3):
    restored, expected = jax.tree.leaves(store.restore(step)), jax.tree.leaves(tree())
    assert len(restored) == len(expected)
    for one, other in zip(restored, expected, strict=True):
        assert one == other if isinstance(one, int | str) else same(one, other)


def assert_mended(store, file, bit):
    """Flips a bit of a file: it is detected, named, never restored, mended; and puts all back."""
    before = path_of(store, file).read_bytes()
    path_of(store, file).write_bytes(flipped(before, bit))
    for repair in (False, True):
        report = store.verify(3, repair=repair)
        (fault,) = report.faults
        assert (fault.file, fault.flip.byte, fault.flip.bit) == (file, bit // 8, bit % 8)
        assert fault.flip.confirmed and f"bit {bit % 8} of byte {bit // 8}" in str(fault)
        assert report.mended == ((fault,) if repair else ())
        assert report.damaged == (() if repair else (fault,))
        if not repair:
            assert path_of(store, file).read_bytes() == flipped(before, bit)
            assert_is_not_restored(store, file)
    assert path_of(store, file).read_bytes() == before
    broken = path_of(store, file + BROKEN)
    assert broken.read_bytes() == flipped(before, bit)
    broken.unlink()
    assert store.verify(3).faults == ()


def assert_is_not_restored(store, file):
    if file.endswith("zarr.json"):  # is for other programs
        assert_restores(store)
        return
    with pytest.raises(DamagedError) as error:
        store.restore(3)
    assert all(file in str(fault) for fault in error.value.faults)


def last(data, count):
    return len(data) - count, len(data)


# Every kind of byte that a checkpoint consists of: its file, and from which byte to which.
KINDS = {
    "an extent's data": ("arrays/large/c/0/0", lambda d: (0, len(d))),
    "an extent's last element": ("arrays/large/c/2/0", lambda d: last(d, 4)),
    "what fills an extent up": ("arrays/large/c/3/0", lambda d: last(d, 800)),
    "a scalar": ("arrays/scalar/c", lambda d: (0, len(d))),
    "a PRNG key": ("arrays/key/c/0", lambda d: (0, len(d))),
    "quantised values": ("arrays/quantized/values/c/0/0", lambda d: (0, len(d))),
    "quantised scales": ("arrays/quantized/scales/c/0/0", lambda d: (0, len(d))),
    "an array's metadata": ("arrays/large/zarr.json", lambda d: (0, len(d))),
    "an empty array's metadata": ("arrays/empty/zarr.json", lambda d: (0, len(d))),
    "the manifest's opening": ("manifest.json", lambda d: (0, OPENING_BYTES)),
    "the manifest's CRC32C": ("manifest.json", lambda d: CRC_FIELD),
    "the manifest's XXH3": ("manifest.json", lambda d: XXH_FIELD),
    "the manifest's content": ("manifest.json", lambda d: (OPENING_BYTES, len(d) - len(CLOSING))),
    "the manifest's closing": ("manifest.json", lambda d: last(d, len(CLOSING))),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_bit_of_every_kind_is_named_never_restored_and_mended(module_store, kind):
    file, where = KINDS[kind]
    start, stop = where(path_of(module_store, file).read_bytes())

    @search
    @given(bit=st.integers(8 * start, 8 * stop - 1))
    def flip(bit):
        assert_mended(module_store, file, bit)

    flip()
    assert_restores(module_store)


def test_the_kinds_are_all_files(module_store):
    """What KINDS does not name lies in files like those that it does."""
    kinds = {file.split("/")[-1] for file, _ in KINDS.values()}
    for file in files_of(module_store):
        assert file.split("/")[-1] in kinds


@search
@given(data=st.data())
def test_any_flipped_bit_of_any_file_is_mended(module_store, data):
    file = data.draw(st.sampled_from(files_of(module_store)))
    size = path_of(module_store, file).stat().st_size
    assert_mended(module_store, file, data.draw(st.integers(0, 8 * size - 1)))


@pytest.mark.parametrize("part", ["opening", "content", "closing"])
def test_a_flipped_bit_of_what_processes_tell_each_other_is_detected(part):
    data = seal([["w", [0, 1], 1234, 2**63]])
    start, stop = {
        "opening": (0, OPENING_BYTES),
        "content": (OPENING_BYTES, len(data) - len(CLOSING)),
        "closing": last(data, len(CLOSING)),
    }[part]
    assert unseal(data, "parts/1.json") == [["w", [0, 1], 1234, 2**63]]
    for bit in range(8 * start, 8 * stop):
        with pytest.raises(DamagedError, match="parts/1.json"):
            unseal(flipped(data, bit), "parts/1.json")


@pytest.mark.parametrize("dtype", [*DTYPES, "large", "scalar"])
def test_the_element_of_a_bit_is_named(module_store, dtype):
    name = f"plain/{dtype}" if dtype in DTYPES else dtype
    files = [f for f in files_of(module_store) if f.startswith(f"arrays/{name}/c")]
    array = np.asarray({**tree(), **tree()["plain"]}[dtype])

    @search
    @given(data=st.data())
    def flip(data):
        file = data.draw(st.sampled_from(files))
        before = path_of(module_store, file).read_bytes()
        bit = data.draw(st.integers(0, 8 * len(before) - 1))
        path_of(module_store, file).write_bytes(flipped(before, bit))
        (fault,) = module_store.verify(3).faults
        like = {"plain": {dtype: array.copy()}} if dtype in DTYPES else {dtype: array.copy()}
        (read,) = jax.tree.leaves(module_store.restore(3, like, verify=False))
        path_of(module_store, file).write_bytes(before)
        assert fault.array == name
        size = array.dtype.itemsize
        differs = read.reshape(-1).view(np.uint8) != array.reshape(-1).view(np.uint8)
        places = np.unique(np.flatnonzero(differs) // size)
        if not len(places):  # in what fills the extent up
            assert fault.flip.element is None
            return
        element = tuple(int(i) for i in np.unravel_index(places[0], array.shape))
        assert fault.flip.element == element and len(places) == 1
        assert fault.flip.written.tobytes() == array[element].tobytes()
        assert fault.flip.read.tobytes() == read[element].tobytes()
        assert f"is {fault.flip.read} instead of {fault.flip.written}" in str(fault)

    flip()


def test_a_bit_of_what_fills_an_extent_up_is_in_no_element(store):
    file = "arrays/large/c/3/0"
    before = path_of(store, file).read_bytes()
    path_of(store, file).write_bytes(flipped(before, 8 * len(before) - 1))
    (fault,) = store.verify(3).faults
    assert fault.flip == Flip(len(before) - 1, 7, confirmed=True)
    assert str(fault).endswith(f"bit 7 of byte {len(before) - 1} is flipped (confirmed)")


def pattern(start, extra=()):
    """Bits, from one on, that change no CRC32C: its polynomial; and others."""
    return [start + k for k in CRC32C] + list(extra)


WORSE = {
    "two bits": lambda d: flipped(d, 1000, 9000),
    "a burst": lambda d: flipped(d, *range(3000, 3064)),
    "zeros over a page": lambda d: d[:2000] + bytes(4096) + d[6096:],
    "all zeros": lambda d: bytes(len(d)),
    "truncated": lambda d: d[:-1],
    "truncated to a page": lambda d: d[:4096],
    "empty": lambda d: b"",
    "longer": lambda d: d + b"\0",
    "a byte moved": lambda d: d[1:] + d[:1],
    "like one bit to CRC32C": lambda d: flipped(d, *pattern(4000, [20000])),
    "nothing to CRC32C": lambda d: flipped(d, *pattern(4000)),
}


@pytest.mark.parametrize("file", ["arrays/large/c/1/0", "manifest.json"])
@pytest.mark.parametrize("worse", WORSE)
def test_worse_damage_is_reported_and_left_alone(store, file, worse):
    damaged = WORSE[worse](path_of(store, file).read_bytes())
    path_of(store, file).write_bytes(damaged)
    before = bytes_of(store)
    for repair in (False, True):
        report = store.verify(3, repair=repair)
        (fault,) = report.faults
        assert fault.file == file and report.damaged == (fault,) and report.mended == ()
        assert fault.flip is None or not fault.flip.confirmed
        assert bytes_of(store) == before


@pytest.mark.parametrize("where", ["opening", "closing", "content and closing"])
def test_two_bits_of_a_manifest_are_left_alone(store, where):
    before = path_of(store, "manifest.json").read_bytes()
    end = 8 * len(before) - 8
    bits = {"opening": (8, 9), "closing": (end, end + 3), "content and closing": (900, end)}[where]
    path_of(store, "manifest.json").write_bytes(flipped(before, *bits))
    report = store.verify(3, repair=True)
    (fault,) = report.damaged
    assert fault.flip is None and report.mended == () and report.nbytes == 0
    assert path_of(store, "manifest.json").read_bytes() == flipped(before, *bits)


def test_what_looks_like_one_bit_is_told_from_it(store):
    file = "arrays/large/c/1/0"
    before = path_of(store, file).read_bytes()
    damaged = flipped(before, *pattern(4000, [20000]))
    assert digest(damaged).crc32c == digest(flipped(before, 20000)).crc32c
    path_of(store, file).write_bytes(damaged)
    (fault,) = store.verify(3, repair=True).faults
    assert fault.flip == Flip(20000 // 8, 20000 % 8, confirmed=False)
    assert "looks like bit 0 of byte 2500, but XXH3 says that it is something worse" in str(fault)


def test_what_crc32c_cannot_see_xxh3_does(store):
    file = "arrays/large/c/1/0"
    before = path_of(store, file).read_bytes()
    path_of(store, file).write_bytes(flipped(before, *pattern(4000)))
    (fault,) = store.verify(3).faults
    assert "XXH3" in fault.what and "although CRC32C is right" in fault.what


def test_missing_files_are_reported(store):
    path_of(store, "arrays/large/c/1/0").unlink()
    report = store.verify(3, repair=True)
    (fault,) = report.damaged
    assert (fault.array, fault.extent, fault.what) == ("large", (1, 0), "is missing")
    assert not path_of(store, "arrays/large/c/1/0").exists()
    path_of(store, "manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match="no checkpoint of step 3; its steps: none"):
        store.verify(3)


@pytest.mark.parametrize("damage", [None, b"", b"{}"], ids=["missing", "empty", "other"])
def test_metadata_of_an_array_is_written_anew(store, damage):
    path = path_of(store, "arrays/large/zarr.json")
    before = path.read_bytes()
    path.unlink()
    if damage is not None:
        path.write_bytes(damage)
    assert len(store.verify(3).damaged) == 1
    report = store.verify(3, repair=True)
    assert report.mended == report.faults and len(report.faults) == 1
    assert path.read_bytes() == before
    broken = path.with_name(path.name + BROKEN)
    assert (broken.read_bytes() if broken.exists() else None) == damage


def test_all_faults_are_found_at_once(store):
    files = ["manifest.json", "arrays/large/zarr.json", "arrays/large/c/0/0", "arrays/scalar/c"]
    before = bytes_of(store)
    for file in files:
        path_of(store, file).write_bytes(flipped(before[file], 9))
    path_of(store, "arrays/key/c/0").write_bytes(b"")
    report = store.verify(3, repair=True)
    assert {fault.file for fault in report.mended} == set(files)
    assert [fault.file for fault in report.damaged] == ["arrays/key/c/0"]
    path_of(store, "arrays/key/c/0").write_bytes(before["arrays/key/c/0"])
    after = bytes_of(store)
    assert {file: after.pop(file + BROKEN) for file in files} == {
        file: flipped(before[file], 9) for file in files
    }
    assert after == before


def test_the_broken_copy_stands_before_the_mended_file(store, monkeypatch):
    file = "arrays/large/c/0/0"
    broken = flipped(path_of(store, file).read_bytes(), 77)
    path_of(store, file).write_bytes(broken)
    put = store.place.put

    def full(name, data, **options):
        if not name.endswith(BROKEN):
            raise OSError(errno.ENOSPC, "no space left")
        put(name, data, **options)

    monkeypatch.setattr(store.place, "put", full)
    with pytest.raises(OSError, match="no space left"):
        store.verify(3, repair=True)
    assert path_of(store, file).read_bytes() == path_of(store, file + BROKEN).read_bytes() == broken


def test_what_a_disk_cannot_read_is_a_fault_and_a_failing_place_an_error(store, monkeypatch):
    read, error = store.place.read, OSError(errno.EIO, "Input/output error")

    def failing(name, buffer, running=None):
        if name.endswith("large/c/1/0"):
            raise error
        read(name, buffer, running)

    monkeypatch.setattr(store.place, "read", failing)
    report = store.verify(3, repair=True)
    assert [fault.what for fault in report.damaged] == ["cannot be read: Input/output error"]
    error = PermissionError(errno.EACCES, "Permission denied")
    with pytest.raises(PermissionError):
        store.verify(3)


def test_objects_are_mended_too():
    store = CheckpointStore("memory://verifying", extent_bytes=EXTENT_BYTES)
    store.save(3, tree(), block=True)
    place, files = store.place, store.place.names("3")
    for file in ("arrays/large/c/1/0", "arrays/key/zarr.json", "manifest.json"):
        before = place.get(f"3/{file}")
        place.put(f"3/{file}", flipped(before, 1003))
        (fault,) = store.verify(3).damaged
        assert (fault.file, fault.flip.byte, fault.flip.bit) == (file, 125, 3)
        assert store.verify(3, repair=True).mended == (fault,)
        assert place.get(f"3/{file}") == before
        assert place.get(f"3/{file}{BROKEN}") == flipped(before, 1003)
        place.remove(f"3/{file}{BROKEN}")
    assert store.verify(3).faults == () and place.names("3") == files
    place.put("3/arrays/large/c/1/0", b"short")
    place.remove("3/arrays/key/c/0")
    assert {f.file for f in store.verify(3).damaged} == {"arrays/large/c/1/0", "arrays/key/c/0"}


@pytest.mark.parametrize("repair", [False, True])
def test_a_checkpoint_that_is_deleted_meanwhile_is_not_damaged(store, monkeypatch, repair):
    get = store.place.get

    def late(name):
        data = get(name)
        if name.endswith("manifest.json"):
            shutil.rmtree(path_of(store, ""))
        return data

    monkeypatch.setattr(store.place, "get", late)
    with pytest.raises(FileNotFoundError, match="run/3 was deleted while it was verified"):
        store.verify(3, repair=repair)
    assert not path_of(store, "").exists()


def test_progress_tells_of_every_byte(store):
    calls = []
    report = store.verify(3, progressed=calls.append)
    assert sum(calls) == report.nbytes == store.manifest(3).nbytes > 28000


def test_a_manifest_of_a_later_version_is_an_error(store):
    content = unseal(path_of(store, "manifest.json").read_bytes(), "")
    path_of(store, "manifest.json").write_bytes(seal(content | {"version": 2}))
    with pytest.raises(ValueError, match="version 2, not whalejax.checkpoint 1"):
        store.verify(3)
