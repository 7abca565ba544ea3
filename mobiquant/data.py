"""Text to token windows for calibration: seeded, begin-of-text first, with a held-out part for the thresholds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from mobiquant.text import clean_text

# Every eighth piece of the text is kept from training: thresholds must not be taken on inputs that the routers saw, and
# must come from all over the text, because the bits that a document takes differ by 0.2 from one to the next.
_HELD_OUT_EVERY = 8
_MIN_HELD_OUT = 16


@dataclass(frozen=True)
class CalibrationWindows:
    """training: int64 [samples, seq_len]; held_out: int64 [at least 16, seq_len]; the first token is begin-of-text.

    distinct: after so many training windows they begin to repeat.
    """

    training: np.ndarray
    held_out: np.ndarray
    distinct: int


def calibration_windows(
    text: str, tokenizer: Tokenizer, bos: int, samples: int, seq_len: int, seed: int
) -> CalibrationWindows:
    """Windows of `text` in seeded order, without overlap; they repeat when the text has fewer than asked for.

    Raises ValueError when the text is too short for one held-out window.
    """
    ids = np.asarray(tokenizer.encode(clean_text(text), add_special_tokens=False).ids, np.int64)
    length = seq_len - 1
    count = len(ids) // length
    if count < _HELD_OUT_EVERY:
        needed = length * _HELD_OUT_EVERY
        raise ValueError(f"text: expected at least {needed} tokens for windows of {seq_len}, found {len(ids)}")
    pieces = ids[: count * length].reshape(count, length)
    windows = np.concatenate((np.full((count, 1), bos, np.int64), pieces), axis=1)
    held_out = np.arange(count) % _HELD_OUT_EVERY == _HELD_OUT_EVERY - 1
    random = np.random.default_rng(seed)
    return CalibrationWindows(
        training=_draw(windows[~held_out], samples, random),
        held_out=_draw(windows[held_out], max(_MIN_HELD_OUT, samples // _HELD_OUT_EVERY), random),
        distinct=int((~held_out).sum()),
    )


def _draw(windows: np.ndarray, count: int, random: np.random.Generator) -> np.ndarray:
    return windows[np.resize(random.permutation(len(windows)), count)]
