"""Text coloured by the bits it read: in the terminal, and as a histogram. runtime.page makes files of these colours."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TextIO

import numpy as np

LOWEST, HIGHEST, STEP = 2.0, 8.0, 0.5

# One colour for every half bit from 2 to 8, cold to hot: its number among the 256 of a terminal, and the same in hex.
TERMINAL_COLOURS = (33, 39, 45, 50, 48, 83, 119, 155, 191, 221, 215, 209, 203)
PAGE_COLOURS = (
    "#9cc4ff",
    "#a3d8ff",
    "#a6ecf7",
    "#a8f0da",
    "#aef2c0",
    "#bdf2a6",
    "#d0f294",
    "#e4f08a",
    "#f7ea86",
    "#ffdc82",
    "#ffc57f",
    "#ffab80",
    "#ff8f87",
)
_BAR = 40


def level(bits: float) -> int:
    """Index of the colour for `bits`: half-bit bins whose centres are 2, 2.5, ... 8."""
    return min(max(round((bits - LOWEST) / STEP), 0), len(PAGE_COLOURS) - 1)


def wants_colour(stream: TextIO) -> bool:
    """Whether `stream` is a terminal that may be coloured (https://no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def coloured(text: str, bits: float) -> str:
    """`text` in its colour for a terminal; the colour ends at every line end."""
    start = f"\033[38;5;{TERMINAL_COLOURS[level(bits)]}m"
    return "\n".join(f"{start}{line}\033[0m" if line else "" for line in text.split("\n"))


def histogram(bits: Sequence[float], *, colour: bool) -> str:
    """How many tokens read how many bits: one line per half bit between the least and the most."""
    counts = np.bincount([level(value) for value in bits], minlength=len(PAGE_COLOURS))
    present = np.flatnonzero(counts)
    lines = ["bits  tokens"]
    for index in range(present[0], present[-1] + 1) if len(present) else ():
        bar = "█" * round(_BAR * counts[index] / counts.max())
        centre = LOWEST + STEP * index
        lines.append(f"{centre:4.1f}  {counts[index]:6d}  {coloured(bar, centre) if colour else bar}".rstrip())
    return "\n".join(lines)
