"""The runtime's float32 arithmetic in torch, operation by operation and in the same order as runtime/kernels/scalar.c.

int8 activations make a forward pass chaotic: a difference in the last bit of a float moves some activation across a
rounding border, and within a few layers that grows to the size of the rounding itself. So the reference follows the
runtime bit for bit. A fused multiply-add is taken in float64, where the product of two floats is exact.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

LANES = 16
ATTENTION_CHUNK = 256  # positions; runtime/src/definition.h
CACHE_GROUP = 32  # of an int8 cache, dimensions of a head that share a scale
QUANTIZE_MIN, QUANTIZE_MAX = 1e-30, 127.0  # a group whose largest magnitude is below the first is all zero

# Softmax over some positions: Σ weight·value [heads, tokens, head_dim]; Σ weight and largest score [heads, tokens, 1].
Part = tuple[Tensor, Tensor, Tensor]

# Of float64's mantissa, what float32 drops, and its pattern halfway between two floats.
_DROPPED_BITS, _HALFWAY = (1 << 29) - 1, 1 << 28

# exp(x): constants of runtime/src/definition.h (tests/test_keys.py compares them).
EXP_LOW, EXP_HIGH = -87.0, 88.0
LOG2_E = 1.44269504
LN2_HIGH, LN2_LOW = 0.693359375, -2.12194440e-4
EXP_COEFFICIENTS = (1.98412698e-4, 1.38888889e-3, 8.33333333e-3, 4.16666667e-2, 1.66666667e-1, 0.5)


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a·b + c, rounded once to float32."""
    product, addend = a.double() * b.double(), c.double()
    total = product + addend
    halfway = (total.view(torch.int64) & _DROPPED_BITS) == _HALFWAY
    if halfway.any():  # the float64 sum lies between two floats: its own rounding error decides
        product, addend = (part.expand_as(total)[halfway] for part in (product, addend))
        middle = total[halfway]
        back = middle - product
        error = (product - (middle - back)) + (addend - back)
        beyond = torch.nextafter(middle, torch.copysign(middle.new_tensor(torch.inf), error))
        total[halfway] = torch.where(error == 0, middle, beyond)
    return total.float()


def fold(lanes: Tensor) -> Tensor:
    """Sum of 16 lanes in the order 8, 4, 2, 1: float32 [..., 16] -> [...]."""
    half = LANES // 2
    while half:
        lanes = lanes[..., :half] + lanes[..., half : 2 * half]
        half //= 2
    return lanes.squeeze(-1)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Σ a·b over the last dimension, element i in lane i % 16: float32, broadcast [..., n] -> [...]."""
    a, b = (functional.pad(x, (0, -x.shape[-1] % LANES)).unflatten(-1, (-1, LANES)) for x in (a, b))
    total = torch.zeros((), device=a.device).expand(LANES)
    for step in range(a.shape[-2]):
        total = fma(a[..., step, :], b[..., step, :], total)
    return fold(total)


def exponential(x: Tensor) -> Tensor:
    """exp(x) of float32 by the runtime's polynomial."""
    x = x.clamp(EXP_LOW, EXP_HIGH)
    n = torch.round(x * LOG2_E)
    r = fma(n, n.new_tensor(-LN2_HIGH), x)
    r = fma(n, n.new_tensor(-LN2_LOW), r)
    p = r.new_tensor(EXP_COEFFICIENTS[0])
    for coefficient in (*EXP_COEFFICIENTS[1:], 1.0, 1.0):
        p = fma(p, r, r.new_tensor(coefficient))
    power = ((n.to(torch.int32) + 127) << 23).view(torch.float32)
    return p * power


def square_root(x: Tensor) -> Tensor:
    """The correctly rounded root of float32 (torch's own may be off by a bit)."""
    return x.double().sqrt().float()


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x / rms(x) · weight over the last dimension."""
    factor = 1.0 / square_root(dot(x, x) / x.shape[-1] + epsilon)
    return x * factor.unsqueeze(-1) * weight


def silu_times(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up."""
    return gate / (1.0 + exponential(-gate)) * up


