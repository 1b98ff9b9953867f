import json

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from whalejax.cli import run
from whalejax.storage.safetensors_files import INDEX, find_tensors, read_header, write_file
from whalejax.weights import check_pretrained, from_pretrained, load, save_pretrained


@pytest.fixture(scope="module")
def folder(v3_model, tmp_path_factory):
    path = tmp_path_factory.mktemp("faults") / "model"
    save_pretrained(v3_model, path)
    return path


@pytest.fixture
def copy(folder, tmp_path):
    target = tmp_path / "copy"
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def rewrite(folder, change):
    """Writes the tensors again after `change` of the dict of arrays."""
    arrays = {n: t.read() for n, t in find_tensors(folder).items()}
    change(arrays)
    write_file(folder / "model.safetensors", {n: (a.dtype, a.shape) for n, a in arrays.items()},
               iter(arrays.values()))  # fmt: skip


def test_one_error_lists_missing_extra_and_misshapen(copy, monkeypatch):
    def change(arrays):
        del arrays["model.norm.weight"]
        del arrays["model.layers.1.mlp.experts.2.up_proj.weight"]
        arrays["model.layers.9.surprise"] = np.zeros(3, np.float32)
        arrays["lm_head.weight"] = np.zeros((48, 135), np.float32)

    rewrite(copy, change)
    placed = []
    monkeypatch.setattr(load, "stack", lambda *args: placed.append(args))
    with pytest.raises(ValueError, match="does not hold the model") as error:
        from_pretrained(copy)
    assert not placed
    text = str(error.value)
    assert "2 missing" in text and "model.norm.weight" in text and "experts.2.up_proj" in text
    assert "1 extra: model.layers.9.surprise" in text
    assert "1 misshapen: lm_head.weight [48, 135] instead of [48, 136]" in text


def test_a_long_list_is_cut(copy):
    rewrite(copy, lambda arrays: [arrays.pop(n) for n in list(arrays) if "experts" in n])
    with pytest.raises(ValueError, match=r"45 missing: .* …") as error:
        from_pretrained(copy)
    assert len(str(error.value)) < 2500


def test_inverse_frequencies_of_old_exports_are_ignored(copy):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(copy, lambda arrays: arrays.update({name: np.zeros(2, np.float32)}))
    from_pretrained(copy)


@pytest.mark.parametrize("at", [0, 4, 9, 60, 2000, -1])
def test_a_file_cut_off_is_named(copy, at):
    file = copy / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:at])
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        from_pretrained(copy)


def entries(file):
    return {n: (t.dtype, t.shape, t.offset) for n, t in read_header(file).items()}


