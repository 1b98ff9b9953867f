import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import whalejax
from whalejax.kernels.quantization import QuantizedArray
from whalejax.model.config import MLAConfig, ModelConfig
from whalejax.model.decoder import Decoder
from whalejax.model.sharding import partition_spec
from whalejax.parallel.mesh import MeshConfig, make_mesh
from whalejax.storage.safetensors_files import find_tensors
from whalejax.weights import from_pretrained, read_config, save_pretrained

# a parameter that is written in place keeps its memory; two copies of a large model fit nowhere
pytestmark = pytest.mark.filterwarnings("error:Some donated buffers were not usable")
logits_of = nnx.jit(lambda model, tokens: model(tokens))


def same(a, b):
    left, right = nnx.state(a), nnx.state(b)
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for x, y in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x).view(np.uint8), np.asarray(y).view(np.uint8))


@pytest.mark.parametrize("most", [10**9, 50_000], ids=["one file", "sharded"])
@pytest.mark.parametrize("kind", ["v3_model", "bf16_model", "fp8_model"])
def test_saving_and_loading_is_bitwise(kind, most, request, tmp_path):
    model = request.getfixturevalue(kind)
    save_pretrained(model, tmp_path / "a", max_shard_bytes=most)
    files = list((tmp_path / "a").glob("*.safetensors"))
    assert (len(files) > 2) == (most < 10**9)
    loaded = from_pretrained(tmp_path / "a")
    same(model, loaded)
    assert loaded.config == model.config
    save_pretrained(loaded, tmp_path / "b", max_shard_bytes=most)
    for file in files:
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_both_generations(model, tmp_path):
    save_pretrained(model, tmp_path / "a")
    loaded = whalejax.from_pretrained(tmp_path / "a")
    same(model, loaded)
    tokens = jnp.arange(6, dtype=jnp.int32)[None]
    np.testing.assert_array_equal(logits_of(model, tokens), logits_of(loaded, tokens))


def test_the_safetensors_package_reads_our_files(v3_model, tmp_path):
    from safetensors import safe_open

    save_pretrained(v3_model, tmp_path / "a")
    with safe_open(tmp_path / "a" / "model.safetensors", "np") as file:
        name = "model.layers.2.mlp.experts.3.down_proj.weight"
        np.testing.assert_array_equal(
            file.get_tensor(name), v3_model.moe_layers.mlp.experts.down_proj[...][1, 3]
        )
        assert "model.layers.3.shared_head.head.weight" in file.keys()  # noqa: SIM118
        np.testing.assert_array_equal(
            file.get_tensor("model.layers.3.embed_tokens.weight"), v3_model.embed_tokens[...]
        )


def test_fp8_stays_fp8_or_is_dequantised_on_request(fp8_model, tmp_path):
    save_pretrained(fp8_model, tmp_path / "a")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["quantization_config"]["weight_block_size"] == [128, 128]
    kept = from_pretrained(tmp_path / "a")
    weight = kept.dense_layers.mlp.gate_proj.get_value()
    assert isinstance(weight, QuantizedArray) and weight.scales.shape == (1, 2, 2)
    opened = from_pretrained(tmp_path / "a", dtype=jnp.float32)
    got = opened.dense_layers.mlp.gate_proj[...]
    np.testing.assert_array_equal(got, weight.dequantize())
    assert {x.dtype for x in jax.tree.leaves(nnx.state(opened))} == {np.dtype("float32")}
    tokens = jnp.arange(6, dtype=jnp.int32)[None]
    rounded = from_pretrained(tmp_path / "a", dtype=jnp.bfloat16)
    got, expected = np.asarray(logits_of(kept, tokens)), np.asarray(logits_of(rounded, tokens))
    assert expected.std() > 0.1
    np.testing.assert_array_equal(got, expected)


def test_a_dtype_converts_all_but_the_routers_bias(v3_model, tmp_path):
    save_pretrained(v3_model, tmp_path / "a")
    loaded = from_pretrained(tmp_path / "a", dtype=jnp.bfloat16)
    router = loaded.moe_layers.mlp.gate
    assert router.weight.dtype == jnp.bfloat16
    assert router.e_score_correction_bias.dtype == jnp.float32


def test_mtp_modules_are_optional(v3_model, tmp_path):
    folder = tmp_path / "a"
    save_pretrained(v3_model, folder, max_shard_bytes=50_000)
    config = json.loads((folder / "config.json").read_text())
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    from whalejax.storage.safetensors_files import write_file

    save_pretrained(v3_model, tmp_path / "b")
    kept = {n: t for n, t in find_tensors(tmp_path / "b").items() if ".layers.3." not in n}
    write_file(folder / "model.safetensors", {n: (t.dtype, t.shape) for n, t in kept.items()},
               (t.read() for t in kept.values()))  # fmt: skip
    assert config["num_nextn_predict_layers"] == 1
    loaded = from_pretrained(folder)
    assert loaded.config.num_nextn_predict_layers == 0 and not hasattr(loaded, "mtp_layers")


def test_parameters_go_where_the_sharding_says(v3_model, tmp_path):
    save_pretrained(v3_model, tmp_path / "a")
    mesh = make_mesh(MeshConfig())

    def place(name, shape):
        return NamedSharding(mesh, partition_spec(name, shape, mesh))

    loaded = from_pretrained(tmp_path / "a", sharding=place)
    same(v3_model, loaded)
    weight = loaded.moe_layers.mlp.experts.gate_proj[...]
    assert weight.sharding.spec[2] == "fsdp"
    assert weight.addressable_shards[0].data.shape == (2, 4, 3, 136)


