import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from whalejax.model.sharding import on_own_batch, partition_spec, stage_spec
from whalejax.parallel.mesh import BATCH_AXES, MeshConfig, make_mesh

STAGES = MeshConfig(stage=2, fsdp=2, expert=2)
EXPERTS = "moe_layers.mlp.experts.up_proj"


@pytest.mark.parametrize(
    ("path", "shape", "spec"),
    [
        (EXPERTS, (4, 8, 6, 5), ("stage", "expert", "fsdp", None)),
        # three layers do not divide: stages cut what fsdp cuts, or neither does
        (EXPERTS, (3, 8, 8, 5), (None, "expert", ("stage", "fsdp"), None)),
        (EXPERTS, (3, 8, 6, 5), (None, "expert", "fsdp", None)),
        (EXPERTS, (3, 7, 5, 5), (None, None, None, None)),
        ("moe_layers.input_layernorm", (4, 16), ("stage", None)),
        ("moe_layers.input_layernorm", (3, 16), (None, None)),
        ("opt_state.mu.moe_layers.self_attn.o_proj", (4, 8, 6), ("stage", "fsdp", None)),
        ("mtp_layers.layer.self_attn.o_proj", (4, 8, 6), (None, ("stage", "fsdp"), None)),
        ("lm_head", (7, 8), (None, ("stage", "fsdp"))),
        ("load_estimate", (4, 8), ()),
    ],
)
def test_stages_share_layers_out_or_cut_with_fsdp(path, shape, spec):
    assert partition_spec(path, shape, make_mesh(STAGES)) == PartitionSpec(*spec)


def test_without_stages_the_table_is_as_it_stands():
    mesh = make_mesh(MeshConfig(fsdp=4, expert=2))
    assert partition_spec(EXPERTS, (4, 8, 8, 5), mesh) == PartitionSpec(
        None, "expert", "fsdp", None
    )
    assert partition_spec("lm_head", (7, 8), mesh) == PartitionSpec(None, "fsdp")
    assert partition_spec("lm_head", (7, 6), mesh) == PartitionSpec(None, None)


def test_a_layer_of_a_stage_is_cut_over_the_other_axes():
    mesh = make_mesh(STAGES)
    spec = stage_spec("mlp.experts.up_proj", (2, 8, 8, 5), mesh)
    assert spec == PartitionSpec(None, "expert", "fsdp", None)
    assert stage_spec("input_layernorm", (2, 8), mesh) == PartitionSpec(None, None)


def test_where_every_device_has_its_part_a_function_is_called_as_it_is():
    mesh = make_mesh(MeshConfig(stage=2, expert=4, fsdp=1))
    seen = []

    def f(_, x):
        seen.append(x.shape)
        return x + jax.lax.axis_index("expert").astype(x.dtype)[None]

    def outer(x):
        return on_own_batch(f, mesh)((), x)

    placed = jax.shard_map(
        outer, mesh=mesh, in_specs=PartitionSpec(BATCH_AXES), out_specs=PartitionSpec(BATCH_AXES)
    )
    x = jnp.zeros((8,))
    np.testing.assert_array_equal(jax.jit(placed)(x), [0, 0, 1, 1, 2, 2, 3, 3])
    np.testing.assert_array_equal(jax.jit(outer)(x), [0, 0, 1, 1, 2, 2, 3, 3])
    assert set(seen) == {(2,)}
