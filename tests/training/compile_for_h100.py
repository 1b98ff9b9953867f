"""Compiles a training step for 8 H100s, on a machine without one, and says how it is scheduled.

`compile_for_h100.py CUDA PRECISION CAPACITY [overlap]`: CUDA is a folder with JAX's CUDA plugin,
CAPACITY a factor or `none`. Prints a line of JSON: for each all-to-all the matmuls that are
scheduled between its start and its done, by half-batch; and the bytes on a device.
"""

import dataclasses
import json
import math
import os
import re
import sys

H100 = """gpu_device_info { threads_per_block_limit: 1024 threads_per_warp: 32
 shared_memory_per_block: 49152 core_count: 132 shared_memory_per_core: 233472
 threads_per_core_limit: 2048 fpus_per_core: 128 block_dim_limit_x: 2147483647 clock_rate_ghz: 1.98
 block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3352320000000
 l2_cache_size: 52428800 device_memory_size: 84942979072 shared_memory_per_block_optin: 232448
 registers_per_core_limit: 65536 registers_per_block_limit: 65536
 device_interconnect_info { active_links: 18 }
 cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES } }
 platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 } runtime_version { major: 13 }
 device_description_str: "NVIDIA H100 80GB HBM3" """
SEQUENCES, LENGTH = 4, 1024  # on each device


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transfer:
    """An all-to-all of the scheduled program.

    Attributes:
      phase: "forward" or "backward" where it stands in the loop over layers, else "outside".
      part: "dispatch" or "combine", the one that it is of, or is the gradient of.
      again: computed again for the backward pass.
      half: of the batch.
      own, other: matmuls of its own and of the other half between its start and its done.
      gathers: of the other half's experts' weights, a tile of rows each, there: the part of a
        grouped matmul in bfloat16 that takes longest on a GPU.
    """

    phase: str
    part: str
    again: bool
    half: str | None
    own: int
    other: int
    gathers: int


def computations(text):
    """The instructions of each computation of a module in order: pairs of name and the rest."""
    found, current = {}, None
    for line in text.splitlines():
        if head := re.match(r"(?:ENTRY )?%([\w.\-]+) \(.*\{$", line):
            current = found.setdefault(head[1], [])
        elif instruction := re.match(r"\s+(?:ROOT )?%([\w.\-]+) = (.*)$", line):
            current.append(instruction.groups())
    return found


def op_name(rest):
    """The scopes that JAX wrote down for an instruction."""
    match = re.search(r'op_name="([^"]*)"', rest)
    return match[1] if match else ""


def half(rest):
    """The half of the batch that an instruction works for; None for both, or no half."""
    halves = set(re.findall(r"half[01]", op_name(rest)))
    return halves.pop() if len(halves) == 1 else None


def fp8_matmul(rest):
    """Whether an instruction is a Mosaic GPU kernel that multiplies in FP8, not a quantiser."""
    return "mosaic_gpu" in rest and bool(re.search(r"/fp8_(matmul|wgrad)", op_name(rest)))


def matmuls(found):
    """A function that says whether an instruction multiplies matrices."""
    with_dot = {name for name, body in found.items() if any(" dot(" in rest for _, rest in body)}

    def is_matmul(rest):
        called = re.search(r" fusion\(.*calls=%([\w.\-]+)", rest)
        fused = called is not None and called[1] in with_dot
        return fused or 'custom_call_target="__cublas' in rest or fp8_matmul(rest)

    return is_matmul


def transfers(text):
    """All all-to-alls of a scheduled module."""
    found = computations(text)
    is_matmul = matmuls(found)
    loops = set(re.findall(r" while\(.*body=%([\w.\-]+)", text))
    for name, body in found.items():
        for place, (start, rest) in enumerate(body):
            if not re.search(r" (ragged-)?all-to-all(-start)?\(", rest):
                continue
            under, gathers = [], []  # of a synchronous one nothing
            if "-start(" in rest:
                done = next(i for i, (_, r) in enumerate(body) if f"-done(%{start})" in r)
                between = [r for _, r in body[place + 1 : done]]
                under = [half(r) for r in between if is_matmul(r)]
                gathers = [half(r) for r in between if op_name(r).endswith("/experts/gather")]
            scopes = op_name(rest)
            phase = "backward" if "transpose(" in scopes else "forward"
            yield Transfer(
                phase=phase if name in loops else "outside",
                part="combine" if "combine" in scopes else "dispatch",
                again="rematted" in scopes,
                half=half(rest),
                own=sum(h == half(rest) for h in under),
                other=sum(h is not None and h != half(rest) for h in under),
                gathers=sum(h is not None and h != half(rest) for h in gathers),
            )


def compile_step(precision, capacity_factor, overlap):
    """The compiled step, and bytes on a device: of state, batch, and the most rows of a half."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies

    from whalejax.model.config import MLAConfig, ModelConfig, MoEConfig
    from whalejax.model.decoder import Execution
    from whalejax.model.linear import PRECISIONS
    from whalejax.parallel.mesh import MeshConfig, make_mesh
    from whalejax.training import step

    model = ModelConfig(
        vocab_size=2048,
        hidden_size=2048,
        intermediate_size=4096,
        num_hidden_layers=4,
        first_k_dense_replace=0,
        mla=MLAConfig(num_attention_heads=16),
        moe=MoEConfig(n_routed_experts=16, num_experts_per_tok=2, moe_intermediate_size=1024),
        num_nextn_predict_layers=0,
    )
    topology = topologies.get_topology_desc(platform="cuda", target_config=H100, topology="1x1x8")
    mesh = make_mesh(MeshConfig(fsdp=1, expert=8), topology.devices)
    execution = Execution(
        precision=PRECISIONS[precision],
        rematerialise="full",
        mesh=mesh,
        overlap=overlap,
        capacity_factor=capacity_factor,
    )
    config = step.StepConfig(steps=10, execution=execution)
    state = step.abstract_state(model, config, mesh)
    batch = jax.ShapeDtypeStruct((1, SEQUENCES * mesh.size, LENGTH + 1), jnp.int32)
    compiled = step.compile_step(model, config, mesh).lower(state, batch).compile()
    state_bytes = sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(state)
    )
    choices = SEQUENCES // 2 * LENGTH * mesh.size * model.moe.num_experts_per_tok
    return compiled, {
        "state_bytes": state_bytes,
        "batch_bytes": SEQUENCES * (LENGTH + 1) * batch.dtype.itemsize,
        "rows_bytes": choices * model.hidden_size * 2,
    }


def main(cuda, precision, capacity, overlap=None):
    """Compiles and prints."""
    sys.path.insert(0, cuda)
    os.environ["JAX_PLATFORMS"] = "cpu"
    factor = None if capacity == "none" else float(capacity)
    compiled, sizes = compile_step(precision, factor, overlap == "overlap")
    text, memory = compiled.as_text(), compiled.memory_analysis()
    instructions = (rest for body in computations(text).values() for _, rest in body)
    result = {
        "transfers": [dataclasses.asdict(transfer) for transfer in transfers(text)],
        "fp8_matmuls": sum(map(fp8_matmul, instructions)),
        **sizes,
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
