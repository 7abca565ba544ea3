"""MoBiSlice in torch: scales and offsets from learned clipping, weights to nested 8-bit codes and back.

The maths of the paper's section 3.1 (arXiv 2602.20191). A group is 128 consecutive weights of one row, with one scale s
and one offset o = s·z. Reading the first D slices of a code Q gives

    W(D) = s·4^(1-D)·(floor(Q / 4^(4-D)) + 1/2) - o

Everything here works on weights split into groups, [rows, groups, 128], the last group padded; `split_groups` and
`join_groups` go between that form and [rows, columns]. Scales and offsets have shape [rows, groups, 1].
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from mobiquant.packing import GROUP_SIZE, SLICE_BITS, SLICE_COUNT, groups_of

LEVELS = 1 << SLICE_BITS
CODES = LEVELS**SLICE_COUNT
# The smallest subnormal of float16: a stored scale is never 0.
MIN_SCALE = 2.0**-24
_PIECE_WEIGHTS = 1 << 22


@dataclass(frozen=True)
class SlicedWeight:
    """A matrix as stored: codes uint8 [rows, columns], scales and offsets float16 [rows, groups]."""

    codes: Tensor
    scales: Tensor
    offsets: Tensor

    def to(self, device: torch.device | str) -> SlicedWeight:
        return SlicedWeight(self.codes.to(device), self.scales.to(device), self.offsets.to(device))


def split_groups(weight: Tensor) -> Tensor:
    """[rows, columns] -> [rows, groups, 128]. A short last group repeats its last column, so its range stays."""
    rows, columns = weight.shape
    missing = groups_of(columns) * GROUP_SIZE - columns
    if missing:
        weight = torch.cat((weight, weight[:, -1:].expand(rows, missing)), dim=1)
    return weight.reshape(rows, -1, GROUP_SIZE)


def join_groups(groups: Tensor, columns: int) -> Tensor:
    """Inverse of `split_groups`: [rows, groups, 128] -> [rows, columns]."""
    return groups.reshape(groups.shape[0], -1)[:, :columns]


def storable_groups(weight: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None) -> tuple[Tensor, ...]:
    """(groups, scale, offset) of one matrix, float32 [rows, columns]. Without gamma and beta ([rows, groups, 1]) the
    range is not clipped.

    Raises ValueError on weights that are not finite, or whose scale or offset float16 cannot hold.
    """
    if not torch.isfinite(weight).all():
        raise ValueError("weights: expected finite numbers, found infinity or NaN")
    groups = split_groups(weight)
    if gamma is None or beta is None:
        gamma = beta = torch.full((*groups.shape[:2], 1), torch.inf, device=weight.device)
    scale, offset = scale_offset(groups, gamma, beta)
    if not (torch.isfinite(scale).all() and torch.isfinite(offset).all()):
        largest = weight.abs().max().item()
        raise ValueError(f"weights: expected a range that float16 can hold, found magnitudes up to {largest:g}")
    return groups, scale, offset


def scale_offset(groups: Tensor, gamma: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """Scale s and offset o of each group from its range, clipped to sigmoid(gamma)·max and sigmoid(beta)·min.

    The parametrisation of OmniQuant (arXiv 2308.13137, section 3.2): s = (high - low) / 4, z = -low / s, o = -low.
    The zero point is real, so a group that does not straddle zero is covered too. Rounded to float16 and back with a
    straight-through gradient, because the codes must be computed with the values as stored.
    """
    high = torch.sigmoid(gamma) * groups.amax(-1, keepdim=True)
    low = torch.sigmoid(beta) * groups.amin(-1, keepdim=True)
    # Clipping a one-sided group moves both ends the same way and may swap them; the scale must stay positive.
    scale = ((high - low) / LEVELS).clamp_min(MIN_SCALE)
    return _stored(scale), _stored(-low)


def encode(groups: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """8-bit codes, uint8 of the groups' shape. scale and offset: the values as stored, in float32.

    The paper's recursive residuals (equation 3), q_e = clamp(floor(R_e / s_e + z_e), 0, 3) with s_e = s / 4^(e-1),
    z_1 = z and z_e = 2 after, telescope to one rounding at the finest step: the top 2D bits are the first D digits, and
    a weight outside the range saturates every digit.
    """
    finest = scale / LEVELS ** (SLICE_COUNT - 1)
    return torch.floor((groups + offset) / finest).clamp(0, CODES - 1).to(torch.uint8)


def decode(codes: Tensor, scale: Tensor, offset: Tensor, depth: int) -> Tensor:
    """Weights at `depth` 1..4, float32 of the codes' shape."""
    top = torch.bitwise_right_shift(codes, SLICE_BITS * (SLICE_COUNT - depth)).to(torch.float32)
    return scale * float(LEVELS) ** (1 - depth) * (top + 0.5) - offset


