"""One contract, of folders and of objects: what `Place` promises, every place keeps."""

import uuid
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from whalejax import storage
from whalejax.storage import Running, digest
from whalejax.storage.checksums import PIECE

ODD_NAMES = [
    "opt['mu'][0]/w=1",
    "with space/at the end ",
    "ünï/层/🐋",
    "100%/50%41/a+b&c",
    "what?/#1;x:y",
    '~!@$^*(){}|\\"<>`,',
    ".hidden/..dots../x",
    "x" * 200,
]


@pytest.fixture(params=["disk", "memory", "s3", "gcs"])
def place(request, tmp_path):
    urls = {
        "disk": lambda: tmp_path / "not yet there",
        "memory": lambda: f"memory://{uuid.uuid4().hex}",
        "s3": lambda: request.getfixturevalue("s3_url"),
        "gcs": lambda: request.getfixturevalue("gcs_url"),
    }
    place = storage.open(urls[request.param]())
    assert place.kind == request.param
    return place


def random_bytes(count, seed=0):
    return np.random.default_rng(seed).bytes(count)


def read(place, name, count, running=None):
    buffer = bytearray(count)
    place.read(name, memoryview(buffer), running)
    return bytes(buffer)


def in_threads(function, items, threads=16):
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(function, items))


# 33 MiB are more than one piece, one request's buffer or one extent
@pytest.mark.parametrize("sizes", [(), (0,), (1,), (5, 0, 700_001), (33 * 2**20,)], ids=str)
def test_reads_what_was_written(place, sizes):
    parts = [random_bytes(size, seed) for seed, size in enumerate(sizes)]
    written, got = Running(), Running()
    place.write("deep/down/file", [memoryview(part) for part in parts], written)
    assert read(place, "deep/down/file", sum(sizes), got) == b"".join(parts)
    assert written.digest() == got.digest() == digest(b"".join(parts))
    assert place.size("deep/down/file") == sum(sizes)


def test_a_write_replaces(place):
    place.write("file", [memoryview(bytes(1000))])
    place.write("file", [memoryview(b"new")])
    assert place.get("file") == read(place, "file", 3) == b"new"


@pytest.mark.parametrize("count", [9, 11])
def test_a_file_of_another_length_is_not_read(place, count):
    place.write("file", [memoryview(bytes(10))])
    with pytest.raises(ValueError, match=rf"file has 10 bytes instead of {count}"):
        read(place, "file", count)


def test_what_is_missing_is_named(place):
    place.put("there", b"")
    for name in ("missing", "missing/deep"):
        assert place.size(name) is None
        with pytest.raises(FileNotFoundError, match=name):
            place.get(name)
        with pytest.raises(FileNotFoundError, match=name):
            read(place, name, 3)
        place.remove(name)
        place.remove_tree(name)
    assert place.names("missing") == place.folders("missing") == []


@pytest.mark.parametrize("count", [0, 1, PIECE, PIECE + 1, 3 * PIECE])
def test_holds_what_has_the_same_digest(place, count):
    data = random_bytes(count)
    assert not place.holds("step/file", count, digest(data))
    place.write("step/file", [memoryview(data)])
    assert place.holds("step/file", count, digest(data))
    assert not place.holds("step/file", count + 1, digest(data))
    assert not place.holds("step/file", count, digest(data + b"0"))
    assert not place.holds("step/file", count, digest(data)._replace(xxh3=0))
    assert not place.holds("step/file", count, digest(data)._replace(crc32c=1))


def test_puts_replace_unless_exclusive(place):
    place.put("step/manifest", b"1", exclusive=True)
    with pytest.raises(FileExistsError, match="step/manifest"):
        place.put("step/manifest", b"2", exclusive=True)
    assert place.get("step/manifest") == b"1"
    place.put("step/manifest", b"three")
    assert place.get("step/manifest") == b"three"
    assert place.names("") == ["step/manifest"]


def test_one_of_many_exclusive_puts_wins(place):
    def won(name, data):
        try:
            place.put(name, data, exclusive=True)
        except FileExistsError:
            return False
        return True

    for turn in range(10):
        outcomes = in_threads(lambda i, turn=turn: won(f"turn{turn}", b"%d" % i), range(8), 8)
        assert sum(outcomes) == 1
        assert place.get(f"turn{turn}") == b"%d" % outcomes.index(True)
    assert place.names("") == [f"turn{turn}" for turn in range(10)]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_any_name_serves(place, name):
    place.write(f"tree/{name}", [memoryview(b"1")])
    place.put(f"put/{name}", b"2", exclusive=True)
    assert place.names("tree") == [f"tree/{name}"]
    assert place.names("") == [f"put/{name}", f"tree/{name}"]
    assert place.folders("tree") == ([name.partition("/")[0]] if "/" in name else [])
    assert read(place, f"tree/{name}", 1) + place.get(f"put/{name}") == b"12"
    place.remove(f"put/{name}")
    place.remove_tree("tree")
    assert place.names("") == []


def test_listing_is_sorted_and_keeps_to_its_folder(place):
    for name in ("10/b", "1/z", "1/a/deep", "1.tmp/x", "1-/x", "top", "2/z"):
        place.put(name, b"")
    assert place.names("1") == ["1/a/deep", "1/z"]
    assert place.folders("") == ["1", "1-", "1.tmp", "10", "2"]
    assert place.folders("1") == ["a"]
    place.remove_tree("1")
    assert place.names("") == ["1-/x", "1.tmp/x", "10/b", "2/z", "top"]
    place.remove("top")
    place.remove_tree("")
    assert place.names("") == place.folders("") == []


def test_many_files(place):
    """S3 lists a thousand at a time."""
    names = [f"step/{i:04}" for i in range(1100)]
    in_threads(lambda name: place.put(name, b"x"), names)
    place.put("other", b"")
    assert place.names("step") == names
    place.remove_tree("step")
    assert place.names("") == ["other"]


def test_many_threads_at_once(place):
    data = [random_bytes(100_000 + i, seed=i) for i in range(64)]

    def write_and_read(i):
        place.write(f"folder{i % 4}/{i}", [memoryview(data[i])])
        return read(place, f"folder{i % 4}/{i}", len(data[i])) == data[i]

    assert all(in_threads(write_and_read, range(64), place.workers))


def test_renames_a_folder_or_says_that_it_cannot(place):
    place.put("step.tmp/file", b"1")
    if not place.renames:
        with pytest.raises(NotImplementedError, match="cannot rename 'step.tmp' to 'step'"):
            place.rename("step.tmp", "step")
        return
    place.rename("step.tmp", "step")
    assert place.names("") == ["step/file"]
    place.put("again/file", b"2")
    with pytest.raises(FileExistsError, match="step"):
        place.rename("again", "step")
    assert place.get("step/file") == b"1"


def test_syncs(place):
    place.write("a/b/c", [memoryview(b"1")])
    place.sync("a")
    assert place.names("a") == ["a/b/c"]
