"""How good a model is at each of several budgets: perplexity, and divergence from a full-precision reference.

The loop of `mobiquant perplexity` and `mobiquant evaluate`. Budgets are inside the loop over windows, so the reference
is computed once per window, and an interrupted evaluation has scored every budget on the same windows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from mobiquant.evaluation.backends import Backend
from mobiquant.evaluation.scoring import Score, Window, default_window, make_windows
from mobiquant.text import clean_text
from runtime.budget import Budget

DEFAULT_BUDGETS = ("2", "2.5", "3.0", "3.5", "4.0", "4", "5.0", "6", "8")


@dataclass(frozen=True)
class Precision:
    """A budget with the name it was asked for by; `budget` None is the highest precision there is."""

    name: str
    budget: Budget | None

    @classmethod
    def parse(cls, text: str) -> Precision:
        """A budget in the runtime's notation. Raises ValueError."""
        return cls(text, Budget.parse(text))

    @property
    def kind(self) -> str:
        """How bits are spent: "uniform", one depth everywhere; "static" per linear; "routed" by token; or "full"."""
        if self.budget is None:
            return "full"
        if self.budget.routed:
            return "routed"
        return "static" if self.budget.static else "uniform"

    @property
    def label(self) -> str:
        """How a table calls it: "4 uniform", "3.0 routed", "static:3", "full precision"."""
        if self.budget is None:
            return "full precision"
        return self.name if self.kind == "static" else f"{self.name} {self.kind}"


FULL = Precision("full", None)


@dataclass
class Row:
    """What was measured at one precision. bit_tokens: sum over evaluated tokens of the average bits they read."""

    precision: Precision
    overhead: float  # bits per weight of scales, offsets and, when routed, routers
    score: Score = field(default_factory=Score)
    bit_tokens: float = 0.0
    tokens: int = 0

    @property
    def bits(self) -> float:
        """Average bits read per routed weight."""
        return self.bit_tokens / self.tokens

    @property
    def bits_per_weight(self) -> float:
        """Bits read per routed weight: slices, scales and offsets, and routers when they ran."""
        return self.bits + self.overhead


@dataclass
class TextResult:
    """One text. full: the reference's own score, None without one. windows: how many were scored, of `planned`."""

    rows: list[Row]
    full: Score | None
    windows: int = 0
    planned: int = 0

    @property
    def interrupted(self) -> bool:
        return self.windows < self.planned


def text_windows(
    backend: Backend, text: str, rule: str, context: int | None = None, count: int | None = None
) -> list[Window]:
    """The first `count` windows of a text (all when None) by a rule of scoring.py, in the backend's tokens.

    context: tokens of a window, None for the rule's default. Raises ValueError for a text too short, or a model
    without begin-of-text token.
    """
    if backend.tokenizer.bos is None:
        raise ValueError("begin-of-text token: expected one for scoring, found none in the model")
    if context is not None and context > backend.n_ctx:
        raise ValueError(f"context: expected at most {backend.n_ctx} tokens, the model's, found {context}")
    ids = backend.tokenizer.encode(clean_text(text), add_bos=False)
    return make_windows(ids, rule, context or default_window(rule, backend.n_ctx), backend.tokenizer.bos)[:count]


def score_windows(
    backend: Backend,
    windows: Sequence[Window],
    precisions: Sequence[Precision],
    reference: Backend | None = None,
    on_window: Callable[[TextResult], None] = lambda result: None,
) -> TextResult:
    """Score every precision on every window; with `reference`, also against its logits.

    on_window: called after each window. Ctrl-C ends it with the windows done, if there is one; otherwise it is raised.
    """
    rows = [
        Row(precision, backend.scale_bits + backend.router_bits * (precision.kind == "routed"))
        for precision in precisions
    ]
    result = TextResult(rows, Score() if reference else None, planned=len(windows))
    try:
        for window in windows:
            _score_window(backend, window, result, reference)
            on_window(result)
    except KeyboardInterrupt:
        if not result.windows:
            raise
    return result


def _score_window(backend: Backend, window: Window, result: TextResult, reference: Backend | None) -> None:
    """Add one window to all of `result` at once, after its last budget is done."""
    expected, full = None, Score()
    if reference is not None:
        reference.set_budget(None)
        expected = np.concatenate(list(reference.predict(window.tokens, window.first_scored)))
        full.add(expected, window.targets)
    scored: list[tuple[Score, float]] = []
    for row in result.rows:
        backend.set_budget(row.precision.budget)
        score, done = Score(), 0
        for logits in backend.predict(window.tokens, window.first_scored):
            part = slice(done, done + len(logits))
            score.add(logits, window.targets[part], None if expected is None else expected[part])
            done = part.stop
        scored.append((score, backend.bits_read))
    evaluated = len(window.tokens) - 1
    for row, (score, bits) in zip(result.rows, scored, strict=True):
        row.score += score
        row.bit_tokens += bits * evaluated
        row.tokens += evaluated
    if result.full is not None:
        result.full += full
    result.windows += 1
