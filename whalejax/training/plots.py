"""Pictures of a run: its losses, and the load of its experts."""

from pathlib import Path

import numpy as np

from whalejax.training.metrics import read_metrics


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

    Args:
      metrics: a run's `metrics.jsonl`.
      png: the file to write; not written where the model has no experts.
    """
    lines = [line for line in read_metrics(metrics) if line.get("expert_load")]
    if not lines:
        return
    loads = np.array([line["expert_load"] for line in lines])  # [lines, layers, E]
    steps = [line["step"] for line in lines]
    figure, (over, last) = _figure(2)
    for layer in range(loads.shape[1]):
        over.plot(steps, loads[:, layer].max(-1) * loads.shape[2], label=f"MoE layer {layer}")
    over.axhline(1, color="grey", linewidth=0.8)
    over.set(xlabel="step", ylabel="load of the busiest expert / fair share", title="balance")
    if loads.shape[1] <= 12:
        over.legend()
    image = last.imshow(loads[-1] * loads.shape[2], aspect="auto", vmin=0, vmax=2, cmap="coolwarm")
    last.set(xlabel="expert", ylabel="MoE layer", title=f"load / fair share at step {steps[-1]}")
    last.yaxis.get_major_locator().set_params(integer=True)  # there is no layer 0.5
    last.xaxis.get_major_locator().set_params(integer=True)
    figure.colorbar(image, ax=last)
    _save(figure, png)


def _figure(columns: int):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5 * columns, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def _save(figure, png: Path) -> None:
    figure.savefig(png, dpi=110)
