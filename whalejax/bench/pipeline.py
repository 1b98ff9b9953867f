"""Times the parts of a pipeline's stage on one device, and predicts every schedule from them.

`python -m whalejax.bench.pipeline` times one MoE layer of DeepSeek-V3 on 4096 tokens, in bfloat16
and in FP8: forward pass, backward pass, its two halves, and a forward with a backward pass in one
program. It has eight experts that every token visits: as many rows as each of 64 ranks works on
when the load is balanced. Then it predicts the time of a step on 16 x 64 GPUs: stages of four
layers, and transfers that the traffic model adds.
"""

import dataclasses
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from whalejax.bench import report
from whalejax.bench.expert import LINK_GBS, NETWORK_GBS, Sizes, limited_choices
from whalejax.bench.report import Bench, ours
from whalejax.model.config import ModelConfig
from whalejax.model.decoder import Decoder, Execution
from whalejax.model.linear import PRECISIONS
from whalejax.model.parameters import RouterBias
from whalejax.model.pipelined import (
    Travelling,
    divide,
    round_weights,
    run_stage,
    split,
    with_rounded,
)
from whalejax.parallel.dualpipe import StageTimes, predict
from whalejax.parallel.dualpipe.stage import Functions, Stage, trace_stage
from whalejax.parallel.expert import Placement, Topology, predicted_us, row_bytes, traffic
from whalejax.presets import preset
from whalejax.training.pipeline import can_wait

LENGTH, LAYERS, RANKS, EXPERT_RANKS = 4096, 4, 16, 64
MICROBATCHES, CHUNKS = (32, 64, 128), (2, 4)
LOCAL_EXPERTS = 4  # of 256 on 64 ranks
# what passes of a stage take beside its parameters: what travels into it, the gradient of what
# leaves it, what a forward pass keeps for its backward pass, what weight gradients wait for
PARTS = {
    "forward": ("x",),
    "backward": ("kept", "dy"),
    "input": ("kept", "dy"),
    "weight": ("slots",),
    "overlapped": ("x", "kept", "dy"),
}


def one_layer(model: ModelConfig, experts: int) -> ModelConfig:
    """A model of one MoE layer, in which every token visits every expert."""
    moe = dataclasses.replace(
        model.moe, n_routed_experts=experts, num_experts_per_tok=experts, n_group=1, topk_group=1
    )
    parts = {"num_hidden_layers": 1, "first_k_dense_replace": 0, "num_nextn_predict_layers": 0}
    return dataclasses.replace(model, **parts, moe=moe, vocab_size=256)


def functions_of(stage: Any, model: ModelConfig, execution: Execution) -> tuple[Functions, list]:
    """What a pipeline runs of one stage's parameters and biases, and these as a list."""
    flat, structure = jax.tree_util.tree_flatten_with_path(stage)
    fp8 = execution.precision.fp8

    def run(stage, x):
        return run_stage(with_rounded(*stage) if fp8 else stage, x, model, execution)

    functions = Functions(
        first=None,
        stage=run,
        loss=lambda _, x, labels: (jnp.mean(x.hidden.astype(jnp.float32)) + x.balance, ()),
        prepare=round_weights if fp8 else None,
        structure=structure,
        names=tuple(jax.tree_util.keystr(path) for path, _ in flat),
        trained=tuple(range(len(flat))),
        deferred=tuple(i for i, (path, leaf) in enumerate(flat) if can_wait(path, leaf)),
    )
    return functions, [leaf for _, leaf in flat]


def draw_stage(
    model: ModelConfig, execution: Execution, length: int
) -> tuple[Stage, list[jax.Array], Travelling]:
    """A traced stage of the model's one layer, its parameters, and what travels into it."""
    decoder = jax.jit(lambda key: Decoder(model, rngs=nnx.Rngs(params=key)))(jax.random.key(0))
    _, params, router_bias = nnx.split(decoder, nnx.Param, RouterBias)
    stages, _ = split(params, router_bias, divide(model, 1))
    functions, leaves = functions_of(jax.tree.map(lambda a: a[0], stages), model, execution)
    functions, (leaves,) = functions.prepared([leaves])
    shape = (1, length, model.hidden_size)
    hidden = jax.random.normal(jax.random.key(1), shape, execution.precision.dtype)
    x = Travelling(hidden, jnp.zeros((), jnp.float32))
    return trace_stage(functions, leaves, None, x, None), leaves, x


def parts_of(stage: Stage) -> dict[str, Callable]:
    """The passes of a stage by name, functions of its parameters and of what `PARTS` says.

    The backward pass is whole or in its halves, `input` and `weight`; `overlapped` is a forward and
    a whole backward pass of two microbatches in one program.
    """

    def backward(leaves, kept, dy):
        return stage.backward(leaves, kept, dy)[:2]

    def input_alone(leaves, kept, dy):
        dx, gradients, slots = stage.backward(leaves, kept, dy)
        return dx, stage.without_deferred(gradients), slots

    def overlapped(leaves, x, kept, dy):
        return stage.forward(leaves, x), backward(leaves, kept, dy)

    found = stage.forward, backward, input_alone, stage.weight_gradients, overlapped
    return dict(zip(PARTS, found, strict=True))


