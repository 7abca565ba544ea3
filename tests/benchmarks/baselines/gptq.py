"""GPTQ (Frantar et al., arXiv 2210.17323): round column after column, each error made good by the columns still open.

The strong common form: the columns with the largest inputs first ("act-order"), on grids fixed beforehand ("static
groups"), block after block and linear after linear on inputs that the quantised part of the model gives.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from mobiquant.checkpoint import ROUTER_POINTS, block_name
from mobiquant.packing import GROUP_SIZE
from mobiquant.sensitivity import position_embeddings
from mobiquant.source import Source

from .grid import min_max_grid

_DAMPING = 0.01
# Columns whose errors are carried to the rest of the matrix in one product.
_LAZY_COLUMNS = 128


def gptq(weight: Tensor, second_moment: Tensor, bits: int) -> Tensor:
    """Weights float32 [rows, columns] on the grid, for small output error Σ_t ‖(W' - W)·x_t‖².

    second_moment: Σ_t x_t·x_tᵀ up to a factor, float64 [columns, columns]; half the Hessian of that error by a row.
    """
    grid = min_max_grid(weight, bits)
    order = torch.argsort(second_moment.diagonal(), descending=True)
    factor = _inverse_factor(second_moment[order][:, order]).float()
    group = order // GROUP_SIZE
    open_weight = weight[:, order].clone()
    result = torch.empty_like(open_weight)
    columns = weight.shape[1]
    for start in range(0, columns, _LAZY_COLUMNS):
        end = min(start + _LAZY_COLUMNS, columns)
        errors = torch.empty(len(weight), end - start, device=weight.device)
        for column in range(start, end):
            before = open_weight[:, column : column + 1]
            rounded = grid.round(before, group[column : column + 1])
            result[:, column : column + 1] = rounded
            error = (before - rounded) / factor[column, column]
            errors[:, column - start : column - start + 1] = error
            open_weight[:, column + 1 : end] -= error * factor[column, column + 1 : end]
        open_weight[:, end:] -= errors @ factor[start:end, end:]
    return result[:, torch.argsort(order)]


def _inverse_factor(second_moment: Tensor) -> Tensor:
    """Upper triangular U with UᵀU the inverse of the damped matrix: row k of U holds, up to a factor, what an error in
    column k asks of the columns after it when those before are fixed."""
    damped = second_moment.clone()
    # An input that is always 0 asks nothing and must not make the matrix singular.
    damped.diagonal()[damped.diagonal() == 0] = 1
    damped.diagonal().add_(_DAMPING * damped.diagonal().mean())
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)


@torch.no_grad()
def gptq_weights(source: Source, windows: np.ndarray, bits: int, device: str) -> dict[str, Tensor]:
    """All block linears by module name, on the CPU, calibrated on `windows` int64 [n, seq_len], begin-of-text first."""
    positions = position_embeddings(source, windows.shape[1], torch.device(device))
    hidden = functional.embedding(torch.from_numpy(windows), source.embedding())
    weights = {}
    progress = tqdm(range(source.block_count), desc=f"GPTQ {bits}", unit="block")
    for index in progress:
        block = source.block(index, device)
        for names in ROUTER_POINTS.values():
            moment = _input_moment(block, names[0], hidden, positions)
            for name in names:
                linear = block.get_submodule(name)
                linear.weight.data = gptq(linear.weight, moment, bits)
                weights[block_name(index, name)] = linear.weight.detach().cpu()
        for window in hidden:
            window.copy_(block(window.to(device)[None], position_embeddings=positions)[0])
    return weights


class _Reached(Exception):
    """The input asked for is there; the rest of the block need not run."""


def _input_moment(block: nn.Module, name: str, hidden: Tensor, positions: tuple[Tensor, Tensor]) -> Tensor:
    """Mean of x·xᵀ over the inputs x of one linear, float64 [columns, columns]. hidden: [windows, seq_len, width]."""
    linear = block.get_submodule(name)
    columns, device = linear.weight.shape[1], linear.weight.device
    total = torch.zeros(columns, columns, dtype=torch.float64, device=device)

    def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].flatten(0, -2)
        total.add_(x.T @ x)
        raise _Reached

    hook = linear.register_forward_pre_hook(add)
    for window in hidden:
        try:
            block(window.to(device)[None], position_embeddings=positions)
        except _Reached:
            continue
    hook.remove()
    return total / (hidden.shape[0] * hidden.shape[1])
