"""Pictures of a run: its losses, and the load of its experts."""

from pathlib import Path

import numpy as np

from whalejax.training.metrics import read_metrics

AVERAGED = 10  # lines of metrics that stand for the time before and after a rebalance


def plot_loss(metrics: Path, png: Path) -> None:
    """Draws training and held-out losses over the steps.

    Args:
      metrics: a run's `metrics.jsonl`.
      png: the file to write; not written where nothing was measured.
    """
    lines = [line for line in read_metrics(metrics) if line.keys() & {"loss_main", "heldout_loss"}]
    if not lines:
        return
    figure, axes = _figure(1)
    for name, label in (
        ("loss_main", "next token"),
        ("loss_mtp", "MTP"),
        ("heldout_loss", "held out"),
    ):
        points = [(line["step"], line[name]) for line in lines if name in line]
        if points:
            axes[0].plot(
                *zip(*points, strict=True), label=label, marker="o" if len(points) < 30 else ""
            )
    axes[0].set(xlabel="step", ylabel="nats per token", title="loss")
    axes[0].legend()
    _save(figure, png)


def plot_expert_load(metrics: Path, png: Path) -> None:
    """Draws how far the busiest expert is above its share, and the last loads.

    Where ranks share experts out, also how far the busiest rank is above its share, with the steps
    at which experts moved; and if they did, the loads of ranks before and after the first plan.

    Args:
      metrics: a run's `metrics.jsonl`.
      png: the file to write; not written where the model has no experts.
    """
    every = sorted(read_metrics(metrics), key=lambda line: line["step"])
    lines = [line for line in every if line.get("expert_load")]
    if not lines:
        return
    moves = [line for line in every if "migrated_slots" in line]
    draw = [lambda axes: _draw_experts(axes, lines), lambda axes: _draw_last(axes, lines[-1])]
    ranked = [line for line in lines if "rank_load" in line]
    if ranked:
        draw.append(lambda axes: _draw_ranks(axes, ranked, moves))
    if rebalance := _first_rebalance(ranked, moves):
        draw.append(lambda axes: _draw_rebalance(axes, *rebalance))
    figure, panels = _figure(len(draw))
    for axes, panel in zip(panels, draw, strict=True):
        panel(axes)
    _save(figure, png)


def _draw_experts(axes, lines):
    """The busiest expert of each layer over the steps."""
    loads = np.array([line["expert_load"] for line in lines])  # [lines, layers, E]
    _draw_peaks(axes, [line["step"] for line in lines], list(loads.max(-1).T * loads.shape[2]))
    axes.set(ylabel="load of the busiest expert / fair share", title="balance")


def _draw_last(axes, line):
    """The loads of all experts at one step."""
    load = np.array(line["expert_load"])
    image = axes.imshow(load * load.shape[1], aspect="auto", vmin=0, vmax=2, cmap="coolwarm")
    axes.set(xlabel="expert", ylabel="MoE layer", title=f"load / fair share at step {line['step']}")
    axes.yaxis.get_major_locator().set_params(integer=True)  # there is no layer 0.5
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.figure.colorbar(image, ax=axes)


def _draw_ranks(axes, lines, moves):
    """The busiest rank of each layer over the steps, which may be of meshes of several sizes."""
    peaks = [np.max(line["rank_load"], axis=1) * len(line["rank_load"][0]) for line in lines]
    for line in moves:
        axes.axvline(line["step"], color="grey", linewidth=0.6, alpha=0.5)
    _draw_peaks(axes, [line["step"] for line in lines], list(np.array(peaks).T))
    title = "balance of ranks" + ("; grey: experts moved" if moves else "")
    axes.set(ylabel="load of the busiest rank / mean", title=title)


def _draw_peaks(axes, steps, peaks):
    for layer, peak in enumerate(peaks):
        axes.plot(steps, peak, label=f"MoE layer {layer}")
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set(xlabel="step")
    if len(peaks) <= 12:
        axes.legend()


def _draw_rebalance(axes, before, after):
    """The ranks of the layer that was least balanced before."""
    layer, ranks = before.max(axis=1).argmax(), np.arange(before.shape[1])
    for load, label, shift in ((before, "before", -0.2), (after, "after", 0.2)):
        axes.bar(ranks + shift, load[layer] * len(ranks), 0.4, label=label)
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set(xlabel="rank", ylabel="load / mean", title=f"MoE layer {layer}, first rebalance")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend()


def _first_rebalance(lines, moves):
    """Mean loads of ranks in the last lines before the first plan and the first ones after it."""
    if not moves:
        return None
    of_plan = [line["step"] for line in moves if line["planned_at"] == moves[0]["planned_at"]]
    later = [line["step"] for line in moves if line["step"] > max(of_plan)]
    before = [line["rank_load"] for line in lines if line["step"] <= min(of_plan)]
    until = min(later, default=float("inf"))
    after = [line["rank_load"] for line in lines if max(of_plan) < line["step"] <= until]
    before, after = before[-AVERAGED:], after[:AVERAGED]
    if not before or not after or np.shape(before[0]) != np.shape(after[0]):
        return None
    return np.mean(before, axis=0), np.mean(after, axis=0)


def _figure(panels: int):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows, columns = (2, 2) if panels == 4 else (1, panels)
    figure = Figure(figsize=(6.5 * columns, 4.2 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False).reshape(-1)


def _save(figure, png: Path) -> None:
    figure.savefig(png, dpi=110)
