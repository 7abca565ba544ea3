"""The tables of docs/outliers.md, as markdown, from what was measured."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations

import numpy as np

from mobiquant.checkpoint import LINEARS

from .analysis import (
    by_decile,
    kind_shares,
    linear_shares_kept,
    mean_bits,
    oracle_depths,
    outliers,
    rank_correlation,
    shares_kept,
    shuffled_depths,
    spent_cost,
)
from .measure import BUDGETS, DEPTHS, Measured

_BITS = tuple(2 * depth for depth in DEPTHS)
# Two depths, and every depth with its control.
_PAIRS = tuple(combinations(range(len(DEPTHS)), 2)) + tuple((index, index) for index in range(len(DEPTHS)))
_WORST = 6
_CONTEXT = 5


def report(measured: Measured, pieces: list[str], kinds: np.ndarray) -> str:
    """All tables. pieces: the decoded tokens; kinds: str [T] (analysis.token_kind)."""
    sections = [
        ("Share of the outliers at one precision that are outliers at the other", _overlap(measured)),
        ("Where the divergence of the whole model lies", _concentration(measured)),
        ("Who the outliers are", _kinds(measured, kinds)),
        ("The worst of them", _worst(measured, pieces)),
        ("What the routers give, average bits by tenth of the tokens", _routing(measured)),
        ("What the choice of tokens is worth", _worth(measured)),
    ]
    return "\n\n".join(f"**{title}**\n\n{table}" for title, table in sections)


def _markdown(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _overlap(measured: Measured) -> str:
    """Absolute and relative error for single linears and all, expected cost, and the model's divergence."""
    absolute, relative = shares_kept(measured.error, measured.control_error), linear_shares_kept(measured)

    def row(label: str, kept: np.ndarray) -> list[str]:
        return [label, *(_percent(kept[pair]) for pair in _PAIRS)]

    rows = [row("error ‖ΔW·x‖², mean of all linears", absolute.mean(0))]
    rows += [row("error / ‖W·x‖², mean of all linears", relative.mean(0))]
    for place in _examples(measured):
        name = measured.linears[place].removeprefix("model.layers.")
        rows.append(row(f"error / ‖W·x‖², `{name}`", relative[place]))
    rows.append(row("divergence of the whole model", shares_kept(measured.divergence, measured.control_divergence)))
    cost = row("expected cost, sum over the model", shares_kept(measured.cost.sum(0), measured.cost.sum(0)))
    # The cost of the control was not measured.
    rows.append([cell if a != b else "" for cell, (a, b) in zip(cost, [(0, 1), *_PAIRS], strict=True)])
    pairs = [f"{_BITS[a]}, {_BITS[b]}" if a != b else f"{_BITS[a]}, control" for a, b in _PAIRS]
    return _markdown(["outliers by", *pairs], rows)


