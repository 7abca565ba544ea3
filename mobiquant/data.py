"""Text to token windows for calibration: seeded, begin-of-text first, with a held-out part for the thresholds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from mobiquant.scoring import clean_text

# The end of the text is kept from training: thresholds must not be taken on inputs that the routers were fitted to.
_HELD_OUT_SHARE = 8


@dataclass(frozen=True)
class CalibrationWindows:
    """training: int64 [samples, seq_len]; held_out: int64 [samples / 8 or more, seq_len]; first token begin-of-text."""

    training: np.ndarray
    held_out: np.ndarray


def calibration_windows(
    text: str, tokenizer: Tokenizer, bos: int, samples: int, seq_len: int, seed: int
) -> CalibrationWindows:
    """Windows at random places of `text`; the last eighth of its tokens serves the held-out windows alone.

    Raises ValueError when the text is too short for one held-out window.
    """
    ids = np.asarray(tokenizer.encode(clean_text(text), add_special_tokens=False).ids, np.int64)
    border = len(ids) - len(ids) // _HELD_OUT_SHARE
    length = seq_len - 1
    if len(ids) - border < length:
        needed = length * _HELD_OUT_SHARE
        raise ValueError(f"text: expected at least {needed} tokens for windows of {seq_len}, found {len(ids)}")
    random = np.random.default_rng(seed)
    training = _cut(ids[:border], samples, length, bos, random)
    held_out = _cut(ids[border:], -(-samples // _HELD_OUT_SHARE), length, bos, random)
    return CalibrationWindows(training, held_out)


def _cut(ids: np.ndarray, count: int, length: int, bos: int, random: np.random.Generator) -> np.ndarray:
    starts = random.integers(0, len(ids) - length + 1, size=count)
    windows = ids[starts[:, None] + np.arange(length)]
    return np.concatenate((np.full((count, 1), bos, np.int64), windows), axis=1)