MANY = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    # each example writes the whole file again
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@MANY
@given(data=st.data())
def test_a_damaged_header_is_refused_or_harmless(folder, copy, data):
    """Bytes of the header changed, the file cut or lengthened: our error, or the same tensors."""
    file = copy / "model.safetensors"
    content = bytearray((folder / "model.safetensors").read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    changes = st.dictionaries(st.integers(0, header - 1), st.integers(0, 255), max_size=3)
    for at, byte in data.draw(changes).items():
        content[at] = byte
    whole = len(content)
    size = data.draw(st.one_of(st.just(whole), st.integers(0, whole + 9)))
    file.write_bytes(content[:size].ljust(size, b"\0"))
    refusal = None
    try:
        check_pretrained(copy)
    except ValueError as error:
        refusal = str(error)
    if refusal is None:
        assert entries(file) == entries(folder / "model.safetensors")
    else:
        assert str(copy) in refusal


@MANY
@given(data=st.data())
@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_damaged_json_is_a_clear_error_or_read(folder, copy, data, name):
    index = {"weight_map": dict.fromkeys(entries(folder / "model.safetensors"), MODEL)}
    original = (folder / name).read_bytes() if name != INDEX else json.dumps(index).encode()
    content = bytearray(original)
    at = st.integers(0, min(len(content), 400) - 1)
    for position, byte in data.draw(st.dictionaries(at, st.integers(0, 255), max_size=3)).items():
        content[position] = byte
    (copy / name).write_bytes(content[: data.draw(st.integers(0, len(content)))])
    refusal = str(copy)
    try:
        check_pretrained(copy)
    except (ValueError, FileNotFoundError) as error:
        refusal = str(error)
    assert str(copy) in refusal


MODEL = "model.safetensors"
A = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
B = {"dtype": "F32", "shape": [1], "data_offsets": [8, 12]}


@pytest.mark.parametrize(
    ("header", "says"),
    [
        ({"a": A}, "bytes where its header wants"),
        ({"a": A, "b": {**B, "data_offsets": [4, 8]}}, "begins at"),
        ({"a": A, "b": {**B, "data_offsets": [12, 16]}}, "begins at"),
        ({"a": A, "b": {**B, "shape": [9], "data_offsets": [8, 44]}}, "its header wants"),
        ({"a": A, "b": {**B, "data_offsets": [12, 8]}}, "does not take -4 bytes"),
        ({"a": A, "b": {**B, "shape": [-1]}}, "impossible"),
        ({"a": A, "b": {**B, "shape": [2]}}, "does not take 4 bytes"),
        ({"a": A, "b": {**B, "shape": [True]}}, "impossible"),
        ({"a": A, "b": {**B, "dtype": "F7"}}, "dtype 'F7' is unknown"),
        ({"a": A, "b": {**B, "dtype": []}}, "corrupt header"),
        ({"a": A, "b": {"dtype": "F32"}}, "corrupt header: 'shape'"),
        ({"a": A, "b": 3}, "corrupt header"),
        ([A], "corrupt header"),
        (b'{"a": ', "corrupt header"),
        (b"\xff\xfe", "corrupt header"),
        (b"[" * 100_000, "corrupt header"),
    ],
    ids=["too short", "overlap", "gap", "outside", "backwards", "negative", "size", "bool",
         "dtype", "dtype type", "no shape", "no entry", "list", "cut", "not utf-8", "deep"],
)  # fmt: skip
def test_a_corrupt_header_is_named(tmp_path, header, says):
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    file = tmp_path / MODEL
    file.write_bytes(len(encoded).to_bytes(8, "little") + encoded + bytes(12))
    with pytest.raises(ValueError, match=says) as error:
        find_tensors(tmp_path)
    assert str(file) in str(error.value)


def test_a_dtype_that_no_model_computes_with_is_refused(copy):
    """An integer matrix, FP8 where no projection is: neither is ever loaded in silence."""

    def change(arrays):
        arrays["lm_head.weight"] = arrays["lm_head.weight"].view(np.int32)
        for name in ("model.norm.weight", "model.embed_tokens.weight"):
            arrays[name] = arrays[name].astype(ml_dtypes.float8_e4m3fn)

    rewrite(copy, change)
    with pytest.raises(ValueError, match="3 of an unusable dtype") as error:
        from_pretrained(copy)
    for said in ("lm_head.weight int32", "norm.weight float8_e4m3fn", "embed_tokens.weight float8"):
        assert said in str(error.value)


@pytest.mark.parametrize(
    ("first", "second", "result"),
    [("float16", "bfloat16", "float32"), ("float32", "bfloat16", "float32")],
)
def test_a_stack_of_mixed_dtypes_is_loaded_as_float32(copy, first, second, result):
    names = [f"model.layers.{layer}.input_layernorm.weight" for layer in (1, 2)]

    def change(arrays):
        for name, dtype in zip(names, (first, second), strict=True):
            arrays[name] = arrays[name].astype(np.dtype(getattr(ml_dtypes, dtype, dtype)))

    rewrite(copy, change)
    stored = find_tensors(copy)
    loaded = from_pretrained(copy).moe_layers.input_layernorm[...]
    assert loaded.dtype == result
    for layer, name in enumerate(names):
        np.testing.assert_array_equal(loaded[layer], stored[name].read().astype(np.float32))


@pytest.mark.parametrize(
    ("index", "error", "says"),
    [
        ({"weight_map": {"a": "other.safetensors"}}, FileNotFoundError, r"other\.safetensors"),
        ({"weight": 1}, ValueError, "is not an index"),
        ({"weight_map": {"a": "../model.safetensors"}}, ValueError, "not a plain name"),
    ],
)
def test_a_bad_index(copy, index, error, says):
    (copy / INDEX).write_text(json.dumps(index))
    with pytest.raises(error, match=says):
        from_pretrained(copy)


def test_missing_places(tmp_path, copy):
    with pytest.raises(FileNotFoundError, match="nowhere is not a directory"):
        from_pretrained(tmp_path / "nowhere")
    (copy / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no safetensors file"):
        from_pretrained(copy)
    (copy / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist"):
        from_pretrained(copy)


def test_fp8_needs_its_scales(fp8_model, tmp_path):
    save_pretrained(fp8_model, tmp_path / "m")
    name = "model.layers.0.mlp.up_proj.weight_scale_inv"
    rewrite(tmp_path / "m", lambda arrays: arrays.pop(name))
    with pytest.raises(ValueError, match=r"1 missing: .*FP8 without .*up_proj.weight_scale_inv"):
        from_pretrained(tmp_path / "m")


@pytest.mark.parametrize("fault", ["truncated file", "impossible sizes", "not json"])
def test_the_command_line_says_it_in_one_line_and_writes_nothing(copy, tmp_path, capsys, fault):
    if fault == "truncated file":
        content = (copy / "model.safetensors").read_bytes()
        (copy / "model.safetensors").write_bytes(content[:-7])
    elif fault == "impossible sizes":
        values = json.loads((copy / "config.json").read_text())
        values["num_experts_per_tok"] = 77
        (copy / "config.json").write_text(json.dumps(values))
    else:
        (copy / "config.json").write_text("{")
    for args in (
        ["train", "--from", str(copy), "--out", str(tmp_path / "run"), "--length", "32"],
        ["generate", "--model", str(copy), "--prompt", "x"],
    ):
        assert run(args) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith("whalejax: ") and captured.err.count("\n") == 1
        assert str(copy) in captured.err
    assert not (tmp_path / "run").exists()
