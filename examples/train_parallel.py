"""Trains the demo's model with its experts shared out over devices, then with its layers too.

make demo-parallel, or: python examples/train_parallel.py --out runs/parallel --steps 100

Eight devices of one CPU stand for eight GPUs: two replicas of the batch, four ranks of experts, of
which each holds three slots for eight experts and four replicas. The router's own balancing is
switched off, so that some experts become hot; what that does to the ranks, and what moving experts
does about it, is in `expert_load.png`.

Then the same devices are four stages of a pipeline with two ranks of experts each: the dense layer,
two MoE layers, and the MTP module with the head. DualPipe runs eight microbatches through them from
both ends; `timeline.png` shows who does what when, if backward takes twice as long as forward.
"""

import argparse
import json
import time
from pathlib import Path

import jax
import numpy as np

from whalejax.parallel import dualpipe
from whalejax.parallel.mesh import MeshConfig, make_mesh
from whalejax.training.experts import EPLBConfig
from whalejax.training.loss import LossConfig
from whalejax.training.metrics import read_metrics
from whalejax.training.optimizer import OptimizerConfig
from whalejax.training.pipeline import PipelineConfig
from whalejax.training.run import TrainConfig, train

DEVICES = 8


def settings(out: Path, steps: int) -> TrainConfig:
    """A run that plans experts four times."""
    return TrainConfig(
        out=out,
        preset="tiny",
        steps=steps,
        batch_size=8,
        length=128,
        save_every=steps,
        log_every=1,
        export=False,
        mesh=MeshConfig(data=2, expert=4),
        eplb=EPLBConfig(every=max(steps // 4, 3), redundant=4, decay=0.8),
        loss=LossConfig(balance_weight=0.0),
        optimizer=OptimizerConfig(
            peak_lr=4e-3, final_lr=1e-3, warmup_steps=10, bias_update_speed=0.0
        ),
    )


def through_stages(out: Path, steps: int) -> TrainConfig:
    """A run through four stages, by DualPipe."""
    return TrainConfig(
        out=out,
        preset="tiny",
        steps=steps,
        batch_size=16,
        length=128,
        save_every=steps,
        log_every=1,
        export=False,
        mesh=MeshConfig(stage=4, expert=2),
        pipeline=PipelineConfig(schedule="dualpipe"),
        optimizer=OptimizerConfig(peak_lr=4e-3, final_lr=1e-3, warmup_steps=10),
    )


def draw_timeline(config: TrainConfig, path: Path) -> dict[str, float]:
    """Draws what a run's ranks do, and gives what it is worth on paper."""
    found = dualpipe.analyse(config.pipeline.steps(make_mesh(config.mesh)))
    dualpipe.plot(found, path)
    return {
        "pipeline_bubble": max(found.bubble) / found.makespan,
        "pipeline_activations": found.peak_activations,
    }


def imbalance(lines: list[dict]) -> float:
    """The busiest rank over the mean, averaged over layers and steps."""
    loads = np.array([line["rank_load"] for line in lines])
    return float(np.mean(loads.max(axis=-1) * loads.shape[-1]))


def summarise(out: Path) -> dict[str, float]:
    """Losses, and what ranks carried before the first migration and after the last one."""
    lines = read_metrics(out / "metrics.jsonl")
    moves = [line for line in lines if "migrated_slots" in line]
    steps = [line for line in lines if "rank_load" in line]
    first, last = moves[0]["step"], moves[-1]["step"]
    return {
        "first_loss": steps[0]["loss_main"],
        "last_loss": steps[-1]["loss_main"],
        "busiest_rank_before": imbalance([s for s in steps if s["step"] <= first][-10:]),
        "busiest_rank_after": imbalance([s for s in steps if s["step"] > last][-10:]),
        "migrations": len(moves),
        "moved_slots": sum(line["migrated_slots"] for line in moves),
        "moved_mib": sum(line["migrated_bytes"] for line in moves) / 2**20,
    }


def summarise_pipeline(out: Path) -> dict[str, float]:
    """The losses of a run through stages."""
    losses = [line["loss_main"] for line in read_metrics(out / "metrics.jsonl") if "lr" in line]
    return {"pipeline_first_loss": losses[0], "pipeline_last_loss": losses[-1]}


def main() -> None:
    """Trains twice, and prints how moving experts changed the ranks' loads, and losses."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/demo-parallel"))
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--pipeline-steps", type=int, default=20)
    args = parser.parse_args()
    began = time.perf_counter()
    if jax.config.jax_platforms in (None, "cpu"):
        jax.config.update("jax_num_cpu_devices", DEVICES)
    train(settings(args.out, args.steps))
    staged = through_stages(args.out / "pipeline", args.pipeline_steps)
    train(staged)
    summary = summarise(args.out) | summarise_pipeline(staged.out)
    summary |= draw_timeline(staged, args.out / "timeline.png")
    summary["seconds"] = time.perf_counter() - began
    (args.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    for name, value in summary.items():
        print(f"{name:<22}{value:10.3f}" if isinstance(value, float) else f"{name:<22}{value:10}")
    print(f"loads of experts and ranks, before and after: {args.out / 'expert_load.png'}")
    print(f"what each stage does when: {args.out / 'timeline.png'}")


if __name__ == "__main__":
    main()