def test_a_sharding_may_cut_a_stacked_axis(v3_model, tmp_path):
    """Experts over one axis of the mesh, their rows over another: the layout of inference."""
    save_pretrained(v3_model, tmp_path / "a")
    mesh = jax.make_mesh((4, 2), ("expert", "fsdp"), axis_types=(AxisType.Auto,) * 2)

    def place(name, shape):
        spec = (None, "expert", "fsdp") if "mlp.experts" in name else ()
        return NamedSharding(mesh, PartitionSpec(*spec))

    loaded = from_pretrained(tmp_path / "a", sharding=place)
    same(v3_model, loaded)
    weight = loaded.moe_layers.mlp.experts.up_proj[...]
    assert weight.addressable_shards[0].data.shape == (2, 1, 12, 136)


def test_only_a_saved_model_is_overwritten(v3_model, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("keep")
    with pytest.raises(ValueError, match="something other than a saved model"):
        save_pretrained(v3_model, tmp_path / "home", overwrite=True)
    assert (tmp_path / "home" / "thesis.txt").read_text() == "keep"
    (tmp_path / "file").write_text("keep")
    with pytest.raises(ValueError, match="is a file"):
        save_pretrained(v3_model, tmp_path / "file", overwrite=True)
    (tmp_path / "empty").mkdir()
    save_pretrained(v3_model, tmp_path / "empty")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "file", "home"]


def test_the_old_model_outlives_a_failed_overwrite(v3_model, tmp_path, monkeypatch):
    from whalejax.storage import safetensors_files

    save_pretrained(v3_model, tmp_path / "a")
    before = (tmp_path / "a" / "model.safetensors").read_bytes()

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(safetensors_files, "write_file", full)
    with pytest.raises(OSError, match="no space"):
        save_pretrained(v3_model, tmp_path / "a", overwrite=True)
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_an_existing_directory_is_not_replaced_unasked(v3_model, tmp_path):
    save_pretrained(v3_model, tmp_path / "a")
    (tmp_path / "a" / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match="exists"):
        save_pretrained(v3_model, tmp_path / "a")
    assert (tmp_path / "a" / "mine.txt").exists()
    save_pretrained(v3_model, tmp_path / "a", overwrite=True)
    assert not (tmp_path / "a" / "mine.txt").exists()
    assert not list(tmp_path.glob(".*"))


def test_an_interrupted_save_leaves_nothing(v3_model, tmp_path, monkeypatch):
    from whalejax.storage import safetensors_files

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(safetensors_files, "write_file", full)
    with pytest.raises(OSError, match="no space"):
        save_pretrained(v3_model, tmp_path / "a")
    assert not list(tmp_path.iterdir())


# not getrusage: its ru_maxrss outlives exec, so a child starts with the peak of pytest itself
LOADING = """
import re, sys
from pathlib import Path
import jax
from flax import nnx
from whalejax.weights import from_pretrained

def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

jax.block_until_ready(jax.numpy.zeros(8))
before = peak()
model = from_pretrained(sys.argv[1])
print(peak() - before - sum(x.nbytes for x in jax.tree.leaves(nnx.state(model))))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from Linux's /proc")
def test_the_host_holds_about_one_tensor_at_a_time(tmp_path):
    """Peak memory of loading beyond the model itself, in processes of their own.

    The compiler takes tens of MB too: the same model with narrow layers tells how many.
    """
    beyond = {}
    for width in (256, 16384):
        config = ModelConfig(
            vocab_size=64, hidden_size=512, intermediate_size=width, num_hidden_layers=6,
            first_k_dense_replace=6, mla=MLAConfig(num_attention_heads=2, kv_lora_rank=16),
        )  # fmt: skip
        graphdef, state = nnx.split(nnx.eval_shape(lambda c=config: Decoder(c, rngs=nnx.Rngs(0))))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state)
        folder = tmp_path / str(width)
        save_pretrained(nnx.merge(graphdef, zeros), folder)
        done = subprocess.run(
            [sys.executable, "-c", LOADING, str(folder)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        beyond[width] = int(done.stdout)
    largest = 16384 * 512 * 4  # a sixth of its stacked parameter
    assert beyond[16384] - beyond[256] < 3 * largest, beyond


def test_the_config_comes_back(model, tmp_path):
    save_pretrained(model, tmp_path / "a")
    assert read_config(tmp_path / "a") == model.config


def test_dequantising_on_the_host_equals_the_device():
    from whalejax.weights.load import dequantize

    rng = np.random.default_rng(0)
    values = (rng.normal(size=(200, 300)) * 30).astype(ml_dtypes.float8_e4m3fn)
    scales = rng.uniform(0.1, 1, (2, 3)).astype(np.float32)
    array = QuantizedArray(jnp.asarray(values), jnp.asarray(scales), (128, 128))
    np.testing.assert_array_equal(dequantize(values, scales), array.dequantize())


def test_leftovers_of_an_interrupted_save_are_no_obstacle(v3_model, tmp_path):
    (tmp_path / ".a.saving").mkdir()
    (tmp_path / ".a.saving" / "old").write_text("x")
    save_pretrained(v3_model, tmp_path / "a")
    same(v3_model, from_pretrained(tmp_path / "a"))
    shutil.copytree(tmp_path / "a", tmp_path / ".a.replaced")
    save_pretrained(v3_model, tmp_path / "a", overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
