"""Static budgets: one depth per linear, the same for every token, along one order for all budgets (numpy only).

The order says which linear reads one slice more next. A budget takes as much of it as it can pay, so budgets are nested
and one list serves them all (docs/format.md, Static budgets).
"""

from __future__ import annotations

import numpy as np

from mobiquant.packing import SLICE_BITS, SLICE_COUNT

RAISES = SLICE_COUNT - 1


def static_order(gains: np.ndarray) -> np.ndarray:
    """Linears in the order in which they are raised by a slice, int32 [3·L], each three times.

    gains: float [L, 3], expected gain per bit when linear l goes from e to e+1 slices. Where a later slice is worth
    more than the one before it, both count with their mean, the convex hull of gain over bits; the best gain per bit
    then comes first, and prefixes of the order are optimal.
    """
    hull = np.array([_never_rising(list(linear)) for linear in gains.astype(np.float64)])
    return (np.argsort(-hull.ravel(), kind="stable") // RAISES).astype(np.int32)


def static_depths(order: np.ndarray, weights: np.ndarray, bits: float) -> np.ndarray:
    """Depths of the linears at `bits` on average per weight, 2..8, or as little below as a prefix of `order` allows.

    weights: how many weights each linear has, int [L]. uint8 [L], as the runtime computes them.
    """
    depths = np.ones(len(weights), np.uint8)
    spent, limit = SLICE_BITS * int(weights.sum()), float(np.float32(bits)) * float(weights.sum())
    for linear in order:
        spent += SLICE_BITS * int(weights[linear])
        if spent > limit:
            break
        depths[linear] += 1
    return depths


def check_static_order(order: np.ndarray, linears: int) -> None:
    """Raises ValueError unless `order` names every one of so many linears exactly three times."""
    if order.shape != (RAISES * linears,):
        raise ValueError(f"expected shape ({RAISES * linears},), found {order.shape}")
    if order.min() < 0 or order.max() >= linears:
        raise ValueError(f"expected linears 0..{linears - 1}, found {order.min()}..{order.max()}")
    counts = np.bincount(order, minlength=linears)
    if (counts != RAISES).any():
        wrong = int(np.argmax(counts != RAISES))
        raise ValueError(f"expected every linear {RAISES} times, found linear {wrong} {counts[wrong]} times")


def _never_rising(gains: list[float]) -> list[float]:
    """Pool adjacent values that rise into their mean."""
    pools: list[tuple[float, int]] = []
    for gain in gains:
        mean, count = gain, 1
        while pools and pools[-1][0] < mean:
            before, size = pools.pop()
            mean, count = (before * size + mean * count) / (size + count), size + count
        pools.append((mean, count))
    return [mean for mean, count in pools for _ in range(count)]
