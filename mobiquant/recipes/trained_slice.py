"""One slice of many linears in training: positions that are rounded to codes, and, for the base, scales and offsets.

A code is the cell that a real position falls into; the position of every weight starts where the original weight lies
and is trained through the rounding (straight-through). A slice that is done is frozen, and the next one starts from the
original weights again, moved to the nearest end of the cell that they were given. So the deeper slices undo what the
base had to move, and the depths do not compete: training them together costs full depth a hundred times its error.

The groups of all linears lie in one tensor: a model has a hundred linears, and a step would be as many small launches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from mobiquant.slices import LEVELS, MIN_SCALE, SlicedWeight, join_groups, storable_groups

# AdamW's largest step per slice: in cells of its depth for positions, relative to the scale for scales and offsets. A
# deeper slice's gradients are mostly noise, and larger steps would scatter its positions over their cells.
_RATES = (6e-3, 1e-2, 1.2e-2, 1.5e-2)
_SCALE_RATE = 5e-4
# The base's positions are drawn back to the original weights, so that even a steady gradient moves none of them further
# than this many cells: what lies outside its cell is missing at every depth. Residuals are held by the cell before.
_REACH = 0.7
# Share of a slice's steps in which the rate rises; then it falls to 0.
_WARMUP = 0.1


@dataclass
class Passing:
    """Tokens that a linear computes with its original weight while the base is trained, as if routed deeper.

    share: of the tokens; generator: draws them, on the device.
    """

    share: float = 0.0
    generator: torch.Generator | None = None


class SliceTraining:
    """The linears whose slices are trained together, and the slice in training.

    layers: by name. Positions and codes are [all groups, 128], scale and offset [all groups, 1]. A position is
    (w + offset) / scale · 4^(slice-1), so that its floor is the code of the slices up to that one. `range` holds, while
    the base is trained, log(scale) and offset in scales, both relative to the start.
    """

    def __init__(self) -> None:
        self.layers: dict[str, TrainedLinear] = {}
        self.slice = 0
        self.passing = Passing()
        self._added: list[tuple[Tensor, Tensor, Tensor]] = []
        self._sizes: list[int] = []
        self._weights: list[Tensor] | None = None

    def add(self, name: str, weight: Tensor) -> TrainedLinear:
        """A linear in place of one with `weight`, float32 [rows, columns]; before the first `begin`.

        Raises ValueError on weights that cannot be sliced.
        """
        groups, scale, offset = storable_groups(weight.detach())
        self._added.append((groups.flatten(0, 1), scale.flatten(0, 1), offset.flatten(0, 1)))
        self._sizes.append(len(self._added[-1][0]))
        self.layers[name] = TrainedLinear(self, len(self.layers), weight)
        return self.layers[name]

    def begin(self, number: int) -> None:
        """Start to train slice `number`, with the slices before it frozen."""
        if self._added:
            self._gather()
        self.slice = number
        if number == 1:
            self.range = nn.Parameter(torch.zeros(2, *self.scale.shape, device=self.scale.device))
        self.position = nn.Parameter(self._start())

    def trained(self) -> dict[str, nn.Parameter]:
        """What the slice in training learns, by name."""
        return {"position": self.position} | ({"range": self.range} if self.slice == 1 else {})

    def frozen(self) -> dict[str, Tensor]:
        """What the finished slices are, by name."""
        return {"codes": self.codes, "scale": self.scale, "offset": self.offset}

    def restore(self, frozen: dict[str, Tensor]) -> None:
        """Take over the finished slices of an earlier run; before `begin`."""
        self._gather()
        for name, value in frozen.items():
            setattr(self, name, value.to(self.scale.device))

    def optimizer(self) -> torch.optim.AdamW:
        """For the slice that was begun; its groups are positions, then, for the base, ranges."""
        groups = [{"params": [parameter]} for parameter in self.trained().values()]
        # Gradients by positions are tiny, and smaller with every slice: epsilon must not hold them back.
        # Fused: else a step makes copies of all that it updates.
        fused = self.position.is_cuda
        return torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-15, weight_decay=0.0, fused=fused)

    def train(
        self,
        optimizer: torch.optim.Optimizer,
        steps: range,
        loss: Callable[[int], Tensor],
        after: Callable[[int], None],
    ) -> None:
        """Take the `steps`, counted from 0 to the slice's last, that are left of the slice that was begun; freeze it.

        loss(step): what a step lowers, a scalar; after(step): called when the step is taken.
        """
        largest = _RATES[self.slice - 1]
        for step in steps:
            rise_and_fall = min(1.0, (step + 1) / (_WARMUP * steps.stop)) * (1 - step / steps.stop)
            for group, rate in zip(optimizer.param_groups, (largest, _SCALE_RATE), strict=False):
                group["lr"] = rate * rise_and_fall
            value = loss(step)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            self._weights = None
            if self.slice == 1:
                self._draw_back(largest * rise_and_fall)
            after(step)
        self._freeze()

    def weight(self, index: int) -> Tensor:
        """Of the layer that was added as number `index`, at the slice in training: [rows, columns]; decoded for all
        layers at once in the first use after a step."""
        if self._weights is None:
            scale, offset = self._stored_range()
            groups = _DecodePosition.apply(self.position, scale, offset, self.codes, self.slice)
            device = groups.device.type
            if torch.is_autocast_enabled(device):
                groups = groups.to(torch.get_autocast_dtype(device))
            self._weights = list(groups.split(self._sizes))
        return self._weights[index]

    def sliced(self, name: str) -> SlicedWeight:
        """The finished slices of one layer, on the CPU."""
        layer = self.layers[name]
        rows, columns = layer.weight.shape
        codes, scale, offset = (values.split(self._sizes)[layer.index] for values in self.frozen().values())
        scales, offsets = (values.reshape(rows, -1).to(torch.float16).cpu() for values in (scale, offset))
        return SlicedWeight(join_groups(codes.reshape(rows, -1), columns).contiguous().cpu(), scales, offsets)

    def _gather(self) -> None:
        """Join what was added; the layers' original weights become views."""
        self._groups, self.scale, self.offset = (torch.cat(values) for values in zip(*self._added, strict=True))
        self._added = []
        for layer, groups in zip(self.layers.values(), self._groups.split(self._sizes), strict=True):
            rows, columns = layer.weight.shape
            layer.weight = join_groups(groups.reshape(rows, -1), columns)
        self.codes = torch.zeros_like(self._groups, dtype=torch.uint8)

    @torch.no_grad()
    def _draw_back(self, rate: float) -> None:
        """After a step of the base at `rate`: move its positions back towards the original weights."""
        self.position.lerp_(self._start(), rate / _REACH)

    @torch.no_grad()
    def _freeze(self) -> None:
        if self.slice == 1:
            self.scale, self.offset = (value.detach() for value in self._stored_range())
        self.codes = _cells(self.position, self.codes).to(torch.uint8)
        del self.position

    @torch.no_grad()
    def _start(self) -> Tensor:
        """Where the original weights lie, inside the cells that the finished slices chose."""
        scale, offset = self._stored_range()
        position = (self._groups + offset).div_(scale).mul_(float(LEVELS) ** (self.slice - 1))
        low = self.codes * float(LEVELS)
        return position.clamp_(low, low + LEVELS)

    def _stored_range(self) -> tuple[Tensor, Tensor]:
        """Scale and offset as the file will hold them, with a gradient while the base is trained."""
        if self.slice != 1:
            return self.scale, self.offset
        scale = (self.scale * torch.exp(self.range[0])).clamp_min(MIN_SCALE)
        return _rounded_to_half(scale), _rounded_to_half(self.offset + self.scale * self.range[1])


