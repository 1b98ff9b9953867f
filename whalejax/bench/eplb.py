"""Replays loads of experts through plans of replicas: how balanced GPUs stay, and what it moves.

`python -m whalejax.bench.eplb` prints one JSON line per policy and case, and a short table last.
Loads are synthetic, at DeepSeek-V3's size, and those that `--metrics` recorded in a training run.
It needs no accelerator: plans are made on the host, and what GPUs would carry is counted.

Balancedness is a layer's mean load of a GPU over its largest, the mean over layers: 1 is perfect,
and a step takes 1 / balancedness times as long as it could where experts decide.
"""

import argparse
import dataclasses
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from whalejax.bench.report import Bench, at_least_one
from whalejax.parallel.eplb import gpu_loads, rebalance_experts
from whalejax.training.metrics import read_metrics

POLICIES = ("none", "static", "published", "whale", "whale, few moves")
STATE_BYTES = 12  # of a parameter: float32 master weight and two moments of AdamW
DEVIATION, RELAXATION = 0.5, 1000.0  # of the logarithms of loads; in steps
TOKENS = 32 * 4096  # a step, of whose 8 choices each expert has its share


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Loads, and the machine that carries them.

    Attributes:
      name: for rows.
      loads: `f64[steps, layers, experts]`, tokens of each expert, or shares.
      replicas, groups, nodes, gpus: as of `rebalance_experts`.
      expert_parameters: of one expert.
    """

    name: str
    loads: np.ndarray
    replicas: int
    groups: int
    nodes: int
    gpus: int
    expert_parameters: int

    def __str__(self):
        _, layers, experts = self.loads.shape
        return f"{self.name}, {layers} x {experts} -> {self.replicas} on {self.gpus}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """When plans are made, and from what.

    Attributes:
      every: steps between plans.
      decay: of the moving average of loads, a step.
      max_moves: slots of a layer that the policy of few moves may change at once.
    """

    every: int = 25
    decay: float = 0.9
    max_moves: int = 16

    def __post_init__(self):
        if self.every < 1 or self.max_moves < 1 or not 0 <= self.decay < 1:
            raise ValueError(
                f"every={self.every} and max_moves={self.max_moves} must be positive, "
                f"decay={self.decay} at least 0 and below 1"
            )


class Replay(NamedTuple):
    """What a policy made of a case.

    Attributes:
      balancedness: `f64[steps]`.
      moves: `i64[plans, layers]`, slots that each plan changed.
      plan_ms: `f64[plans]`, time to make them.
    """

    balancedness: np.ndarray
    moves: np.ndarray
    plan_ms: np.ndarray


def balancedness(load: np.ndarray, slots: np.ndarray, gpus: int) -> float:
    """Mean load of a GPU over the largest, the mean over layers; layers without load left out.

    Args:
      load: `[layers, experts]`.
      slots: `int[layers, replicas]`, a `physical_to_logical`.
      gpus: divides the replicas.
    """
    carried = gpu_loads(load, slots, gpus)
    peak = carried.max(axis=1)
    return float(np.mean((carried.mean(axis=1) / np.where(peak > 0, peak, 1))[peak > 0]))


def replay(case: Case, policy: str, schedule: Schedule) -> Replay:
    """Carries a case's loads step by step, with new plans from what was seen until then.

    Args:
      case: loads and machine.
      policy: one of `POLICIES`: every expert once and in order; the published plan, made once;
        that plan made anew, which no slot of the last one binds; whale's, from the plan in use;
        the same with a limit of moves.
      schedule: the first plan is made after `every` steps. Until then experts are in order, the
        first ones once more in the slots that are left.

    Raises:
      ValueError: the policy is unknown.
    """
    if policy not in POLICIES:
        raise ValueError(f"policy {policy!r} is unknown; there are {', '.join(POLICIES)}")
    _, layers, experts = case.loads.shape
    count = experts if policy == "none" else case.replicas
    slots = np.tile(np.arange(count, dtype=np.int32) % experts, (layers, 1))
    estimate, balance, moves, plan_ms = case.loads[0].astype(np.float64), [], [], []
    for step, load in enumerate(case.loads):
        balance.append(balancedness(load, slots, case.gpus))
        estimate = schedule.decay * estimate + (1 - schedule.decay) * load
        if policy == "none" or (step + 1) % schedule.every or (policy == "static" and moves):
            continue
        began = time.perf_counter()
        planned = plan(case, policy, schedule, estimate, slots if moves else None)
        plan_ms.append((time.perf_counter() - began) * 1e3)
        moves.append((planned != slots).sum(axis=1))
        slots = planned
    return Replay(np.array(balance), np.array(moves).reshape(-1, layers), np.array(plan_ms))


def plan(
    case: Case, policy: str, schedule: Schedule, estimate: np.ndarray, current: np.ndarray | None
) -> np.ndarray:
    """The next `physical_to_logical` of a policy that plans; the first one is bound by none."""
    sizes = (case.replicas, case.groups, case.nodes, case.gpus)
    options: dict[str, Any] = {"method": "published"}
    if policy.startswith("whale"):
        options = {"method": "whale", "current": current}
    if policy == "whale, few moves" and current is not None:
        options["max_moves"] = schedule.max_moves
    return rebalance_experts(estimate, *sizes, **options).physical_to_logical


def synthetic(kind: str, steps: int, layers: int = 58, experts: int = 256) -> np.ndarray:
    """Loads whose logarithms are normal at any time, counted in tokens.

    Args:
      kind: `"walk"`, an Ornstein-Uhlenbeck process of each expert's; `"sudden"`, constant but
        drawn again half way.
      steps, layers, experts: sizes.

    Returns:
      `f64[steps, layers, experts]`, Poisson counts of 8 choices of each token.
    """
    rng = np.random.default_rng(0)
    keep = np.exp(-1 / RELAXATION) if kind == "walk" else 1.0
    log, loads = rng.normal(size=(layers, experts)), []
    for step in range(steps):
        if kind == "sudden" and step == steps // 2:
            log = rng.normal(size=log.shape)
        share = np.exp(DEVIATION * log)
        share /= share.sum(axis=1, keepdims=True)
        loads.append(rng.poisson(share * TOKENS * 8))
        log = keep * log + np.sqrt(1 - keep**2) * rng.normal(size=log.shape)
    return np.array(loads, np.float64)


def deepseek(kind: str, steps: int) -> Case:
    """A synthetic case at DeepSeek-V3's size: 4 nodes of 8 GPUs, 9 experts each."""
    return Case(
        name=kind,
        loads=synthetic(kind, steps),
        replicas=288,
        groups=8,
        nodes=4,
        gpus=32,
        expert_parameters=3 * 7168 * 2048,
    )


