"""One slice of one linear in training: positions that are rounded to codes, and, for the base, scales and offsets.

A code is the cell that a real position falls into; the position of every weight starts where the original weight lies
and is trained through the rounding (straight-through). A slice that is done is frozen, and the next one starts from the
original weights again, moved to the nearest end of the cell that they were given. So the deeper slices undo what the
base had to move, and the depths do not compete: training them together costs full depth a hundred times its error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from mobiquant.slices import LEVELS, MIN_SCALE, SlicedWeight, join_groups, split_groups, storable_groups

# AdamW's largest step per slice: in cells of its depth for positions, relative to the scale for scales and offsets.
_RATES = (6e-3, 1e-2, 2e-2, 5e-2)
_SCALE_RATE = 5e-4
# The base's positions are drawn back to the original weights, so that even a steady gradient moves none of them further
# than this many cells: what lies outside its cell is missing at every depth. Residuals are held by the cell before.
_REACH = 0.9
# Share of a slice's steps in which the rate rises; then it falls to 0.
_WARMUP = 0.1


@dataclass
class Passing:
    """Tokens that a linear computes with its original weight while the base is trained, as if routed deeper.

    share: of the tokens; generator: draws them, on the device.
    """

    share: float = 0.0
    generator: torch.Generator | None = None


class TrainedSlice(nn.Module):
    """A linear that computes with the slice in training, or with its original weight when `original` is set.

    Positions and codes are [rows, groups, 128], scale and offset [rows, groups, 1]. A position is
    (w + offset) / scale · 4^(slice-1), so that its floor is the code of the slices up to that one. `range` holds, while
    the base is trained, log(scale) and offset in scales, both relative to the start.
    """

    def __init__(self, weight: Tensor, passing: Passing | None = None):
        super().__init__()
        self.weight = weight
        self.original = True
        self.slice = 0
        groups, self.scale, self.offset = storable_groups(weight)
        self.codes = torch.zeros_like(groups, dtype=torch.uint8)
        self.position = nn.Parameter(torch.empty(0))
        self.range = nn.Parameter(torch.empty(0))
        self._passing = passing or Passing()

    def begin(self, number: int) -> None:
        """Start to train slice `number`, with the slices before it frozen."""
        self.slice = number
        if number == 1:
            self.range = nn.Parameter(torch.zeros(2, *self.scale.shape, device=self.scale.device))
        self.position = nn.Parameter(self._start())

    def trained(self) -> dict[str, nn.Parameter]:
        """What the slice in training learns, by name."""
        return {"position": self.position} | ({"range": self.range} if self.slice == 1 else {})

    def forward(self, x: Tensor) -> Tensor:
        if self.original:
            return functional.linear(x, self.weight)
        scale, offset = self._stored_range()
        cell = self.position + (self._rounded() + 0.5 - self.position).detach()
        groups = scale * float(LEVELS) ** (1 - self.slice) * cell - offset
        y = functional.linear(x, join_groups(groups, self.weight.shape[1]))
        if self._passing.share == 0:
            return y
        drawn = torch.rand(*x.shape[:-1], 1, device=x.device, generator=self._passing.generator)
        return torch.where(drawn < self._passing.share, functional.linear(x, self.weight), y)

    @torch.no_grad()
    def draw_back(self, rate: float) -> None:
        """After a step of the base at `rate`: move its positions back towards the original weights."""
        self.position.lerp_(self._start(), rate / _REACH)

    @torch.no_grad()
    def freeze(self) -> None:
        codes = self._rounded().to(torch.uint8)
        if self.slice == 1:
            self.scale, self.offset = (value.detach() for value in self._stored_range())
        self.codes = codes
        self.position = nn.Parameter(torch.empty(0))
        self.range = nn.Parameter(torch.empty(0))

    def sliced(self) -> SlicedWeight:
        """The finished slices, on the CPU."""
        codes = join_groups(self.codes, self.weight.shape[1]).contiguous()
        scales, offsets = (values.squeeze(-1).to(torch.float16) for values in (self.scale, self.offset))
        return SlicedWeight(codes.cpu(), scales.cpu(), offsets.cpu())

    @torch.no_grad()
    def _start(self) -> Tensor:
        """Where the original weights lie, inside the cells that the finished slices chose."""
        scale, offset = self._stored_range()
        position = (split_groups(self.weight) + offset) / scale * float(LEVELS) ** (self.slice - 1)
        low = self.codes * float(LEVELS)
        return position.clamp(low, low + LEVELS)

    def _rounded(self) -> Tensor:
        """Codes of the slices up to the one in training, float32."""
        low = self.codes * float(LEVELS)
        return self.position.floor().clamp(low, low + (LEVELS - 1))

    def _stored_range(self) -> tuple[Tensor, Tensor]:
        """Scale and offset as the file will hold them, with a gradient while the base is trained."""
        if self.slice != 1:
            return self.scale, self.offset
        scale = (self.scale * torch.exp(self.range[0])).clamp_min(MIN_SCALE)
        return _rounded_to_half(scale), _rounded_to_half(self.offset + self.scale * self.range[1])


def slice_optimizer(layers: Mapping[str, TrainedSlice]) -> torch.optim.AdamW:
    """An optimizer of the slice that `layers` began; its groups are positions, then, for the base, ranges."""
    groups = [{"params": [layer.position for layer in layers.values()]}]
    if next(iter(layers.values())).slice == 1:
        groups.append({"params": [layer.range for layer in layers.values()]})
    # Gradients by positions are tiny, and smaller with every slice: epsilon must not hold them back.
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-15, weight_decay=0.0)


def train_slice(
    layers: Mapping[str, TrainedSlice],
    optimizer: torch.optim.Optimizer,
    steps: range,
    loss: Callable[[int], Tensor],
    after: Callable[[int], None],
) -> None:
    """Take the `steps`, counted from 0 to the slice's last, that are left of the slice that `layers` began; freeze it.

    loss(step): what a step lowers, a scalar; after(step): called when the step is taken.
    """
    number = next(iter(layers.values())).slice
    for step in steps:
        rise_and_fall = min(1.0, (step + 1) / (_WARMUP * steps.stop)) * (1 - step / steps.stop)
        rate = _RATES[number - 1] * rise_and_fall
        for group, largest in zip(optimizer.param_groups, (_RATES[number - 1], _SCALE_RATE), strict=False):
            group["lr"] = largest * rise_and_fall
        value = loss(step)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        if number == 1:
            for layer in layers.values():
                layer.draw_back(rate)
        after(step)
    for layer in layers.values():
        layer.freeze()


def _rounded_to_half(value: Tensor) -> Tensor:
    return value + (value.to(torch.float16).to(torch.float32) - value).detach()
