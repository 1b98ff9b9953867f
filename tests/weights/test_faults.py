import json
import random

import numpy as np
import pytest

from whalejax.cli import run
from whalejax.weights import from_pretrained, save_pretrained
from whalejax.weights.safetensors_files import INDEX, find_tensors, read_header, write_file


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


def test_one_error_lists_missing_extra_and_misshapen(copy):
    def change(arrays):
        del arrays["model.norm.weight"]
        del arrays["model.layers.1.mlp.experts.2.up_proj.weight"]
        arrays["model.layers.9.surprise"] = np.zeros(3, np.float32)
        arrays["lm_head.weight"] = np.zeros((48, 135), np.float32)

    rewrite(copy, change)
    with pytest.raises(ValueError, match="does not hold the model") as error:
        from_pretrained(copy)
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


@pytest.mark.parametrize("seed", range(30))
def test_a_damaged_header_is_refused_or_harmless(copy, seed):
    """Bytes of the header changed at random: an error of ours, or the same tensors."""
    rng = random.Random(seed)
    file = copy / "model.safetensors"
    before = {n: (t.dtype, t.shape, t.offset) for n, t in read_header(file).items()}
    content = bytearray(file.read_bytes())
    length = int.from_bytes(content[:8], "little")
    for _ in range(rng.randint(1, 3)):
        content[rng.randrange(8 + length)] = rng.randrange(256)
    file.write_bytes(content)
    after, refusal = None, ""
    try:
        after = read_header(file)
        from_pretrained(copy)
    except ValueError as error:
        refusal = str(error)
    if refusal:
        assert str(copy) in refusal
    else:
        assert {n: (t.dtype, t.shape, t.offset) for n, t in after.items()} == before


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