def recorded(metrics: Path) -> Case:
    """The loads that a run of the demo's model logged, over 4 GPUs of 3 experts.

    Raises:
      ValueError: the file holds no loads of experts.
    """
    loads = [line["expert_load"] for line in read_metrics(metrics) if line.get("expert_load")]
    if not loads:
        raise ValueError(f"{metrics} holds no expert_load: give a run's metrics.jsonl")
    return Case(
        name="recorded",
        loads=np.array(loads, np.float64),
        replicas=12,
        groups=1,
        nodes=1,
        gpus=4,
        expert_parameters=3 * 128 * 96,
    )


def row(case: Case, policy: str, schedule: Schedule, found: Replay) -> dict[str, Any]:
    """What is kept of a replay; `later` plans are all but the first, which starts from no plan."""
    after = found.balancedness[schedule.every :]
    later = found.moves[1:]
    return {
        "op": "eplb",
        "case": str(case),
        "implementation": policy,
        "steps": len(case.loads),
        "balancedness": round(float(after.mean()), 4),
        "worst_balancedness": round(float(after.min()), 4),
        "first_moves": round(float(found.moves[:1].sum()) / case.loads.shape[1], 2),
        "later_moves": round(float(later.mean()), 2) if later.size else 0.0,
        "later_bytes": round(float(later.sum(axis=1).mean()) * expert_bytes(case))
        if later.size
        else 0,
        "plans": len(found.moves),
        "plan_ms": round(float(np.median(found.plan_ms)), 2) if found.plan_ms.size else None,
    } | dataclasses.asdict(schedule)


def expert_bytes(case: Case) -> int:
    """What moving one expert sends: weights and optimiser state."""
    return case.expert_parameters * STATE_BYTES


def draw(cases: list[Case], found: dict[tuple[str, str], Replay], every: int, png: Path) -> None:
    """Balancedness over the steps, and below it the moves of each plan."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5 * len(cases), 7), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(cases), squeeze=False)
    for case, (over, below) in zip(cases, axes.T, strict=True):
        for policy in POLICIES:
            this = found[str(case), policy]
            over.plot(this.balancedness, label=policy, linewidth=1)
            steps = every * np.arange(1, len(this.moves) + 1)
            below.plot(steps, this.moves.mean(axis=1), marker=".", linewidth=1)
        over.set(title=str(case), ylabel="balancedness", ylim=(None, 1))
        below.set(xlabel="step", ylabel="slots of a layer that a plan changes", ylim=(0, None))
        below.set_xlim(over.get_xlim())
    axes[0, 0].legend()
    figure.savefig(png, dpi=110)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m whalejax.bench.eplb", description=__doc__)
    parser.add_argument(
        "--metrics", type=Path, help="metrics.jsonl of a run of the demo's model; a line is a step"
    )
    parser.add_argument("--steps", type=at_least_one, default=400, help="of synthetic loads")
    for field in dataclasses.fields(Schedule):
        flag = f"--{field.name.replace('_', '-')}"
        parser.add_argument(flag, type=field.type, default=field.default)
    parser.add_argument("--plot", type=Path, help="a PNG of balancedness and moves over the steps")
    parser.add_argument("--out", type=Path, help="a file for the rows, as JSON lines")
    return parser


def main(args: Sequence[str] | None = None) -> None:
    """Replays all cases by all policies."""
    args = sys.argv[1:] if args is None else args
    given = parser().parse_args(args)
    schedule = Schedule(every=given.every, decay=given.decay, max_moves=given.max_moves)
    cases = [recorded(given.metrics)] if given.metrics else []
    bench = Bench("eplb", given, args)
    bench.context |= {"timer": "perf_counter", "device": f"CPU ({platform.machine()})"}
    cases += [deepseek(kind, given.steps) for kind in ("walk", "sudden")]
    found = {}
    for case in cases:
        for policy in POLICIES:
            found[str(case), policy] = replay(case, policy, schedule)
            bench.keep(row(case, policy, schedule, found[str(case), policy]))
    if given.plot:
        draw(cases, found, schedule.every, given.plot)
    table(bench.rows)


def table(rows: list[dict[str, Any]]) -> None:
    """Prints the rows."""
    print(
        f"{'case':<34}{'policy':<18}{'balancedness':>13}{'worst':>8}{'moves':>8}{'GB a plan':>11}"
    )
    for row in rows:
        print(
            f"{row['case']:<34}{row['implementation']:<18}{row['balancedness']:>13.3f}"
            f"{row['worst_balancedness']:>8.3f}{row['later_moves']:>8.1f}"
            f"{row['later_bytes'] / 1e9:>11.3f}"
        )


if __name__ == "__main__":
    main()