def rope_tables(inverse_frequencies: Tensor, positions: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine, float32 [positions, head_dim / 2]: angles in float32, the functions in float64."""
    positions_column = torch.arange(positions, dtype=torch.float32, device=inverse_frequencies.device)[:, None]
    angles = (positions_column * inverse_frequencies).double()
    return angles.cos().float(), angles.sin().float()


def rotate(heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary embedding of halves. heads: [heads, tokens, head_dim]; cosine, sine: [tokens, head_dim / 2]."""
    a, b = heads.chunk(2, dim=-1)
    return torch.cat((fma(a, cosine, -(b * sine)), fma(b, cosine, a * sine)), dim=-1)


def round_to_int8(x: Tensor) -> Tensor:
    """What an int8 cache keeps of keys or values, float32 [..., head_dim]: code · scale, exact in float32.

    Every group of the last dimension has a scale, largest / 127 in float16.
    """
    groups = functional.pad(x, (0, -x.shape[-1] % CACHE_GROUP)).unflatten(-1, (-1, CACHE_GROUP))
    largest = groups.abs().amax(-1, keepdim=True)
    used = largest >= QUANTIZE_MIN
    # A tensor over a tensor: torch takes number / tensor as a product with the reciprocal, which rounds twice.
    inverse = torch.where(used, largest.new_tensor(QUANTIZE_MAX) / torch.where(used, largest, 1.0), 0.0)
    scales = torch.where(used, largest / QUANTIZE_MAX, 0.0).half().float()
    return (torch.round(groups * inverse) * scales).flatten(-2)[..., : x.shape[-1]]


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int = 0) -> Tensor:
    """Softmax attention of every token over itself and what came before: float32 [heads, tokens, head_dim].

    query: [heads, tokens, head_dim], the last of the positions; key, value: [heads, positions, head_dim]. Chunk of
    positions by chunk, each joined to those before it: weights relative to the largest score so far. window: positions
    that a token sees, its own counted; 0: all. A token's first chunk is the one that its window begins in.
    """
    (heads, tokens, _), positions = query.shape, key.shape[1]
    before = positions - tokens
    window = window or positions
    joined = torch.zeros_like(query)
    sums, largest = (query.new_full((heads, tokens, 1), start) for start in (0.0, -torch.inf))
    for begin in range(0, positions, ATTENTION_CHUNK):
        # Tokens first..last-1 see something of this chunk; it is the first chunk of those from `joining` on.
        first, last = max(0, begin - before), min(tokens, begin + ATTENTION_CHUNK - 1 + window - before)
        if first >= last:
            continue
        seeing, chunk = slice(first, last), slice(begin, begin + ATTENTION_CHUNK)
        part = _attend_chunk(query[:, seeing], key[:, chunk], value[:, chunk], before + first - begin, scale, window)
        joining = min(max(begin - 1 + window - before, first), last) if begin > 0 else first
        if joining > first:
            old, known = slice(first, joining), joining - first
            both = _join((joined[:, old], sums[:, old], largest[:, old]), tuple(half[:, :known] for half in part))
            part = tuple(torch.cat((half, rest[:, known:]), 1) for half, rest in zip(both, part, strict=True))
        joined[:, seeing], sums[:, seeing], largest[:, seeing] = part
    return joined * (1.0 / sums)


def _attend_chunk(query: Tensor, key: Tensor, value: Tensor, first: int, scale: float, window: int) -> Part:
    """One chunk; the first token stands at its position `first`, or behind its end."""
    tokens, positions = query.shape[1], key.shape[1]
    scores = query.new_zeros(query.shape[0], tokens, positions)
    for i in range(query.shape[2]):
        scores = fma(query[:, :, None, i], key[:, None, :, i], scores)
    seen = torch.ones(tokens, positions, dtype=torch.bool, device=query.device)
    unseen = ~seen.tril(first).triu(first - window + 1)
    scores = (scores * scale).masked_fill(unseen, -torch.inf)
    largest = scores.amax(-1, keepdim=True)
    weights = exponential(scores - largest).masked_fill(unseen, 0.0)
    lanes = query.new_zeros(*weights.shape[:2], LANES)
    for part in functional.pad(weights, (0, -positions % LANES)).split(LANES, dim=-1):
        lanes = lanes + part
    total = torch.zeros_like(query)
    for position in range(positions):
        # Earlier tokens do not see this position, later ones no longer.
        later = slice(max(0, position - first), max(0, position - first + window))
        total[:, later] = fma(weights[:, later, position, None], value[:, None, position], total[:, later])
    return total, fold(lanes).unsqueeze(-1), largest


def _join(part: Part, following: Part) -> Part:
    """Parts of two neighbouring chunks as one."""
    largest = torch.maximum(part[2], following[2])
    mine, theirs = exponential(part[2] - largest), exponential(following[2] - largest)
    return fma(part[0], mine, following[0] * theirs), fma(part[1], mine, following[1] * theirs), largest
