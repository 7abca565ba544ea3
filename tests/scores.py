"""One model's score on a text at one budget, for tests that are not about the evaluation itself."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from mobiquant.evaluation.backends import open_backend
from mobiquant.evaluation.evaluate import Precision, Row, score_windows, text_windows


def score(model: Path, text: str, budget: str, reference: Path) -> Row:
    """The row of `budget`, under rule "all"."""
    with closing(open_backend(model)) as backend, closing(open_backend(reference)) as exact:
        return score_windows(backend, text_windows(backend, text, "all"), [Precision.parse(budget)], exact).rows[0]
