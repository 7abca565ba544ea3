"""Linear layer and embedding on slices in torch: the definition that the C kernels are compared with.

The precision in use is shared by all layers of a model through one `Precision`, which also records the depths read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mobiquant.activations import Activations, quantize_activations
from mobiquant.arithmetic import fma
from mobiquant.packing import GROUP_SIZE, SLICE_BITS, SLICE_COUNT
from mobiquant.router import Router
from mobiquant.slices import SlicedWeight, split_groups, unslice_weight


@dataclass
class Precision:
    """How many slices the routed linears read: `depth` for every token, one for all or one per block and linear; when
    it is None, what the routers give at `average_bits`. budgets: the average bits of the threshold tables. recorded:
    per block and linear the depths of the last forward pass, uint8 [tokens]. exact: products in the runtime's order of
    sums; without it one matrix product, much faster, and equal to rounding. kept: matrices of products that are not
    exact, while `keeping`."""

    budgets: tuple[float, ...]
    depth: int | Mapping[tuple[int, int], int] | None = SLICE_COUNT
    average_bits: float = float(SLICE_BITS * SLICE_COUNT)
    recorded: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    exact: bool = True
    kept: dict[tuple[tuple[int, int], int], Tensor] | None = None

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Make the matrix of a linear at a depth once, for a block that runs many times: 4 bytes a weight and depth."""
        self.kept = {}
        try:
            yield
        finally:
            self.kept = None


class SliceLinear(nn.Module):
    """y = W(depth)·x on int8 activations, one depth for all tokens. float32 [..., columns] -> [..., rows].

    Buffers: codes uint8 [rows, columns], scales and offsets float16 [rows, groups].
    """

    def __init__(self, sliced: SlicedWeight, depth: int = SLICE_COUNT):
        super().__init__()
        self.rows, self.columns = sliced.codes.shape
        self.depth = depth
        self.register_buffer("codes", sliced.codes)
        self.register_buffer("scales", sliced.scales)
        self.register_buffer("offsets", sliced.offsets)

    def sliced(self) -> SlicedWeight:
        return SlicedWeight(self.codes, self.scales, self.offsets)

    def forward(self, x: Tensor) -> Tensor:
        activations = quantize_activations(x.reshape(-1, self.columns))
        return self.multiply(activations, self.depth).reshape(*x.shape[:-1], self.rows)

    def multiply(self, x: Activations, depth: int) -> Tensor:
        """float32 [tokens, rows]: Σ_g scale_g·s_D·(Q_D·q)_g + (s_D/2 - o)·scale_g·(Σq)_g, groups in ascending order."""
        top = torch.bitwise_right_shift(split_groups(self.codes), SLICE_BITS * (SLICE_COUNT - depth)).float()
        step = self.scales.float() * 0.25 ** (depth - 1)
        base = 0.5 * step - self.offsets.float()
        sums = x.scales * x.codes.sum(-1)
        result = torch.zeros(len(x.codes), self.rows, device=x.codes.device)
        for group in range(x.codes.shape[1]):
            dots = x.codes[:, group] @ top[:, group].T
            result = fma(x.scales[:, group, None] * step[:, group], dots, result)
            result = fma(base[:, group], sums[:, group, None], result)
        return result


class RoutedLinear(SliceLinear):
    """A linear of a block, whose depth the shared `Precision` decides: one for all tokens, or a router's per token.

    place: (block, index in LINEARS); head: the linear's place among those of its router.
    """

    def __init__(self, sliced: SlicedWeight, router: Router, head: int, precision: Precision, place: tuple[int, int]):
        super().__init__(sliced)
        # A tuple keeps the router out of this module's children: it belongs to the block.
        self._routing = (router, head)
        self._precision = precision
        self._place = place

    def forward(self, x: Tensor) -> Tensor:
        activations = quantize_activations(x.reshape(-1, self.columns))
        depths = self._depths(activations)
        self._precision.recorded[self._place] = depths
        found, counts = (values.tolist() for values in depths.unique(return_counts=True))
        if len(found) == 1:
            result = self._product(activations, found[0])
        else:  # gathered by depth and back: to scatter rows in a fixed order takes a GPU a sort of all that is in them
            order = torch.argsort(depths, stable=True)
            parts = zip(order.split(counts), found, strict=True)
            products = [self._product(activations.select(tokens), depth) for tokens, depth in parts]
            result = torch.cat(products)[torch.argsort(order)]
        return result.reshape(*x.shape[:-1], self.rows)

    def _product(self, x: Activations, depth: int) -> Tensor:
        return self.multiply(x, depth) if self._precision.exact else x.dequantized() @ self._matrix(depth).T

    def _matrix(self, depth: int) -> Tensor:
        kept, key = self._precision.kept, (self._place, depth)
        if kept is None:
            return unslice_weight(self.sliced(), depth)
        if key not in kept:
            kept[key] = unslice_weight(self.sliced(), depth)
        return kept[key]

    def _depths(self, x: Activations) -> Tensor:
        precision = self._precision
        if precision.depth is not None:
            depth = precision.depth if isinstance(precision.depth, int) else precision.depth[self._place]
            return torch.full((len(x.codes),), depth, dtype=torch.uint8, device=x.codes.device)
        router, head = self._routing
        return router.depths(x, precision.average_bits, precision.budgets, precision.exact)[:, head]


class SliceEmbedding(nn.Module):
    """Rows of a sliced table at one depth, times `scale`: token ids int [...] -> float32 [..., columns]."""

    def __init__(self, sliced: SlicedWeight, depth: int, scale: float = 1.0):
        super().__init__()
        self.columns = sliced.codes.shape[1]
        self.depth = depth
        self.scale = scale
        self.register_buffer("codes", sliced.codes)
        self.register_buffer("scales", sliced.scales)
        self.register_buffer("offsets", sliced.offsets)

    def forward(self, token_ids: Tensor) -> Tensor:
        scale = self.scales[token_ids].float().repeat_interleave(GROUP_SIZE, dim=-1)[..., : self.columns]
        offset = self.offsets[token_ids].float().repeat_interleave(GROUP_SIZE, dim=-1)[..., : self.columns]
        top = torch.bitwise_right_shift(self.codes[token_ids], SLICE_BITS * (SLICE_COUNT - self.depth)).float()
        return fma(scale * 0.25 ** (self.depth - 1), top + 0.5, -offset) * self.scale
