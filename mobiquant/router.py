"""MoBiRoute: the network that scores, per token and linear, how much each residual slice is worth.

Owns the router as stored and run (`Router`, the formula of docs/format.md), the same with float parameters for training
(`TrainableRouter`), its size rule, and the threshold tables. A score is log2 of the expected gain per bit read, on one
scale for the whole model, so one cut through all scores serves one average.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from mobiquant.activations import Activations
from mobiquant.arithmetic import fma
from mobiquant.config import MAX_ROUTER_HIDDEN
from mobiquant.packing import GROUP_SIZE, SLICE_BITS, SLICE_COUNT, TILE_BYTES, TILE_ROWS, groups_of, tiles_of

RESIDUALS = SLICE_COUNT - 1
_MAX_SHARE = 0.02
_INT8_LIMIT = 127


def router_hidden_size(points: Sequence[Sequence[tuple[int, int]]]) -> int:
    """The largest H in 1..16 whose hidden bytes are at most 2 % of the block's base-slice bytes, at least 1.

    points: per router, the (rows, columns) of its linears. Base-slice bytes: slice 1 and the scales and offsets.
    """
    base = sum(
        tiles_of(rows) * groups_of(columns) * (TILE_BYTES + 2 * 2 * TILE_ROWS)
        for linears in points
        for rows, columns in linears
    )
    per_unit = sum(groups_of(linears[0][1]) * GROUP_SIZE for linears in points)
    return max(1, min(MAX_ROUTER_HIDDEN, int(_MAX_SHARE * base / per_unit)))


class Router(nn.Module):
    """A stored router. Buffers: hidden int8 [H, columns], hidden_scale and hidden_bias float32 [H], head float32
    [L, 3, H+1], head_bias float32 [L, 3], threshold float32 [L, 3, P]."""

    PARTS = ("hidden", "hidden_scale", "hidden_bias", "head", "head_bias", "threshold")

    def __init__(self, **parts: Tensor):
        super().__init__()
        for name in self.PARTS:
            self.register_buffer(name, parts[name])
        hidden = torch.nn.functional.pad(self.hidden.float(), (0, -self.hidden.shape[1] % GROUP_SIZE))
        self.register_buffer("_hidden_groups", hidden.unflatten(1, (-1, GROUP_SIZE)), persistent=False)

    def scores(self, x: Activations, exact: bool = True) -> Tensor:
        """float32 [tokens, L, 3], the runtime's bits: integer sums are exact inside a group, groups and features are
        added in ascending order. exact: without it one product for all groups, much faster, and equal to rounding."""
        if not exact:
            values = x.dequantized()
            rms = torch.sqrt(values.square().mean(-1, keepdim=True) + 1e-12)
            hidden = torch.relu(values @ self.hidden.float().T * self.hidden_scale / rms + self.hidden_bias)
            features = torch.cat((hidden, torch.log2(rms)), dim=1)
            return torch.einsum("th,leh->tle", features, self.head) + self.head_bias
        total = torch.zeros(len(x.codes), len(self.hidden), device=x.codes.device)
        for group in range(x.codes.shape[1]):
            total = fma(x.scales[:, group, None], x.codes[:, group] @ self._hidden_groups[:, group].T, total)
        rms = x.root_mean_square()[:, None]
        hidden = torch.relu(total * self.hidden_scale / rms + self.hidden_bias)
        features = torch.cat((hidden, rms.double().log2().float()), dim=1)
        scores = torch.zeros(len(features), *self.head_bias.shape, device=features.device)
        for feature, weight in zip(features.unbind(1), self.head.unbind(-1), strict=True):
            scores = scores + feature[:, None, None] * weight
        return scores + self.head_bias

    def depths(self, x: Activations, average_bits: float, budgets: Sequence[float], exact: bool = True) -> Tensor:
        """Depth of every token in every linear at `average_bits`: uint8 [tokens, L], 1..4. exact: as for scores."""
        if average_bits <= budgets[0] or average_bits >= budgets[-1]:
            depth = 1 if average_bits <= budgets[0] else SLICE_COUNT
            return torch.full((len(x.codes), len(self.head)), depth, dtype=torch.uint8, device=x.codes.device)
        gates = self.scores(x, exact) > interpolate_threshold(self.threshold, average_bits, budgets)
        return 1 + gates.to(torch.uint8).cumprod(-1).sum(-1, dtype=torch.uint8)


def interpolate_threshold(threshold: Tensor, average_bits: float, budgets: Sequence[float]) -> Tensor:
    """[L, 3, P] -> [L, 3] at a target strictly between the first and the last budget, linear between neighbours, in
    float32 as in the runtime."""
    table, target = np.asarray(budgets, np.float32), np.float32(average_bits)
    above = int(np.searchsorted(table, target))
    part = float((target - table[above - 1]) / (table[above] - table[above - 1]))
    return threshold[..., above - 1] + part * (threshold[..., above] - threshold[..., above - 1])


class TrainableRouter(nn.Module):
    """A router with float parameters; its hidden weights are rounded to int8 in the forward pass too, so that freezing
    changes nothing."""

    def __init__(self, columns: int, linears: int, hidden_size: int, generator: torch.Generator):
        super().__init__()
        initial = torch.randn(hidden_size, columns, generator=generator) * columns**-0.5
        self.hidden = nn.Parameter(initial)
        self.hidden_bias = nn.Parameter(torch.zeros(hidden_size))
        # The error of a linear grows with the square of its input: slope 2 on log2(rms).
        head = torch.zeros(linears, RESIDUALS, hidden_size + 1)
        head[..., -1] = 2.0
        self.head = nn.Parameter(head)
        self.head_bias = nn.Parameter(torch.zeros(linears, RESIDUALS))

    @classmethod
    def thaw(cls, router: Router) -> TrainableRouter:
        """Inverse of `freeze`."""
        (hidden_size, columns), (linears, _) = router.hidden.shape, router.head_bias.shape
        result = cls(columns, linears, hidden_size, torch.Generator())
        with torch.no_grad():
            result.hidden.copy_(router.hidden.float() * router.hidden_scale[:, None])
            for name in ("hidden_bias", "head", "head_bias"):
                getattr(result, name).copy_(getattr(router, name))
        return result

    def forward(self, x: Tensor) -> Tensor:
        """Scores float32 [tokens, L, 3] of inputs float32 [tokens, columns]."""
        codes, scale = self._hidden_codes()
        rounded = codes * scale
        hidden_weight = self.hidden + (rounded - self.hidden).detach()
        rms = torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-12)
        hidden = torch.relu(x @ hidden_weight.T / rms + self.hidden_bias)
        features = torch.cat((hidden, torch.log2(rms)), dim=1)
        return torch.einsum("th,leh->tle", features, self.head) + self.head_bias

    @torch.no_grad()
    def freeze(self, table_size: int) -> Router:
        """The stored form, with thresholds still 0: they need the scores of the whole model."""
        codes, scale = self._hidden_codes()
        return Router(
            hidden=codes.to(torch.int8),
            hidden_scale=scale.squeeze(-1).clone(),
            hidden_bias=self.hidden_bias.detach().clone(),
            head=self.head.detach().clone(),
            head_bias=self.head_bias.detach().clone(),
            threshold=torch.zeros(*self.head_bias.shape, table_size, device=self.head.device),
        )

    def _hidden_codes(self) -> tuple[Tensor, Tensor]:
        scale = (self.hidden.detach().abs().amax(-1, keepdim=True) / _INT8_LIMIT).clamp_min(1e-30)
        return torch.round(self.hidden.detach() / scale), scale


def straight_through_gates(scores: Tensor, cut: float, temperature: float) -> Tensor:
    """Gates 0 or 1 of slices 2..4, float32 of the scores' shape, monotone; gradient of sigmoid((score - cut) / T)."""
    soft = torch.sigmoid((scores - cut) / temperature)
    hard = (scores > cut).to(scores.dtype)
    own = (hard + soft - soft.detach()).unbind(-1)
    # Products written out: the gradient of a cumulative one looks for zeros, and most gates are.
    return torch.stack([math.prod(own[: index + 1]) for index in range(len(own))], dim=-1)


