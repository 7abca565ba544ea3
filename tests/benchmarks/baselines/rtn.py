"""Round-to-nearest: every weight goes to the nearest level of its group's grid. No data is looked at."""

from __future__ import annotations

import torch
from torch import Tensor

from mobiquant.packing import GROUP_SIZE

from .grid import min_max_grid


def round_to_nearest(weight: Tensor, bits: int) -> Tensor:
    """float32 [rows, columns] -> the same, on the grid."""
    columns = torch.arange(weight.shape[1], device=weight.device)
    return min_max_grid(weight, bits).round(weight, columns // GROUP_SIZE)
