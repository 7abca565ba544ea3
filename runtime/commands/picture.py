"""Text coloured by the bits it read: in the terminal, and as a histogram. page.py makes files of these colours."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TextIO

import numpy as np

from runtime.budget import Budget

# From few bits to many, cold to hot: numbers among the 256 colours of a terminal, and the like for a page.
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


@dataclass(frozen=True)
class Scale:
    """Which bits a colour stands for: the first for `lowest`, each next for `step` more; the rest is clipped."""

    lowest: float = 2.0
    step: float = 0.5

    @classmethod
    def of(cls, budget: Budget) -> Scale:
        """From 2 to 8 bits; for a routed budget the 2 bits around it, as tokens' averages stay near."""
        return cls(min(max(budget.bits - 1, 2.0), 6.0), 1 / 6) if budget.routed else cls()

    def level(self, bits: float) -> int:
        """Index of the colour for `bits`."""
        return min(max(round((bits - self.lowest) / self.step), 0), len(PAGE_COLOURS) - 1)

    def centre(self, level: int) -> float:
        """The bits a colour stands for."""
        return self.lowest + self.step * level


def wants_colour(stream: TextIO) -> bool:
    """Whether `stream` is a terminal that may be coloured (https://no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def coloured(text: str, bits: float, scale: Scale) -> str:
    """`text` in its colour for a terminal; the colour ends at every line end."""
    start = f"\033[38;5;{TERMINAL_COLOURS[scale.level(bits)]}m"
    return "\n".join(f"{start}{line}\033[0m" if line else "" for line in text.split("\n"))


def histogram(bits: Sequence[float], scale: Scale, *, colour: bool) -> str:
    """How many tokens read how many bits: one line per colour between the least and the most."""
    counts = np.bincount([scale.level(value) for value in bits], minlength=len(PAGE_COLOURS))
    present = np.flatnonzero(counts)
    lines = [" bits  tokens"]
    for level in range(present[0], present[-1] + 1) if len(present) else ():
        bar, centre = "█" * round(_BAR * counts[level] / counts.max()), scale.centre(level)
        lines.append(f"{centre:5.2f}  {counts[level]:6d}  {coloured(bar, centre, scale) if colour else bar}".rstrip())
    return "\n".join(lines)
