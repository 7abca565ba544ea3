"""Perplexity and divergence from logits, and the windows they are taken over (numpy only).

Shared by the torch evaluation and the device runtime, so that both count the same tokens the same way.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RULES = ("all", "llama.cpp")
_LLAMA_CPP_WINDOW = 1024  # the window of published figures under that rule
_ROWS = 128  # tokens whose float64 probabilities are held at once: with a vocabulary of 128 k, 128 MB each


@dataclass(frozen=True)
class Window:
    """tokens: int32 [n]; the logits at positions first_scored-1 .. n-2 predict the tokens first_scored .. n-1."""

    tokens: np.ndarray
    first_scored: int

    @property
    def targets(self) -> np.ndarray:
        """The scored tokens, int32 [n - first_scored]; `logits[first_scored - 1 : -1]` belongs to them."""
        return self.tokens[self.first_scored :]


def default_window(rule: str, context: int) -> int:
    """Tokens of a window when none is asked for: the model's context; under "llama.cpp" 1,024 at most."""
    return min(context, _LLAMA_CPP_WINDOW) if rule == "llama.cpp" else context


def make_windows(token_ids: Sequence[int] | np.ndarray, rule: str, context: int, bos: int) -> list[Window]:
    """Cut token ids, without begin-of-text, into windows of `context` tokens.

    rule "all": windows do not overlap, each starts with an extra `bos`, every later token is scored; a last, shorter
    window is kept. rule "llama.cpp" (llama-perplexity): `bos` is put before the text, which is cut into full windows;
    the first token of each is overwritten by `bos` and the second half of the positions is scored as that tool does:
    logits at context/2 .. context-2.
    Raises ValueError on another rule, a context too short, or a text too short for one window.
    """
    ids = np.asarray(token_ids, np.int32)
    if rule not in RULES:
        raise ValueError(f"rule: expected one of {', '.join(RULES)}, found {rule!r}")
    if ids.ndim != 1:
        raise ValueError(f"token_ids: expected one dimension, found shape {ids.shape}")
    if context < 4:
        raise ValueError(f"context: expected at least 4 tokens, found {context}")
    if rule == "all":
        pieces = [ids[start : start + context - 1] for start in range(0, len(ids), context - 1)]
        windows = [Window(np.concatenate((np.array([bos], np.int32), piece)), 1) for piece in pieces]
    else:
        ids = np.concatenate((np.array([bos], np.int32), ids))
        starts = range(0, len(ids) - context + 1, context)
        # The first scored logits are at position context/2, so the first scored token is the next one.
        windows = [
            Window(np.concatenate((np.array([bos], np.int32), ids[start + 1 : start + context])), context // 2 + 1)
            for start in starts
        ]
    if not windows:
        raise ValueError(f"text: expected enough tokens for one window of {context}, found {len(ids)}")
    return windows


@dataclass
class Score:
    """Sums over scored tokens. nll and kld are in nats; the last two only grow when reference logits are given."""

    nll: float = 0.0
    tokens: int = 0
    reference_tokens: int = 0
    kld_sum: float = 0.0
    top1_sum: int = 0

    def add(self, logits: np.ndarray, targets: np.ndarray, reference: np.ndarray | None = None) -> None:
        """Count n tokens.

        logits: float32 [n, vocab]; targets: int [n]; reference: float32 [n, vocab], the full-precision logits.
        Raises ValueError on shapes that disagree or logits that are not finite.
        """
        if logits.ndim != 2 or targets.shape != logits.shape[:1]:
            raise ValueError(f"targets: expected shape {logits.shape[:1]}, found {targets.shape}")
        if reference is not None and reference.shape != logits.shape:
            raise ValueError(f"reference: expected shape {logits.shape}, found {reference.shape}")
        for start in range(0, len(logits), _ROWS):
            rows = slice(start, start + _ROWS)
            self._add_rows(logits[rows], targets[rows], None if reference is None else reference[rows])

    def _add_rows(self, logits: np.ndarray, targets: np.ndarray, reference: np.ndarray | None) -> None:
        log_probs = log_softmax(logits)
        if not np.isfinite(log_probs).all():
            raise ValueError("logits: expected finite numbers, found infinity or NaN")
        self.nll -= float(np.take_along_axis(log_probs, targets[:, None].astype(np.int64), 1).sum(dtype=np.float64))
        self.tokens += len(targets)
        if reference is not None:
            reference_log_probs = log_softmax(reference)
            gap = np.exp(reference_log_probs) * (reference_log_probs - log_probs)
            self.kld_sum += float(gap.sum(dtype=np.float64))
            self.top1_sum += int((logits.argmax(1) == reference.argmax(1)).sum())
            self.reference_tokens += len(targets)

    def __iadd__(self, other: Score) -> Score:
        """Take over the tokens that `other` has counted."""
        self.nll += other.nll
        self.tokens += other.tokens
        self.reference_tokens += other.reference_tokens
        self.kld_sum += other.kld_sum
        self.top1_sum += other.top1_sum
        return self

    @property
    def ppl(self) -> float:
        """exp of the mean negative log likelihood."""
        return float(np.exp(self.nll / self.tokens)) if self.tokens else float("nan")

    @property
    def kld(self) -> float | None:
        """Mean KL divergence of these logits from the reference, nats per token."""
        return self.kld_sum / self.reference_tokens if self.reference_tokens else None

    @property
    def top1(self) -> float | None:
        """Share of tokens whose most likely successor is the reference's."""
        return self.top1_sum / self.reference_tokens if self.reference_tokens else None

    def to_dict(self, avg_bits: float) -> dict[str, float | int]:
        """ppl, tokens, avg_bits, and kld and top1 when a reference was given."""
        result: dict[str, float | int] = {"ppl": self.ppl, "tokens": self.tokens, "avg_bits": avg_bits}
        if self.kld is not None and self.top1 is not None:
            result |= {"kld": self.kld, "top1": self.top1}
        return result


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log probabilities of float32 [n, vocab], computed and returned in float64."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted


def format_result(result: dict[str, float | int], output: str) -> str:
    """A score as one JSON object, or as `key value` pairs on one line. output: "json" or "text"."""
    if output == "json":
        return json.dumps(result)
    return "  ".join(f"{key} {value:.6g}" for key, value in result.items())
