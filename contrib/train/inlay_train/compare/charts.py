"""The pictures of a comparison, as PNG; drawn without a display."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from inlay_train.compare.engine import Row
from inlay_train.compare.table import brief, is_share

# Okabe and Ito's colours, told apart by colour-blind readers too; then the same again with another mark.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKS = ("o", "s", "^", "D", "v", "P", "X")
LEGEND = 44  # characters
SMOOTH = 0.1  # of the steps: how many a point of a loss curve averages


def draw(rows: Sequence[Row], machine: str) -> dict[str, bytes]:
    """Return the pictures by file name."""
    return {
        "share.png": share(rows, machine),
        "time.png": time(rows, machine),
        "curves.png": curves(rows, machine),
    }


def save(pictures: dict[str, bytes], folder: Path) -> None:
    for name, content in pictures.items():
        (folder / name).write_bytes(content)


def share(rows: Sequence[Row], machine: str) -> bytes:
    """Draw each stack's metric over the share of the model that it trains."""
    figure, axes = _scatter(rows, lambda row: 100 * row.share)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g} %"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("trainable parameters, share of the model (logarithmic)")
    return _png(figure, axes, rows, machine)


def time(rows: Sequence[Row], machine: str) -> bytes:
    """Draw each stack's metric over the time its training took."""
    figure, axes = _scatter(rows, lambda row: row.seconds)
    axes.set_xlim(left=0)
    axes.set_xlabel("training time, seconds")
    return _png(figure, axes, rows, machine)


def curves(rows: Sequence[Row], machine: str) -> bytes:
    """Draw each stack's training loss over the steps, smoothed, the mean of its seeds."""
    figure, axes = _figure()
    for number, row in enumerate(rows):
        if row.losses:
            steps, losses = zip(*smoothed(row.losses), strict=True)
            axes.plot(
                steps, losses, color=_colour(number), label=row.stack,
                marker=MARKS[number % len(MARKS)], markevery=max(1, len(steps) // 6),
            )  # fmt: skip
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("step")
    axes.set_ylabel("training loss")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.tick_params(axis="y", which="minor", labelsize=7)
    axes.set_title("learning curves: training loss, averaged over a tenth of the steps")
    return _png(figure, axes, rows, machine)


def smoothed(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return at each step the mean of the values up to it, over a tenth of all steps."""
    width = max(1, round(SMOOTH * len(points)))
    result = []
    for end in range(width, len(points) + 1):
        window = [value for _, value in points[end - width : end]]
        result.append((points[end - 1][0], sum(window) / width))
    return result


def _scatter(rows: Sequence[Row], across: Callable[[Row], float]) -> tuple[Figure, Axes]:
    figure, axes = _figure()
    factor = 100 if is_share(rows[0].metric) else 1
    for number, row in enumerate(rows):
        axes.errorbar(
            across(row), factor * row.mean, yerr=None if row.spread is None else factor * row.spread,
            fmt=MARKS[number % len(MARKS)], color=_colour(number), markersize=8, capsize=4, label=row.stack,
        )  # fmt: skip
    axes.set_ylabel(_metric(rows))
    return figure, axes


def _figure() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(9.6, 5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.grid(alpha=0.3)
    return figure, axes


def _png(figure: Figure, axes: Axes, rows: Sequence[Row], machine: str) -> bytes:
    handles, labels = axes.get_legend_handles_labels()
    seeds = max(len(row.values) for row in rows)
    if handles:
        figure.legend(handles, brief(labels, LEGEND), loc="outside right upper", fontsize=9,
                      title=f"{seeds} seed{'s' if seeds > 1 else ''}")  # fmt: skip
    figure.supxlabel(machine, fontsize=7, color="#555555")
    buffer = BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _metric(rows: Sequence[Row]) -> str:
    unit = ", %" if is_share(rows[0].metric) else ""
    spread = " (bars: standard deviation over seeds)" if any(row.spread is not None for row in rows) else ""
    return f"{rows[0].metric}{unit}{spread}"