class TrainedLinear(nn.Module):
    """A linear that computes with the slice in training, or with its original weight when `original` is set."""

    def __init__(self, training: SliceTraining, index: int, weight: Tensor):
        super().__init__()
        self.weight, self.index = weight.detach(), index
        self.original = True
        self._training = training

    def forward(self, x: Tensor) -> Tensor:
        if self.original:
            return functional.linear(x, self.weight)
        rows, columns = self.weight.shape
        y = functional.linear(x, join_groups(self._training.weight(self.index).reshape(rows, -1), columns))
        passing = self._training.passing
        if passing.share == 0:
            return y
        drawn = torch.rand(*x.shape[:-1], 1, device=x.device, generator=passing.generator)
        return torch.where(drawn < passing.share, functional.linear(x, self.weight), y)


class _DecodePosition(torch.autograd.Function):
    """Weights of the cells that positions fall into; for the gradient, position and cell centre are the same."""

    @staticmethod
    def forward(ctx, position: Tensor, scale: Tensor, offset: Tensor, codes: Tensor, number: int) -> Tensor:  # type: ignore[override]
        cells = _cells(position, codes)
        step = scale * float(LEVELS) ** (1 - number)
        ctx.save_for_backward(cells.to(torch.uint8), step)
        ctx.number = number
        return cells.add_(0.5).mul_(step).sub_(offset)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        cells, step = ctx.saved_tensors
        by_scale = by_offset = None
        if ctx.needs_input_grad[1]:
            by_scale = ((cells + 0.5) * grad).sum(-1, keepdim=True) * float(LEVELS) ** (1 - ctx.number)
            by_offset = -grad.sum(-1, keepdim=True)
        return grad * step, by_scale, by_offset, None, None


def _cells(position: Tensor, codes: Tensor) -> Tensor:
    """Codes of the slices up to the one in training, float32. codes: of the slices before."""
    low = codes * float(LEVELS)
    return position.detach().floor().clamp_(low, low + (LEVELS - 1))


def _rounded_to_half(value: Tensor) -> Tensor:
    return value + (value.to(torch.float16).to(torch.float32) - value).detach()
