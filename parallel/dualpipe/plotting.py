"""Timelines drawn like the figures of the papers: a row for each rank, a box for each step."""

from pathlib import Path

from whalejax.parallel.dualpipe.analysis import Analysis, Span, Timeline
from whalejax.parallel.dualpipe.schedule import BACKWARD, FORWARD, INPUT, WEIGHT

KINDS = {
    FORWARD: "forward",
    BACKWARD: "backward",
    INPUT: "input gradient",
    WEIGHT: "weight gradient",
}
# of each kind, the colours of a rank's first chunk and of its last; those between are mixed
COLORS = {
    FORWARD: ("#f6b26b", "#fce5cd"),
    BACKWARD: ("#3d85c6", "#9fc5e8"),
    INPUT: ("#76a5af", "#d0e0e3"),
    WEIGHT: ("#6aa84f", "#b6d7a8"),
}
INCHES = 12.0
ROW_INCHES = 0.32
POINTS_PER_INCH = 72
FONT_POINTS = 6
DIGIT_POINTS = 0.65 * FONT_POINTS  # digits of the default font are 0.64 of its size wide


def plot(source: Analysis | Timeline, path: str | Path) -> None:
    """Draws a timeline.

    A box is a step, coloured by kind and, lighter for higher ones, by the rank's chunk, which is
    the direction in DualPipe. It has the number of the microbatch where it fits. Of an overlapped
    pair the forward is above, the backward below.

    Args:
      source: an analysis, or of each rank the (step, start, end) of its steps in any unit of time,
        measured ones too.
      path: of the file; its suffix says the format, `.png` or `.svg`.

    Raises:
      ValueError: there is nothing to draw, a step ends before it starts, or the suffix is neither.
    """
    path = Path(path)
    title = ""
    if isinstance(source, Analysis):
        title = f"{source.schedule.name}: makespan {source.makespan:g}"
        source = source.timeline
    timeline = [[Span(*span) for span in spans] for spans in source]
    _refuse(timeline, path)
    _draw(timeline, title).savefig(path, dpi=160)


def _refuse(timeline, path):
    """Raises if this cannot be drawn into that file."""
    if path.suffix not in (".png", ".svg"):
        raise ValueError(f"plot: {str(path)!r} must end in .png or .svg")
    if not any(timeline):
        raise ValueError(f"plot: there are no steps in a timeline of {len(timeline)} ranks")
    for rank, spans in enumerate(timeline):
        for span in spans:
            if not span.start <= span.end:
                raise ValueError(f"plot: rank {rank}: {span} ends before it starts")


def _draw(timeline, title):
    """The figure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(INCHES, ROW_INCHES * len(timeline) + 1.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    begin = min(span.start for spans in timeline for span in spans)
    end = max(span.end for spans in timeline for span in spans)
    points = (INCHES - 1) * POINTS_PER_INCH / ((end - begin) or 1)
    boxes = list(_boxes(timeline))
    _fill(axes, boxes, chunks=1 + max(op.chunk for op, *_ in boxes))
    for op, left, low, width, height in boxes:
        if width * points >= DIGIT_POINTS * len(str(op.microbatch)):
            axes.text(
                left + width / 2,
                low + height / 2,
                str(op.microbatch),
                size=FONT_POINTS,
                ha="center",
                va="center_baseline",
            )
    axes.set(xlabel="time", ylabel="rank", title=title, xlim=(begin, end))
    axes.set_ylim(len(timeline) - 0.5, -0.5)
    axes.set_yticks(range(len(timeline)))
    return figure


def _boxes(timeline):
    """Yields operation, left, lower edge, width and height of every box."""
    for rank, spans in enumerate(timeline):
        for step, start, end in spans:
            height = 0.9 / len(step)
            for i, op in enumerate(step):
                yield op, start, rank - 0.45 + i * height, end - start, height


def _fill(axes, boxes, chunks):
    """Paints boxes, and a legend of what is there."""
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Patch, Rectangle

    order = list(KINDS)
    found = sorted({(order.index(op.kind), op.chunk) for op, *_ in boxes})
    legend = []
    for index, chunk in found:
        kind = order[index]
        color = _color(kind, chunk, chunks)
        patches = [
            Rectangle((left, low), width, height)
            for op, left, low, width, height in boxes
            if (op.kind, op.chunk) == (kind, chunk)
        ]
        axes.add_collection(
            PatchCollection(patches, facecolor=color, edgecolor="white", linewidth=0.3)
        )
        label = KINDS[kind] if chunks == 1 else f"{KINDS[kind]}, chunk {chunk}"
        legend.append(Patch(color=color, label=label))
    axes.figure.legend(handles=legend, loc="outside lower center", ncols=4, fontsize=8)


def _color(kind, chunk, chunks):
    """A colour between those of the first and of the last chunk."""
    from matplotlib.colors import to_rgb

    part = chunk / max(chunks - 1, 1)
    first, last = (to_rgb(color) for color in COLORS[kind])
    return tuple(a + part * (b - a) for a, b in zip(first, last, strict=True))