def spending_cut(scores: Sequence[Tensor], weights: Sequence[int], bits: float) -> float:
    """The cut at which linears with `scores`, each [tokens, 3], and numbers of `weights` read `bits` on average.

    Slice e is read when no score up to e is at or below the cut, so the running minimum decides.
    """
    values = np.concatenate([linear.cummin(-1).values.flatten().cpu().numpy() for linear in scores])
    counts = [linear.numel() for linear in scores]
    shares = np.repeat(np.divide(weights, counts), counts)
    order = np.argsort(-values, kind="stable")
    spent = shares[order].cumsum()
    asked = (bits - SLICE_BITS) / (SLICE_BITS * RESIDUALS) * spent[-1]
    return float(values[order][min(int(np.searchsorted(spent, asked)), len(values) - 1)])


def expected_gains(scores_at: Sequence[Sequence[Tensor]]) -> np.ndarray:
    """Gain per bit that the routers expect of each residual slice, averaged over tokens: float64 [L, 3].

    scores_at[D-1][l]: float32 [tokens, 3], scores of linear l on held-out text when everything before ran at depth D.
    Slice e is judged on inputs from blocks at depth e-1, from where it would be added.
    """
    scores = [[linear[:, index] for linear in scores_at[index]] for index in range(RESIDUALS)]
    return np.array([[values.double().exp2().mean().item() for values in linears] for linears in scores]).T
