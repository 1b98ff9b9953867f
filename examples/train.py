"""Trains a preset on random or real tokens with `jit` over a mesh, on the public API alone.

python examples/train.py --preset small --steps 30 --batch-size 16 --length 4096 --precision bf16
"""

import argparse
import time

import jax
import numpy as np

from whalejax.data.corpus import standard_library
from whalejax.data.loader import batch_at
from whalejax.data.tokens import join
from whalejax.model.decoder import Execution
from whalejax.model.linear import PRECISIONS
from whalejax.model.sharding import batch_sharding
from whalejax.parallel.mesh import MeshConfig, make_mesh
from whalejax.presets import PRESETS
from whalejax.tokenizer import ByteTokenizer
from whalejax.training.metrics import peak_flops, training_flops_per_token
from whalejax.training.optimizer import OptimizerConfig
from whalejax.training.pipeline import PipelineConfig
from whalejax.training.step import StepConfig, compile_step, init_state


def main() -> None:
    """Parses the arguments, trains, and prints speed, MFU and memory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", choices=PRESETS, default="tiny")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--precision", choices=list(PRECISIONS), default="f32")
    parser.add_argument("--rematerialise", default="none")
    parser.add_argument("--mesh", type=MeshConfig.parse, default=MeshConfig())
    parser.add_argument("--overlap", action="store_true", help="over several ranks of experts")
    parser.add_argument("--capacity-factor", type=float, help="of the rows of a rank")
    parser.add_argument("--exchange", help="method of parallel.expert.dispatch")
    parser.add_argument("--schedule", default="dualpipe", help="of the ranks of the axis stage")
    parser.add_argument("--microbatches", type=int, help="of the pipeline")
    parser.add_argument("--chunks-per-rank", type=int, default=1, help="of interleaved")
    args = parser.parse_args()

    model, mesh = PRESETS[args.preset], make_mesh(args.mesh)
    config = StepConfig(
        steps=args.steps,
        accumulate=args.accumulate,
        optimizer=OptimizerConfig(peak_lr=1e-3, warmup_steps=args.steps // 4),
        execution=Execution(
            precision=PRECISIONS[args.precision],
            rematerialise=args.rematerialise,
            mesh=mesh if mesh.size > 1 else None,
            overlap=args.overlap,
            capacity_factor=args.capacity_factor,
            exchange=args.exchange,
        ),
        pipeline=PipelineConfig(
            schedule=args.schedule,
            microbatches=args.microbatches,
            chunks_per_rank=args.chunks_per_rank,
        ),
    )
    tokens = join(standard_library().train, ByteTokenizer())
    state = init_state(model, config, mesh, seed=0)
    step = compile_step(model, config, mesh)
    shape = (args.accumulate, args.batch_size // args.accumulate, args.length + 1)
    sharding = batch_sharding(mesh, leading=1)
    times = []
    for i in range(args.steps):
        rows = batch_at(tokens, step=i, batch=args.batch_size, length=args.length, seed=0)
        state, metrics = step(state, jax.device_put(np.reshape(rows, shape), sharding))
        loss = float(metrics["loss_main"])  # waits for the step
        times.append(time.perf_counter())
        overflow = int(metrics["overflow"])  # choices of experts that were left out
        print(f"step {i + 1}/{args.steps}  loss {loss:.3f}  overflow {overflow}", flush=True)

    seconds = np.median(np.diff(times))  # the first step compiles, and is not among them
    rate = args.batch_size * args.length / seconds
    print(f"{rate:,.0f} tokens/s on {mesh.size} x {jax.devices()[0].device_kind}")
    if peak := peak_flops(jax.devices()[0]):
        mfu = rate * training_flops_per_token(model, args.length) / (peak * mesh.size)
        memory = jax.devices()[0].memory_stats()["peak_bytes_in_use"] / 2**30
        print(f"MFU {mfu:.1%}, peak memory {memory:.1f} GiB a device")


if __name__ == "__main__":
    main()