def time_parts(bench: Bench, precision: str, model: ModelConfig, length: int) -> dict[str, float]:
    """Microseconds of one layer: forward, backward, its halves input and weight, overlapped."""
    stage, leaves, x = draw_stage(model, Execution(precision=PRECISIONS[precision]), length)
    dy = x._replace(hidden=jax.random.normal(jax.random.key(2), x.hidden.shape, x.hidden.dtype))
    parts = parts_of(stage)
    given = {"x": x, "dy": dy}
    _, given["kept"], _ = jax.jit(parts["forward"])(leaves, x)
    given["slots"] = jax.jit(parts["input"])(leaves, given["kept"], dy)[-1]
    found = {}
    for part, f in parts.items():
        arguments = (leaves, *(given[name] for name in PARTS[part]))
        times = bench.time(part, f"layer {precision}", [ours(f, [arguments])])
        found[part] = float(np.median(times["whalejax"].sustained_us))
    return found


def transfers_us(quantized: bool) -> tuple[float, float]:
    """Microseconds that a layer's tokens travel in a forward, and in a backward pass.

    A gradient of dispatch travels as combine does, one of combine as dispatch in bfloat16.
    """
    sizes = Sizes()
    machine = Topology(
        num_ranks=EXPERT_RANKS, ranks_per_node=8, link_gbs=LINK_GBS, network_gbs=NETWORK_GBS
    )
    topk = limited_choices(machine, sizes)
    placement = Placement.uniform(sizes.experts, EXPERT_RANKS)

    def us(fp8):
        bytes_ = row_bytes(sizes.hidden, sizes.k, quantized=fp8)
        return predicted_us(traffic(topk, placement, machine, row_bytes=bytes_), machine)

    plain = us(False)
    return (us(True) if quantized else plain) + plain, 2 * plain


def weight_time(parts: dict[str, float]) -> float:
    """The time of weight gradients, at most that of the backward pass whose part they are.

    Both are timed apart, and a machine may be busy with other things meanwhile.
    """
    return min(parts["weight"], parts["backward"])


def stage_times(parts: dict[str, float], transfers: tuple[float, float]) -> StageTimes:
    """Seconds of a stage of `LAYERS` layers, from microseconds of one.

    Transfers are bare where a pass runs alone, and hidden as far as they can be where two overlap.
    """
    there, back = transfers
    computed = max(parts["overlapped"], parts["forward"] + parts["backward"])
    layer = {
        "forward": parts["forward"] + there,
        "backward": parts["backward"] + back,
        "weight": weight_time(parts),
        "overlapped": max(computed, there + back),
    }
    activation = LENGTH * preset("v3").hidden_size * 2
    stage = {name: us * LAYERS * 1e-6 for name, us in layer.items()}
    return StageTimes(**stage, transfer=activation / NETWORK_GBS * 1e-9)


def copies_s() -> float:
    """Seconds in which DualPipe's second copies of a stage's parameters and gradients travel."""
    layer = one_layer(preset("v3"), LOCAL_EXPERTS)
    shapes = jax.eval_shape(lambda: Decoder(layer, rngs=nnx.Rngs(0)).moe_layers)
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    return 2 * 4 * LAYERS * parameters / NETWORK_GBS * 1e-9


def predictions(times: StageTimes) -> list[str]:
    """Lines of milliseconds a step, the fastest schedule first."""
    lines = []
    for microbatches in MICROBATCHES:
        found = {}
        for chunks in CHUNKS:
            numbers = {"num_ranks": RANKS, "num_microbatches": microbatches}
            seconds = predict(times, **numbers, chunks_per_rank=chunks).seconds
            found |= {f"{n} x{chunks}" if "inter" in n else n: s for n, s in seconds.items()}
        found["dualpipe, copies sent"] = found["dualpipe"] + copies_s()
        ranked = sorted(found.items(), key=lambda pair: pair[1])
        shown = ", ".join(f"{name} {1e3 * seconds:.0f}" for name, seconds in ranked)
        lines.append(f"M={microbatches:<5} {shown}")
    return lines


def main(args: Sequence[str] | None = None) -> None:
    """Times and predicts."""
    args = sys.argv[1:] if args is None else args
    bench = Bench("pipeline", report.parser("pipeline", __doc__).parse_args(args), args)
    if jax.default_backend() == "gpu":
        model, length = one_layer(preset("v3"), 8), LENGTH
    else:
        model, length = one_layer(preset("tiny"), 4), 64
    bench.ceilings()
    found = {
        precision: time_parts(bench, precision, model, length) for precision in ("bf16", "fp8")
    }
    bench.table()
    print(f"milliseconds of a step, PP {RANKS} x EP {EXPERT_RANKS}, {LAYERS} layers a stage")
    for precision, parts in found.items():
        transfers = transfers_us(precision == "fp8")
        times = stage_times(parts, transfers)
        shown = ", ".join(f"{n} {1e3 * s:.2f}" for n, s in dataclasses.asdict(times).items())
        print(f"{precision}: stage, in ms: {shown}; tokens travel {sum(transfers):.0f} us a layer")
        print("\n".join(predictions(times)))


if __name__ == "__main__":
    main()
