"""The grid of both baselines: 2^bits evenly spaced levels from the least to the greatest weight of a group of 128.

One float16 scale and one float16 offset a group, as in the nested file: 0.25 bit per weight.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from mobiquant.packing import groups_of
from mobiquant.slices import MIN_SCALE, split_groups

_GROUP_BITS = 32


@dataclass(frozen=True)
class Grid:
    """Levels scale·q - offset, q = 0 .. 2^bits - 1. scale, offset: the stored values in float32, [rows, groups]."""

    bits: int
    scale: Tensor
    offset: Tensor

    def round(self, weight: Tensor, group: Tensor) -> Tensor:
        """The nearest level of every weight. weight: float32 [rows, n]; group: the group of each column, int [n]."""
        scale, offset = self.scale[:, group], self.offset[:, group]
        return scale * torch.round((weight + offset) / scale).clamp(0, 2**self.bits - 1) - offset


def min_max_grid(weight: Tensor, bits: int) -> Grid:
    """The grid that covers every group of `weight`, float32 [rows, columns], from end to end."""
    groups = split_groups(weight)
    low, high = groups.amin(-1), groups.amax(-1)
    scale = ((high - low) / (2**bits - 1)).clamp_min(MIN_SCALE)
    return Grid(bits, scale.half().float(), (-low).half().float())


def bits_per_weight(shapes: Iterable[tuple[int, int]], bits: int) -> float:
    """Codes, scales and offsets of linears of these (rows, columns), divided by their weights."""
    shapes = list(shapes)
    total = sum(rows * (columns * bits + groups_of(columns) * _GROUP_BITS) for rows, columns in shapes)
    return total / sum(rows * columns for rows, columns in shapes)
