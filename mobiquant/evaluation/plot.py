"""The picture of an evaluation: quality against bits per weight, a panel for each text (matplotlib, no screen)."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mobiquant.evaluation.baselines import Baseline
from mobiquant.evaluation.evaluate import Row
from mobiquant.evaluation.report import Report, TextReport
from runtime.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS = (".svg", ".png")
_PANEL = (7.6, 5.2)  # inches


@dataclass(frozen=True)
class _Style:
    color: str
    marker: str
    line: str = "none"
    label: str = ""


# One hue for this model's ways to spend bits, quiet ones for what it is compared with. Only what can be had at any
# average is joined by a line.
_KINDS = {
    "routed": _Style("#1f5fbf", "o", "-", "routed by token"),
    "static": _Style("#3aa6d0", "^", "-", "static depth per linear"),
    "uniform": _Style("#0b2f66", "s", label="one depth for all"),
}
_METHODS = (_Style("#b3661a", "D"), _Style("#7d7d7d", "v"), _Style("#7a5aa6", "P"), _Style("#4f8a4f", "X"))
# Where a label may stand: offset from its point in typographic points, and the alignments that go with it.
_PLACES = (
    (6, 2, "left", "bottom"),
    (-6, -2, "right", "top"),
    (6, -2, "left", "top"),
    (-6, 2, "right", "bottom"),
    (0, 7, "center", "bottom"),
    (0, -7, "center", "top"),
)


def check_plot(path: Path) -> None:
    """Raise ValueError, before any long work, when a picture cannot be drawn to `path`."""
    if path.suffix not in FORMATS:
        raise ValueError(f"--plot: expected a name ending in {' or '.join(FORMATS)}, found {path.name}")
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot: matplotlib is not installed: pip install 'mobiquant[evaluate]'")


def draw(report: Report, path: Path) -> None:
    """Draw the texts of `report`, at least one, with their baselines, to an SVG or PNG file."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_PANEL[0] * len(report.texts), _PANEL[1]), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(report.texts), squeeze=False)[0]
    labels = [
        _draw_text(panel, text, Path(report.model).stem) for panel, text in zip(panels, report.texts, strict=True)
    ]
    figure.draw_without_rendering()  # fixes the axes, which the places of labels depend on
    for panel, points in zip(panels, labels, strict=True):
        _place_labels(panel, points)
    # The same figures give the same file: no date, no random ids.
    metadata = {"Date": None} if path.suffix == ".svg" else None
    with replacing(path) as temporary, matplotlib.rc_context({"svg.hashsalt": "mobiquant"}):
        figure.savefig(temporary, format=path.suffix[1:], dpi=150, metadata=metadata)


@dataclass(frozen=True)
class _Label:
    text: str
    x: float
    y: float
    color: str


def _draw_text(panel: Axes, text: TextReport, model: str) -> list[_Label]:
    """All points of one text; returns the labels, to be placed when the axes stand."""
    rows = text.result.rows
    diverges = all(row.score.kld is not None for row in rows)
    for kind, style in _KINDS.items():
        _draw_rows(panel, [row for row in rows if row.precision.kind == kind], style, diverges)
    labels: list[_Label] = []
    methods = dict.fromkeys(baseline.method for baseline in text.baselines)
    for method, style in zip(methods, cycle(_METHODS), strict=False):
        labels += _draw_method(panel, [point for point in text.baselines if point.method == method], style, diverges)
    if diverges:
        panel.set_yscale("log")
    panel.set_ylabel("KL divergence from full precision, nats per token" if diverges else "perplexity")
    panel.set_xlabel("bits per weight read, with scales, offsets and routers")
    panel.set_title(f"{model} on {text.file}", loc="left", fontsize=11)
    panel.margins(x=0.06, y=0.06)
    panel.grid(True, which="major", color="#e6e6e6", linewidth=0.8)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False, fontsize=9)
    return labels


def _draw_rows(panel: Axes, rows: Sequence[Row], style: _Style, diverges: bool) -> None:
    points = sorted((row.bits_per_weight, row.score.kld if diverges else row.score.ppl) for row in rows)
    if points:
        look = {"color": style.color, "marker": style.marker, "linestyle": style.line, "label": style.label}
        panel.plot(*zip(*points, strict=True), **look, linewidth=1.6, markersize=6.5, zorder=3)


def _draw_method(panel: Axes, points: Sequence[Baseline], style: _Style, diverges: bool) -> list[_Label]:
    values = [(point, point.kl if diverges else point.ppl) for point in points]
    # Full precision itself has no divergence, and no place on a logarithmic axis.
    shown = [(point, value) for point, value in values if value is not None and value > 0]
    if not shown:
        return []
    x, y = [point.bits_per_weight for point, _ in shown], [value for _, value in shown]
    panel.scatter(x, y, color=style.color, marker=style.marker, s=24, label=points[0].method, zorder=2)
    return [_Label(point.label, point.bits_per_weight, value, style.color) for point, value in shown]


def _place_labels(panel: Axes, labels: Sequence[_Label]) -> None:
    """Write each label where it covers least of what is there: points, lines, and the labels before it."""
    drawn = [panel.transData.transform(line.get_xydata()) for line in panel.lines]
    drawn += [panel.transData.transform(points.get_offsets()) for points in panel.collections]
    # Lines as points a few pixels apart.
    for line in drawn[: len(panel.lines)]:
        drawn += [np.linspace(start, end, 40) for start, end in pairwise(line)]
    taken, boxes = np.concatenate(drawn), []
    renderer = panel.figure.canvas.get_renderer()
    for label in labels:
        options = []
        for x, y, horizontal, vertical in _PLACES:
            note = panel.annotate(
                label.text,
                (label.x, label.y),
                xytext=(x, y),
                textcoords="offset points",
                ha=horizontal,
                va=vertical,
                color=label.color,
                fontsize=7.5,
            )
            box = note.get_window_extent(renderer)
            inside = (taken > (box.x0, box.y0)) & (taken < (box.x1, box.y1))
            covered = int(inside.all(1).sum()) + 10 * sum(box.overlaps(other) for other in boxes)
            options.append((covered + 10 * (box.x1 > panel.bbox.x1), note, box))
        best = min(options, key=lambda option: option[0])
        for option in options:
            if option is not best:
                option[1].remove()
        boxes.append(best[2])
