"""Perplexity of a GGUF file on a text by the rules of mobiquant.scoring, and its divergence from a reference."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mobiquant.scoring import Score, default_window, make_windows
from mobiquant.text import clean_text
from runtime.model import Model

_PIECE = 512  # tokens whose logits are held at once: with 128 k tokens of vocabulary 256 MB

ReferenceLogits = Callable[[np.ndarray], np.ndarray]


def score_text(
    model: Model,
    text: str,
    *,
    rule: str = "all",
    context: int | None = None,
    n_windows: int | None = None,
    reference: ReferenceLogits | None = None,
    on_window: Callable[[int, int, Score], None] | None = None,
) -> Score:
    """Score `text` at the model's present precision.

    rule: "all" or "llama.cpp". context: tokens of a window, None for the rule's default.
    n_windows: only the first so many. reference: full-precision logits, float32 [n, vocab],
    of one window of int32 [n] tokens. on_window: called with windows done, windows in all, and the score so far.
    Raises ValueError for a text too short, a model without begin-of-text token, or logits that are not finite.
    """
    tokenizer = model.tokenizer
    if tokenizer.bos is None:
        raise ValueError(f"{model.path}: begin-of-text token: expected one for scoring, found none")
    ids = tokenizer.encode(clean_text(text), add_bos=False)
    windows = make_windows(ids, rule, context or default_window(rule, model.n_ctx), tokenizer.bos)[:n_windows]
    score = Score()
    for done, window in enumerate(windows, start=1):
        model.reset()
        expected = None if reference is None else reference(window.tokens)
        for start in range(0, len(window.tokens) - 1, _PIECE):
            piece = window.tokens[start : start + _PIECE]
            logits = model.eval(piece, all_logits=True)
            # Row i of the window predicts token i + 1, and the last row nothing.
            rows = slice(max(window.first_scored - 1, start), min(start + len(piece), len(window.tokens) - 1))
            if rows.start < rows.stop:
                targets = window.tokens[rows.start + 1 : rows.stop + 1]
                wanted = None if expected is None else expected[rows]
                score.add(logits[rows.start - start : rows.stop - start], targets, wanted)
        if on_window is not None:
            on_window(done, len(windows), score)
    return score
