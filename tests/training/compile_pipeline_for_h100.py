"""Compiles a training step through DualPipe for 8 H100s, on a machine without one.

`compile_pipeline_for_h100.py CUDA PRECISION REMATERIALISE CAPACITY`: CUDA is a folder with JAX's
CUDA plugin, CAPACITY a factor or `none`. Prints a line of JSON: for each all-to-all and transfer
between stages of the steady state, the passes whose matmuls are scheduled between its start and its
done; and the bytes on a device. A pass is named by its turn of the loop's body and its kind.
"""

import dataclasses
import json
import math
import os
import re
import sys

from compile_for_h100 import H100, computations, matmuls, op_name

SEQUENCES, LENGTH, STAGES, EXPERT_RANKS, MICROBATCHES = 1, 1024, 4, 2, 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transfer:
    """A transfer of the scheduled steady state.

    Attributes:
      kind: "all-to-all" or "collective-permute".
      of: the pass that it belongs to.
      asynchronous: whether anything can run meanwhile.
      under: passes of the matmuls that do.
    """

    kind: str
    of: str
    asynchronous: bool
    under: list[str]


def pass_of(rest):
    """The pass that an instruction belongs to, "turn0 forward" for example, or "" for none."""
    name = op_name(rest)
    turn = re.search(r"/(turn\d)/", name)
    kind = re.search(r"/turn\d/(\w+/)*?(forward|backward|weight|transfer)", name)
    return f"{turn[1]} {kind[2]}" if turn and kind else ""


def steady_transfers(text, ticks):
    """The transfers of the loop over the steady state, "7_17" for example."""
    found = computations(text)
    is_matmul = matmuls(found)
    for name in set(re.findall(r" while\(.*body=%([\w.\-]+)", text)):
        body = found[name]
        if not any(f"ticks_{ticks}/" in op_name(rest) for _, rest in body):
            continue
        for place, (start, rest) in enumerate(body):
            kind = re.search(r" (all-to-all|collective-permute)(-start)?\(", rest)
            if not kind:
                continue
            under = []
            if kind[2]:
                done = next(i for i, (_, r) in enumerate(body) if f"-done(%{start})" in r)
                between = [r for _, r in body[place + 1 : done]]
                under = sorted({pass_of(r) for r in between if is_matmul(r)})
            yield Transfer(kind=kind[1], of=pass_of(rest), asynchronous=bool(kind[2]), under=under)


def compile_step(precision, rematerialise, capacity_factor):
    """The compiled step, its steady ticks, and bytes of a device's state."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies

    from whalejax.model.config import MLAConfig, ModelConfig, MoEConfig
    from whalejax.model.decoder import Execution
    from whalejax.model.linear import PRECISIONS
    from whalejax.parallel.dualpipe import make_schedule
    from whalejax.parallel.dualpipe.segments import steady_ticks
    from whalejax.parallel.dualpipe.table import tabulate
    from whalejax.parallel.mesh import MeshConfig, make_mesh
    from whalejax.training import step
    from whalejax.training.pipeline import PipelineConfig

    model = ModelConfig(
        vocab_size=2048,
        hidden_size=2048,
        intermediate_size=4096,
        num_hidden_layers=STAGES,
        first_k_dense_replace=0,
        mla=MLAConfig(num_attention_heads=16),
        moe=MoEConfig(n_routed_experts=16, num_experts_per_tok=2, moe_intermediate_size=1024),
    )
    topology = topologies.get_topology_desc(platform="cuda", target_config=H100, topology="1x1x8")
    mesh = make_mesh(MeshConfig(stage=STAGES, fsdp=1, expert=EXPERT_RANKS), topology.devices)
    execution = Execution(
        precision=PRECISIONS[precision],
        rematerialise=rematerialise,
        mesh=mesh,
        capacity_factor=capacity_factor,
    )
    pipeline = PipelineConfig(microbatches=MICROBATCHES)
    config = step.StepConfig(steps=10, execution=execution, pipeline=pipeline)
    state = step.abstract_state(model, config, mesh)
    shape = (1, SEQUENCES * EXPERT_RANKS * MICROBATCHES, LENGTH + 1)
    batch = jax.ShapeDtypeStruct(shape, jnp.int32)
    compiled = step.compile_step(model, config, mesh).lower(state, batch).compile()
    state_bytes = sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(state)
    )
    ticks = steady_ticks(tabulate(make_schedule("dualpipe", STAGES, MICROBATCHES)))
    return compiled, "_".join(map(str, ticks)), state_bytes


def main(cuda, precision, rematerialise, capacity):
    """Compiles and prints."""
    sys.path.insert(0, cuda)
    os.environ["JAX_PLATFORMS"] = "cpu"
    factor = None if capacity == "none" else float(capacity)
    compiled, ticks, state_bytes = compile_step(precision, rematerialise, factor)
    text, memory = compiled.as_text(), compiled.memory_analysis()
    result = {
        "transfers": [dataclasses.asdict(t) for t in steady_transfers(text, ticks)],
        "ring_copies": ring_copies(text),
        "state_bytes": state_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
    }
    print(json.dumps(result))


def ring_copies(text):
    """Copies of whole rings of activations, of `STAGES + 1` slots each, in any loop."""
    found = computations(text)
    bodies = set(re.findall(r" while\(.*body=%([\w.\-]+)", text))
    copy = re.compile(rf"\w+\[{STAGES + 1},\d+,\d+[\d,]*\]\S* copy\(")
    return [name for body in bodies for name, rest in found[body] if copy.match(rest)]


if __name__ == "__main__":
    main(*sys.argv[1:])
