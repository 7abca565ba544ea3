"""The picture of docs/outliers.md: how outlier sets overlap, what routers do, and a line of text with its outliers."""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from .analysis import DECILES, OUTLIER_SHARE, by_decile, linear_shares_kept, mean_bits, outliers, shares_kept
from .measure import BUDGETS, DEPTHS, Measured

_BITS = [f"{2 * depth}" for depth in DEPTHS]
# Okabe and Ito's colours, told apart by the colour-blind; one for each depth.
_DEPTH_COLOURS = ("#D55E00", "#E69F00", "#0072B2", "#009E73")
_BUDGET_STYLES = (("#56B4E9", "s"), ("#CC79A7", "o"), ("#000000", "^"))
_PASSAGE_CHARACTERS = 92
_PROSE = re.compile(r"[A-Za-z ,.;:!?'\"-]+")


def draw(measured: Measured, pieces: list[str], path: Path) -> None:
    """Write the figure to `path`; its suffix decides the format. pieces: the decoded tokens."""
    # Fixed names inside the file: the same numbers give the same bytes.
    with mpl.rc_context({"svg.hashsalt": "outliers", "font.size": 9, "axes.titlesize": 9.5}):
        figure = Figure(figsize=(9.6, 5.4), layout="constrained")
        upper, lower = figure.subfigures(2, 1, height_ratios=[3.1, 1.9])
        left, middle, right = upper.subplots(1, 3, gridspec_kw={"width_ratios": [1, 1, 1.55]})
        _draw_overlap(left, linear_shares_kept(measured).mean(0), "by a linear's error (mean)")
        prediction = shares_kept(measured.divergence, measured.control_divergence)
        _draw_overlap(middle, prediction, "by the model's divergence")
        upper.text(0.01, 0.985, "Outlier tokens that two precisions share, %", ha="left", va="top", weight="bold")
        upper.text(0.01, 0.925, "diagonal: the same precision rounded another way", ha="left", va="top")
        _draw_routing(right, measured)
        _draw_passage(lower.subplots(), measured, pieces)
        figure.savefig(path, dpi=110, metadata={"Date": None} if path.suffix == ".svg" else None)


def _draw_overlap(axes: Axes, kept: np.ndarray, title: str) -> None:
    percent = 100 * kept
    axes.imshow(percent, cmap="cividis", vmin=0, vmax=100)
    for row, values in enumerate(percent):
        for column, value in enumerate(values):
            colour = "black" if value > 55 else "white"
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", color=colour)
    axes.set_xticks(range(len(_BITS)), _BITS)
    axes.set_yticks(range(len(_BITS)), _BITS)
    axes.set_xlabel("bits per weight")
    axes.set_title("\n\n" + title)


def _draw_routing(axes: Axes, measured: Measured) -> None:
    tenths = np.arange(1, DECILES + 1)
    order = measured.cost[:, 0].sum(0)
    for budget, given, (colour, marker) in zip(BUDGETS, mean_bits(measured), _BUDGET_STYLES, strict=True):
        axes.plot(tenths, by_decile(given, order), color=colour, marker=marker, markersize=4)
        axes.axhline(given.mean(), color=colour, linestyle=":", linewidth=1)
        axes.annotate(f"asked {budget}", (1, given.mean()), (0, 3), textcoords="offset points", color=colour)
    axes.set_xticks(tenths)
    axes.set_xlabel("tenth of the tokens, by expected cost of 2 bits")
    axes.set_ylabel("bits per weight given")
    axes.set_title("What the routers give\n(dotted: the same bits to all)", weight="bold")
    axes.spines[["top", "right"]].set_visible(False)


def _draw_passage(axes: Axes, measured: Measured, pieces: list[str]) -> None:
    """A line of the text once for every depth, the tokens boxed after which the prediction is an outlier there."""
    mask = outliers(measured.divergence)
    first, last = _liveliest(mask, pieces)
    axes.set_xlim(-7, _PASSAGE_CHARACTERS + 1)
    axes.set_ylim(len(DEPTHS) - 0.4, -0.6)
    axes.axis("off")
    for row, colour in enumerate(_DEPTH_COLOURS):
        axes.text(-1.5, row, f"{_BITS[row]} bits", ha="right", va="center", color=colour, weight="bold")
        column = 0
        for place in range(first, last):
            for character in pieces[place]:
                axes.text(column + 0.5, row, character, ha="center", va="center", family="monospace")
                column += 1
            if mask[row, place]:
                width = len(pieces[place])
                box = Rectangle((column - width, row - 0.42), width, 0.84, color=colour, alpha=0.45, linewidth=0)
                axes.add_patch(box)
    share = f"{100 * OUTLIER_SHARE:.0f} %"
    axes.set_title(f"One line of the text: after a marked token the prediction suffers most ({share})", weight="bold")


def _liveliest(mask: np.ndarray, pieces: list[str]) -> tuple[int, int]:
    """The stretch of tokens of at most _PASSAGE_CHARACTERS characters of prose with the most outliers that are not
    outliers at every depth, every depth counted up to three."""
    best, chosen = -1.0, (0, 1)
    lengths = [len(piece) if _PROSE.fullmatch(piece) else _PASSAGE_CHARACTERS + 1 for piece in pieces]
    changing = mask & ~mask.all(0)
    last, used = 0, 0
    for first in range(len(pieces)):
        if last < first:
            last, used = first, 0
        while last < len(pieces) and used + lengths[last] <= _PASSAGE_CHARACTERS:
            used += lengths[last]
            last += 1
        value = float(np.minimum(changing[:, first:last].sum(-1), 3).sum() + 0.5 * mask[:, first:last].all(0).sum())
        if value > best and last > first:
            best, chosen = value, (first, last)
        if last > first:
            used -= lengths[first]
    return chosen