def _examples(measured: Measured) -> list[int]:
    """Two linears of the first, a middle and the last block."""
    blocks = len(measured.linears) // len(LINEARS)
    wanted = ("self_attn.q_proj", "mlp.down_proj")
    chosen = (0, blocks // 2, blocks - 1)
    return [block * len(LINEARS) + LINEARS.index(name) for block in dict.fromkeys(chosen) for name in wanted]


def _concentration(measured: Measured) -> str:
    """What share of a depth's divergence falls on the outliers of another, and what its ranks agree with."""
    divergence = measured.divergence
    mask = outliers(divergence)
    total = divergence.sum(-1)
    rows = [["mean, nats a token", *(f"{value:.4g}" for value in divergence.mean(-1))]]
    for bits, chosen in zip(_BITS, mask, strict=True):
        rows.append(
            [f"share on the outliers at {bits} bits", *map(_percent, divergence[:, chosen].sum(-1) / total)],
        )
    rows.append(
        ["rank correlation with 2 bits", *(f"{rank_correlation(divergence[0], values):.2f}" for values in divergence)]
    )
    predicted = zip(measured.cost.sum(0), divergence, strict=True)
    rows.append(
        ["rank correlation with the expected cost", *(f"{rank_correlation(cost, kl):.2f}" for cost, kl in predicted)]
    )
    return _markdown(["weights alone", *(f"{bits} bits" for bits in _BITS)], rows)


def _kinds(measured: Measured, kinds: np.ndarray) -> str:
    shares = [kind_shares(kinds, mask) for mask in outliers(measured.divergence)]
    text = kind_shares(kinds, np.ones(len(kinds), bool))
    given = mean_bits(measured)
    rows = [
        [
            kind,
            *(_fine(part[kind]) for part in (text, *shares)),
            *(f"{bits.mean():.2f}" for bits in given[:, kinds == kind]),
        ]
        for kind in text
    ]
    head = ["token before the prediction", "of all", *(f"outliers at {bits} bits" for bits in _BITS)]
    return _markdown([*head, *(f"given, asked {budget}" for budget in BUDGETS)], rows)


def _fine(share: float) -> str:
    return f"{100 * share:.1f} %"


def _worst(measured: Measured, pieces: list[str]) -> str:
    """The tokens with the largest divergence at each depth, in context, and where else they are outliers."""
    mask = outliers(measured.divergence)
    rows = []
    for index, bits in enumerate(_BITS):
        for place in np.argsort(-measured.divergence[index])[:_WORST]:
            before = _visible("".join(pieces[max(0, place - _CONTEXT) : place]))
            others = ", ".join(f"{_BITS[i]}" for i in np.flatnonzero(mask[:, place]) if i != index) or "none"
            nats = f"{measured.divergence[index, place]:.3g}"
            token = _visible(pieces[place]).replace(" ", "␣")
            rows.append([f"{bits} bits", before, token, nats, others])
    return _markdown(["outlier at", "after", "token", "nats", "outlier also at"], rows)


def _visible(piece: str) -> str:
    """One line, with nothing that markdown would take for its own."""
    for character in "\\`*_[]<>|#":
        piece = piece.replace(character, f"\\{character}")
    return piece.replace("\n", "⏎")


def _routing(measured: Measured) -> str:
    bits = mean_bits(measured)
    cost = measured.cost[:, 0].sum(0)
    rows = []
    for label, order in (("expected cost", cost), ("divergence", measured.divergence[0])):
        for budget, given in zip(BUDGETS, bits, strict=True):
            tenths = [f"{value:.2f}" for value in by_decile(given, order)]
            rows.append([f"{budget}, {label}", *tenths, f"{rank_correlation(given, order):.2f}"])
    head = ["asked, tenths by … at 2 bits", *map(str, range(1, 11)), "rank correlation"]
    return _markdown(head, rows)


def _worth(measured: Measured) -> str:
    """Routed depths against the same dealt to random tokens, against a router that knows, and one depth for all."""
    rows = []
    for depth, kls in zip(DEPTHS[:2], measured.divergence, strict=False):
        everywhere = np.full(measured.depths.shape[1:], depth)
        bits = 2 * depth
        rows.append([f"{bits} for all", f"{bits:.2f}", f"{spent_cost(measured, everywhere):.4f}", "", "", _nats(kls)])
    for budget, depths, given, kls in zip(BUDGETS, measured.depths, mean_bits(measured), measured.routed, strict=True):
        read = float(given.mean())
        costs = [depths, shuffled_depths(depths), oracle_depths(measured, read)]
        spent = [f"{spent_cost(measured, chosen):.4f}" for chosen in costs]
        rows.append([f"{budget} routed", f"{read:.2f}", *spent, _nats(kls)])
    head = ["asked", "bits read", "expected cost", "tokens shuffled", "true cost known", "measured divergence"]
    return _markdown(head, rows)


def _nats(divergence: np.ndarray) -> str:
    return f"{divergence.mean():.4f}"
