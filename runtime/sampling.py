"""The next token from logits, in numpy: llama.cpp's filters in llama.cpp's default order, deterministic for a seed.

Logit bias, penalties, top-k, typical, top-p, min-p, temperature, then one draw; or, with mirostat, logit bias,
penalties, temperature and Mirostat 2.0 (Basu et al., arXiv 2007.14966) in place of the filters. Temperature 0 takes the
most likely token after the penalties.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypedDict

import numpy as np

_GREEDY = 1e-20  # below, a quotient could be too large for float32, and one token has all the probability


class SamplingOptions(TypedDict, total=False):
    """The keyword arguments of SamplingSettings, for functions that pass them on."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    typical_p: float
    repeat_penalty: float
    frequency_penalty: float
    presence_penalty: float
    last_n: int
    logit_bias: Mapping[int, float]
    mirostat_mode: int
    mirostat_tau: float
    mirostat_eta: float
    seed: int | None


@dataclass(frozen=True)
class SamplingSettings:
    """temperature 0: greedy. top_k 0, top_p 1, min_p 0, typical_p 1, repeat_penalty 1, frequency_penalty 0 and
    presence_penalty 0 switch their part off.

    last_n: how many of the latest tokens, prompt included, the penalties look at. logit_bias: added to the logits of
    token ids; -inf bans one. mirostat_mode: 0 or 2; mirostat_tau: the surprise, in bits, it holds; mirostat_eta: how
    fast it corrects. seed None: a new one each time. Raises ValueError for a number outside its range.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    typical_p: float = 1.0
    repeat_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    last_n: int = 64
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    mirostat_mode: int = 0
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1
    seed: int | None = None

    def __post_init__(self) -> None:
        positive = float(np.finfo(np.float32).tiny)
        limits = {
            "temperature": (0, np.inf),
            "top_k": (0, np.inf),
            "top_p": (0, 1),
            "min_p": (0, 1),
            "typical_p": (0, 1),
            "repeat_penalty": (positive, np.inf),
            "frequency_penalty": (-np.inf, np.inf),
            "presence_penalty": (-np.inf, np.inf),
            "last_n": (0, np.inf),
            "mirostat_tau": (positive, np.inf),
            "mirostat_eta": (0, 1),
        }
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if not low <= value <= high or abs(value) == np.inf:
                raise ValueError(f"{name}: expected a number from {low:g} to {high:g}, found {value}")
        if self.mirostat_mode not in (0, 2):
            raise ValueError(f"mirostat_mode: expected 0 (off) or 2, found {self.mirostat_mode}")
        if self.seed is not None and self.seed < 0:
            raise ValueError(f"seed: expected 0 or more, found {self.seed}")
        for token, bias in self.logit_bias.items():
            if not bias < np.inf:
                raise ValueError(f"logit_bias: expected a number below infinity, found {bias} for token {token}")


class Sampler:
    """Draws tokens one after another; the same settings, seed and logits give the same tokens."""

    def __init__(self, settings: SamplingSettings) -> None:
        self._settings = settings
        self._generator = np.random.default_rng(settings.seed)
        self._max_surprise = 2 * settings.mirostat_tau  # mirostat's mu

    def sample(self, logits: np.ndarray, previous: Sequence[int] = ()) -> int:
        """One token id from float32 [vocab] logits; `previous` are the tokens so far, oldest first.

        Raises ValueError when bias and penalties leave no finite logit, or one that is infinite."""
        with np.errstate(over="ignore"):  # a bias or penalty may be larger than float32
            return self._sample(logits, previous)

    def _sample(self, logits: np.ndarray, previous: Sequence[int]) -> int:
        settings = self._settings
        logits = add_bias(logits, settings.logit_bias)
        logits = penalize(logits, previous[-settings.last_n :] if settings.last_n else (), settings)
        if not np.isfinite(logits.max()):
            found = "none" if logits.max() == -np.inf else f"{logits.max()}"
            raise ValueError(f"logits: expected a finite largest one after bias and penalties, found {found}")
        if settings.temperature < _GREEDY:
            return int(logits.argmax())
        if settings.mirostat_mode:
            return self._mirostat(logits)
        tokens = candidates(logits, settings)
        return int(tokens[self._draw(softmax(logits[tokens] / settings.temperature))])

    def _draw(self, probabilities: np.ndarray) -> int:
        # One uniform draw per token, whatever the filters left.
        index = np.searchsorted(np.cumsum(probabilities), self._generator.random(), side="right")
        return int(min(index, len(probabilities) - 1))

    def _mirostat(self, logits: np.ndarray) -> int:
        """Keep the tokens that surprise less than mu bits, draw one, and move mu towards the asked surprise."""
        tokens = np.argsort(-logits, kind="stable")
        probabilities = softmax(logits[tokens] / self._settings.temperature)
        with np.errstate(divide="ignore"):
            kept = max(1, int((-np.log2(probabilities) <= self._max_surprise).sum()))
        probabilities = probabilities[:kept] / probabilities[:kept].sum()
        index = self._draw(probabilities)
        error = -np.log2(probabilities[index]) - self._settings.mirostat_tau
        self._max_surprise -= self._settings.mirostat_eta * error
        return int(tokens[index])


def add_bias(logits: np.ndarray, bias: Mapping[int, float]) -> np.ndarray:
    """float32 [vocab] logits with `bias` added. Raises ValueError for a token id outside the vocabulary."""
    if not bias:
        return logits
    logits = logits.copy()
    for token, value in bias.items():
        if not 0 <= token < len(logits):
            raise ValueError(f"logit_bias: expected token ids from 0 to {len(logits) - 1}, found {token}")
        logits[token] += value
    return logits


def penalize(logits: np.ndarray, recent: Sequence[int], settings: SamplingSettings) -> np.ndarray:
    """float32 [vocab] logits, those of `recent` tokens lowered: divided (above 0) or multiplied (below 0) by the repeat
    penalty, then less the frequency penalty for each time they appear and the presence penalty once."""
    repeat, frequency, presence = settings.repeat_penalty, settings.frequency_penalty, settings.presence_penalty
    if not len(recent) or (repeat == 1 and frequency == 0 and presence == 0):
        return logits
    logits = logits.copy()
    tokens, counts = np.unique(np.asarray(recent, np.int64), return_counts=True)
    values = logits[tokens]
    logits[tokens] = np.where(values > 0, values / repeat, values * repeat) - counts * frequency - presence
    return logits


def candidates(logits: np.ndarray, settings: SamplingSettings) -> np.ndarray:
    """Token ids that the filters leave, most likely first; at least one. Ties go to the lower id."""
    count = min(settings.top_k or len(logits), len(logits))
    threshold = np.partition(logits, len(logits) - count)[len(logits) - count]
    tokens = np.flatnonzero(logits >= threshold)
    tokens = tokens[np.argsort(-logits[tokens], kind="stable")][:count]
    for keep, limit in ((typical, settings.typical_p), (nucleus, settings.top_p)):
        if limit < 1:
            tokens = tokens[keep(softmax(logits[tokens]), limit)]
    # min-p compares with the most likely token; the ratio does not depend on what the filters before it removed.
    return tokens[logits[tokens] - logits[tokens[0]] >= np.log(max(settings.min_p, np.finfo(np.float64).tiny))]


def nucleus(probabilities: np.ndarray, total: float) -> np.ndarray:
    """Indices of the fewest probabilities, in descending order, that reach `total`."""
    return np.arange(1 + np.searchsorted(np.cumsum(probabilities)[:-1], total, side="left"))


def typical(probabilities: np.ndarray, total: float) -> np.ndarray:
    """Indices, ascending, of the tokens whose surprise is nearest the entropy, as many as exceed `total` (Meister et
    al., arXiv 2202.00666)."""
    with np.errstate(divide="ignore"):
        surprise = -np.log(probabilities)
    entropy = np.sum(np.where(probabilities > 0, probabilities * np.where(probabilities > 0, surprise, 0), 0))
    order = np.argsort(np.abs(surprise - entropy), kind="stable")
    return np.sort(order[: 1 + np.searchsorted(np.cumsum(probabilities[order])[:-1], total, side="right")])


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities, float64, of [n] logits."""
    weights = np.exp(logits - logits.max(), dtype=np.float64)
    return weights / weights.sum()


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Natural logarithms of the probabilities, float64, of [..., n] logits."""
    shifted = (logits - logits.max(axis=-1, keepdims=True)).astype(np.float64)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
