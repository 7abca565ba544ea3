"""The picture of an evaluation: quality against bits per weight, a panel for each text. matplotlib, without a screen."""

from __future__ import annotations

import importlib.util
import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mobiquant.baselines import Baseline
from mobiquant.evaluate import Row
from mobiquant.report import Report, TextReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS = (".svg", ".png")
# One hue for this model's ways to spend bits, quiet ones for what it is compared with.
_OWN = {"routed": ("#1f5fbf", "o", "-"), "uniform": ("#0b2f66", "s", "--"), "static": ("#3aa6d0", "^", ":")}
_OWN_LABEL = {"routed": "routed by token", "uniform": "one depth for all", "static": "static depth per linear"}
_OTHERS = (("#b3661a", "D"), ("#8a8a8a", "v"), ("#7a5aa6", "P"), ("#4f8a4f", "X"))
_PANEL = (7.2, 5.0)  # inches


def check_plot(path: Path) -> None:
    """Raise ValueError, before any long work, when a picture cannot be drawn to `path`."""
    if path.suffix not in FORMATS:
        raise ValueError(f"--plot: expected a name ending in {' or '.join(FORMATS)}, found {path.name}")
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot: matplotlib is not installed: pip install 'mobiquant[evaluate]'")


def draw(report: Report, path: Path) -> None:
    """Draw the texts of `report` and their baselines to an SVG or PNG file. Raises ValueError without a text."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not report.texts:
        raise ValueError("--plot: expected the result on a text, found none: give --text")
    figure = Figure(figsize=(_PANEL[0] * len(report.texts), _PANEL[1]), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(report.texts), squeeze=False)[0]
    for panel, text in zip(panels, report.texts, strict=True):
        _draw_text(panel, text, Path(report.model).stem)
    temporary = path.with_name(f".{os.getpid()}.tmp.{path.name}")
    try:
        # Text stays text in an SVG; no date, so that the same figures give the same file.
        figure.savefig(temporary, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _draw_text(panel: Axes, text: TextReport, model: str) -> None:
    diverges = all(row.score.kld is not None for row in text.result.rows)
    methods = defaultdict(list)
    for baseline in text.baselines:
        methods[baseline.method].append(baseline)
    for (color, marker), (method, points) in zip(_cycle(len(methods)), methods.items(), strict=True):
        _draw_baselines(panel, method, points, color, marker, diverges)
    for kind, (color, marker, line) in _OWN.items():
        _draw_rows(panel, kind, text.result.rows, color, marker, line, diverges)
    if diverges:
        panel.set_yscale("log")
        panel.set_ylabel("KL divergence from full precision, nats per token")
    else:
        panel.set_ylabel("perplexity")
    panel.set_xlabel("bits per weight read (slices, scales, offsets, routers)")
    panel.set_title(f"{model} on {text.file}", loc="left", fontsize=11)
    panel.grid(True, which="major", color="#e3e3e3", linewidth=0.8)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False, fontsize=9)


def _draw_rows(panel: Axes, kind: str, rows: Sequence[Row], color: str, marker: str, line: str, diverges: bool) -> None:
    points = sorted(
        (row.bits_per_weight, row.score.kld if diverges else row.score.ppl)
        for row in rows
        if row.precision.kind == kind
    )
    if points:
        panel.plot(
            *zip(*points, strict=True),
            color=color,
            marker=marker,
            linestyle=line,
            linewidth=1.6,
            markersize=6.5,
            label=_OWN_LABEL[kind],
            zorder=3,
        )


def _draw_baselines(
    panel: Axes, method: str, points: Sequence[Baseline], color: str, marker: str, diverges: bool
) -> None:
    # Full precision itself has no divergence, and no place on a logarithmic axis.
    values = [(point, point.kl if diverges else point.ppl) for point in points]
    shown = [(point, value) for point, value in values if value is not None and (value > 0 or not diverges)]
    if not shown:
        return
    panel.scatter(
        [point.bits_per_weight for point, _ in shown],
        [value for _, value in shown],
        color=color,
        marker=marker,
        s=26,
        label=method,
        zorder=2,
    )
    for point, value in shown:
        panel.annotate(
            point.label,
            (point.bits_per_weight, value),
            xytext=(5, 4),
            textcoords="offset points",
            color=color,
            fontsize=7.5,
        )


def _cycle(count: int) -> list[tuple[str, str]]:
    return [_OTHERS[index % len(_OTHERS)] for index in range(count)]
