"""int8 activations in torch: the rule of docs/format.md, section Activations, that every kernel follows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from mobiquant.arithmetic import QUANTIZE_MAX, QUANTIZE_MIN, fma, square_root
from mobiquant.packing import GROUP_SIZE, groups_of


@dataclass(frozen=True)
class Activations:
    """Quantised inputs of one linear: codes float32 [tokens, groups, 128] with whole values in -127..127, scales
    float32 [tokens, groups], columns: true length of a token's vector.

    The codes stay float32 because products of codes and sums of 128 of them are exact there.
    """

    codes: Tensor
    scales: Tensor
    columns: int

    def dequantized(self) -> Tensor:
        """float32 [tokens, columns]."""
        return (self.codes * self.scales.unsqueeze(-1)).flatten(1)[:, : self.columns]

    def root_mean_square(self) -> Tensor:
        """sqrt(Σ x² / columns + 1e-12) of the dequantised values, float32 [tokens]; groups in ascending order."""
        squares, scales = self.codes.square().sum(-1), self.scales.square()
        total = torch.zeros_like(scales[:, 0])
        for group in range(scales.shape[1]):
            total = fma(scales[:, group], squares[:, group], total)
        return square_root(total / self.columns + 1e-12)

    def select(self, tokens: Tensor) -> Activations:
        """The tokens of numbers `tokens`, int64 [n]."""
        return Activations(self.codes[tokens], self.scales[tokens], self.columns)


def quantize_activations(x: Tensor) -> Activations:
    """Quantise float32 [tokens, columns] per token and group of 128."""
    columns = x.shape[1]
    x = functional.pad(x, (0, groups_of(columns) * GROUP_SIZE - columns)).unflatten(1, (-1, GROUP_SIZE))
    largest = x.abs().amax(-1)
    used = largest >= QUANTIZE_MIN
    # A tensor over a tensor: torch takes number / tensor as a product with the reciprocal, which rounds twice.
    inverse = torch.where(used, largest.new_tensor(QUANTIZE_MAX) / torch.where(used, largest, 1.0), 0.0)
    scales = torch.where(used, largest / QUANTIZE_MAX, 0.0)
    return Activations(torch.round(x * inverse.unsqueeze(-1)), scales, columns)