class _DecodeStraightThrough(torch.autograd.Function):
    """decode(encode(weights)) with the gradient of LSQ (arXiv 1902.08153) for scale and offset.

    Inside the range the rounding counts as the identity and the scale acts through the rounding error alone. Outside it
    W(D) sits on an end of the range, a linear function of scale and offset.
    """

    @staticmethod
    def forward(ctx, groups: Tensor, scale: Tensor, offset: Tensor, depth: int) -> Tensor:  # type: ignore[override]
        step = scale * float(LEVELS) ** (1 - depth)
        position = (groups + offset) / step
        cell = position.floor().clamp_(0, LEVELS**depth - 1).add_(0.5)
        # The straight line through a cell's middle: what is left of the position is the rounding error.
        inside = (cell - position).abs() <= 0.5
        ctx.save_for_backward(torch.where(inside, cell - position, cell), inside)
        ctx.share = float(LEVELS) ** (1 - depth)
        return step * cell - offset

    @staticmethod
    def backward(ctx, gradient: Tensor):  # type: ignore[override]
        by_step, inside = ctx.saved_tensors
        by_scale = (gradient * by_step).sum(-1, keepdim=True) * ctx.share
        by_offset = -gradient.masked_fill(inside, 0.0).sum(-1, keepdim=True)
        by_weight = gradient.masked_fill(~inside, 0.0) if ctx.needs_input_grad[0] else None
        return by_weight, by_scale, by_offset, None


def decode_straight_through(groups: Tensor, scale: Tensor, offset: Tensor, depth: int) -> Tensor:
    """Weights at `depth` as decode(encode(...)) gives them, with a gradient for weights, scale and offset."""
    return _DecodeStraightThrough.apply(groups, scale, offset, depth)


def slice_weight(weight: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None) -> SlicedWeight:
    """Slice one matrix as it is, with the clipping of `storable_groups`, which says what is refused."""
    groups, scale, offset = storable_groups(weight, gamma, beta)
    codes = join_groups(encode(groups, scale, offset), weight.shape[1]).contiguous()
    return SlicedWeight(codes, scale.squeeze(-1).to(torch.float16), offset.squeeze(-1).to(torch.float16))


def slice_pieces(pieces: Iterable[Tensor]) -> SlicedWeight:
    """`slice_weight` of a matrix that comes some rows at a time."""
    sliced = [slice_weight(piece) for piece in pieces]
    return SlicedWeight(*(torch.cat([getattr(piece, part.name) for piece in sliced]) for part in fields(SlicedWeight)))


def unslice_weight(sliced: SlicedWeight, depth: int) -> Tensor:
    """The matrix at `depth`, float32 [rows, columns]."""
    rows, columns = sliced.codes.shape
    result = torch.empty(rows, columns, device=sliced.codes.device)
    # Some rows at a time: what lies between codes and weights takes several times the room of the result.
    step = max(1, _PIECE_WEIGHTS // columns)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        scale, offset = (values[part].float().unsqueeze(-1) for values in (sliced.scales, sliced.offsets))
        result[part] = join_groups(decode(split_groups(sliced.codes[part]), scale, offset, depth), columns)
    return result


def _stored(values: Tensor) -> Tensor:
    """float32 -> float16 -> float32 with a straight-through gradient."""
    return values + (values.to(torch.float16).to(values.dtype) - values).detach()
