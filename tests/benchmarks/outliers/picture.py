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
_WIDTH, _HEIGHT = 9.6, 5.4
_FONT_SIZE = 9
# Of DejaVu Sans Mono, which comes with matplotlib, as a share of the font size; 72 points an inch.
_CHARACTER_WIDTH = 0.602 * _FONT_SIZE / 72
_LABEL_CHARACTERS = 8
_PASSAGE_CHARACTERS = 106
_PROSE = re.compile(r"[A-Za-z ,.;:!?'\"-]+")


def draw(measured: Measured, pieces: list[str], path: Path) -> None:
    """Write the figure to `path`; its suffix decides the format. pieces: the decoded tokens."""
    # Fixed names inside the file: the same numbers give the same bytes.
    with mpl.rc_context({"svg.hashsalt": "outliers", "font.size": _FONT_SIZE, "axes.titlesize": 9.5}):
        figure = Figure(figsize=(_WIDTH, _HEIGHT), layout="constrained")
        upper, lower = figure.subfigures(2, 1, height_ratios=[3.1, 1.9])
        overlap, routing = upper.subfigures(1, 2, width_ratios=[1.2, 1])
        left, right = overlap.subplots(1, 2, sharey=True)
        _draw_overlap(left, linear_shares_kept(measured).mean(0), "by a linear's error (mean)")
        prediction = shares_kept(measured.divergence, measured.control_divergence)
        _draw_overlap(right, prediction, "by the model's divergence")
        left.set_ylabel("bits per weight")
        overlap.suptitle("Outlier tokens that two precisions share, %", weight="bold", fontsize=9.5)
        overlap.supxlabel("bits per weight\nframed: the same precision, rounded another way", fontsize=_FONT_SIZE)
        _draw_routing(routing.subplots(), measured)
        _draw_passage(lower.add_axes((0.01, 0.0, 0.98, 0.84)), measured, pieces)
        figure.savefig(path, dpi=110, metadata={"Date": None} if path.suffix == ".svg" else None)


def _draw_overlap(axes: Axes, kept: np.ndarray, title: str) -> None:
    percent = 100 * kept
    axes.imshow(percent, cmap="Blues", vmin=0, vmax=100)
    for row, values in enumerate(percent):
        for column, value in enumerate(values):
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", color="white" if value > 60 else "black")
        axes.add_patch(Rectangle((row - 0.46, row - 0.46), 0.92, 0.92, fill=False, edgecolor="#D55E00", linewidth=1.5))
    axes.set_xticks(range(len(_BITS)), _BITS)
    axes.set_yticks(range(len(_BITS)), _BITS)
    axes.set_title(title)


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
    # One unit is one character, so that boxes stand where the characters are.
    axes.set_xlim(-_LABEL_CHARACTERS, 0.98 * _WIDTH / _CHARACTER_WIDTH - _LABEL_CHARACTERS)
    axes.set_ylim(len(DEPTHS) - 0.4, -0.6)
    axes.axis("off")
    for row, colour in enumerate(_DEPTH_COLOURS):
        axes.text(-1.5, row, f"{_BITS[row]} bits", ha="right", va="center", color=colour, weight="bold")
        column = 0
        for piece, marked in zip(pieces[first:last], mask[row, first:last], strict=True):
            if marked:
                box = (column, row - 0.42), len(piece), 0.84
                axes.add_patch(Rectangle(*box, color=colour, alpha=0.45, linewidth=0))
            word = piece.strip()
            start = column + piece.index(word)
            axes.text(start, row, word, ha="left", va="center_baseline", family="DejaVu Sans Mono")
            column += len(piece)
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
