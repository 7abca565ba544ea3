"""The next token from logits, in numpy: llama.cpp's filters in llama.cpp's order, deterministic for a seed.

Repeat penalty, top-k, top-p, min-p, temperature, then one draw. Temperature 0 takes the most likely token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class SamplingSettings:
    """temperature 0: greedy. top_k 0, top_p 1, min_p 0 and repeat_penalty 1 switch their filter off.

    last_n: how many of the latest tokens, prompt included, the penalty looks at. seed None: a new one each time.
    Raises ValueError for a number outside its range.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    last_n: int = 64
    seed: int | None = None

    def __post_init__(self) -> None:
        limits = {
            "temperature": (0, np.inf),
            "top_k": (0, np.inf),
            "top_p": (0, 1),
            "min_p": (0, 1),
            "repeat_penalty": (np.finfo(np.float32).tiny, np.inf),
            "last_n": (0, np.inf),
        }
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if not low <= value <= high or value == np.inf:
                raise ValueError(f"{name}: expected a number from {low:g} to {high:g}, found {value}")
        if self.seed is not None and self.seed < 0:
            raise ValueError(f"seed: expected 0 or more, found {self.seed}")


class Sampler:
    """Draws tokens one after another; the same settings, seed and logits give the same tokens."""

    def __init__(self, settings: SamplingSettings) -> None:
        self._settings = settings
        self._generator = np.random.default_rng(settings.seed)

    def sample(self, logits: np.ndarray, previous: Sequence[int] = ()) -> int:
        """One token id from float32 [vocab] logits; `previous` are the tokens so far, oldest first."""
        settings = self._settings
        logits = penalize(logits, previous[-settings.last_n :] if settings.last_n else (), settings.repeat_penalty)
        if settings.temperature == 0:
            return int(logits.argmax())
        tokens = candidates(logits, settings)
        probabilities = softmax(logits[tokens] / settings.temperature)
        # One uniform draw per token, whatever the filters left.
        index = np.searchsorted(np.cumsum(probabilities), self._generator.random(), side="right")
        return int(tokens[min(index, len(tokens) - 1)])


def penalize(logits: np.ndarray, recent: Sequence[int], penalty: float) -> np.ndarray:
    """float32 [vocab] logits, those of `recent` tokens divided (above 0) or multiplied (below 0) by `penalty`."""
    if penalty == 1 or not len(recent):
        return logits
    logits, tokens = logits.copy(), np.unique(np.asarray(recent, np.int64))
    logits[tokens] = np.where(logits[tokens] > 0, logits[tokens] / penalty, logits[tokens] * penalty)
    return logits


def candidates(logits: np.ndarray, settings: SamplingSettings) -> np.ndarray:
    """Token ids that top-k, top-p and min-p leave, most likely first; at least one. Ties go to the lower id."""
    count = min(settings.top_k or len(logits), len(logits))
    threshold = np.partition(logits, len(logits) - count)[len(logits) - count]
    tokens = np.flatnonzero(logits >= threshold)
    tokens = tokens[np.argsort(-logits[tokens], kind="stable")][:count]
    if settings.top_p < 1:  # the smallest set whose probability reaches top_p
        reached = np.cumsum(softmax(logits[tokens]))[:-1]
        tokens = tokens[: 1 + np.searchsorted(reached, settings.top_p, side="left")]
    # min-p compares with the most likely token; the ratio does not depend on what top-p removed.
    return tokens[logits[tokens] - logits[tokens[0]] >= np.log(max(settings.min_p, np.finfo(np.float64).tiny))]


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities, float64, of [n] logits."""
    weights = np.exp(logits - logits.max(), dtype=np.float64)
    return weights / weights.sum()
