"""Numbers about outlier tokens, from what was measured: how much of a set stays, who is in it, who gets the bits.

An outlier at a depth is a token among the 5 % with the largest error there.
"""

from __future__ import annotations

import numpy as np
import torch

from mobiquant.packing import SLICE_BITS
from mobiquant.router import spending_cut

from .measure import Measured

OUTLIER_SHARE = 0.05
DECILES = 10


def outliers(values: np.ndarray) -> np.ndarray:
    """Mask of the largest 5 % along the last axis; a bool array of the same shape."""
    count = max(1, round(OUTLIER_SHARE * values.shape[-1]))
    mask = np.zeros(values.shape, bool)
    np.put_along_axis(mask, np.argpartition(values, -count, axis=-1)[..., -count:], True, axis=-1)
    return mask


def shares_kept(values: np.ndarray, control: np.ndarray) -> np.ndarray:
    """[..., D, T] twice -> [..., D, D]: the share of the outliers at one depth that are outliers at the other; on the
    diagonal the share that the control keeps. Sets have one size, so it is symmetric; 5 % is chance."""
    mask, other = (outliers(part).astype(np.float64) for part in (values, control))
    size = mask.sum(-1, keepdims=True)
    between, same = mask @ np.swapaxes(mask, -1, -2) / size, (mask * other).sum(-1) / size[..., 0]
    depths = np.arange(between.shape[-1])
    between[..., depths, depths] = same
    return between


def rank_correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Spearman's, of two [T]; equal values get their mean rank."""
    return float(np.corrcoef(_ranks(first), _ranks(second))[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[inverse]


def by_decile(values: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Mean of values [..., T] in the ten tenths of the tokens, by rising `order` [T]: [..., 10]."""
    parts = np.array_split(np.argsort(order, kind="stable"), DECILES)
    return np.stack([values[..., part].mean(-1) for part in parts], -1)


def mean_bits(measured: Measured) -> np.ndarray:
    """What the routers give every token, average bits over its linears by their weights: [budgets, T]."""
    shares = measured.weights / measured.weights.sum()
    return SLICE_BITS * (measured.depths @ shares)


def spent_cost(measured: Measured, depths: np.ndarray) -> float:
    """Expected cost, nats per token, when linears read `depths`, int [T, L]."""
    chosen = np.take_along_axis(measured.cost, depths.T[:, None].astype(np.int64) - 1, axis=1)
    return float(chosen.sum() / len(measured.tokens))


def shuffled_depths(depths: np.ndarray, seed: int = 0) -> np.ndarray:
    """The same depths [T, L] in every linear, dealt to random tokens: what the choice of tokens is worth is the
    difference."""
    return np.random.default_rng(seed).permuted(depths, axis=0)


def oracle_depths(measured: Measured, bits: float) -> np.ndarray:
    """The depths [T, L] that a router would give at `bits` on average if it knew the cost of every slice."""
    weights = measured.weights
    gains = -np.diff(measured.cost, axis=1) / (SLICE_BITS * weights[:, None, None])
    scores = [torch.from_numpy(np.ascontiguousarray(linear.T)) for linear in gains]
    cut = spending_cut(scores, weights.tolist(), bits)
    gates = np.cumprod(np.swapaxes(gains, 1, 2) > cut, axis=-1)
    return 1 + gates.sum(-1).T


def token_kind(piece: str) -> str:
    """What a token is, from its decoded text; begin-of-text is "<|...|>"."""
    if piece.startswith("<|"):
        return "begin of text"
    if "\n" in piece:
        return "line break"
    word = piece.strip()
    if any(character.isdigit() for character in word):
        return "digits"
    if not any(character.isalpha() for character in word):
        return "punctuation"
    return "start of a word" if piece[0] == " " else "inside a word or after a mark"


def kind_shares(kinds: np.ndarray, mask: np.ndarray) -> dict[str, float]:
    """Share of each kind among the masked tokens, kinds str [T], by falling share in the text."""
    names, counts = np.unique(kinds, return_counts=True)
    return {str(name): float((kinds[mask] == name).mean()) for name in names[np.argsort(-counts)]}


def linear_shares_kept(measured: Measured) -> np.ndarray:
    """`shares_kept` by the relative error ‖(W_D - W)·x‖² / ‖W·x‖² of every linear: [L, 4, 4]."""
    output = np.maximum(measured.output, 1e-30)[:, None]
    return shares_kept(measured.error / output, measured.control_error / output)
