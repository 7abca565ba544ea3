"""The sequence in a session's cache: its tokens, the budget each was computed at, and evaluation that keeps count.

Owns what must change together with the C library's cache: the history, the last logits, and that one thread at a time
is inside. runtime.model is the door to it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from runtime.budget import Budget
from runtime.errors import MobiQuantError
from runtime.native import NativeModel, NativeSession
from runtime.state import SavedSession


@dataclass(frozen=True)
class SessionOptions:
    """What a session is opened with, see runtime.model.Model."""

    n_ctx: int
    n_threads: int
    n_batch: int
    kernel: str | None
    cache_type_k: str
    cache_type_v: str


class CachedSequence:
    """One session and what is remembered of its cache.

    history: tokens in the cache, each with the budget it was computed at; changes: counts those of the cache, so that a
    generation notices the ones it did not make; budget: that of the next token.
    """

    budget: Budget

    def __init__(self, native: NativeModel, options: SessionOptions) -> None:
        self.session = NativeSession(
            native,
            n_ctx=options.n_ctx,
            n_threads=options.n_threads,
            n_batch=options.n_batch,
            kernel=options.kernel,
            cache_type_k=options.cache_type_k,
            cache_type_v=options.cache_type_v,
        )
        self.history: list[tuple[int, Budget]] = []
        self.changes = 0
        self._n_batch = options.n_batch
        self._logits: np.ndarray | None = None
        self._in_use = threading.RLock()  # of one thread at a time; never waited for

    @property
    def position(self) -> int:
        """Tokens in the cache."""
        return self.session.position

    @contextmanager
    def alone(self, changes: int | None = None) -> Iterator[None]:
        """No other thread inside. changes: what the count of them must still be. Raises MobiQuantError.

        The C library refuses two evaluations at once, but what is remembered of the cache must change with it."""
        if not self._in_use.acquire(blocking=False):
            raise MobiQuantError("model: in use by another thread; fork() gives each thread its own", "MQ_ERR_BUSY")
        try:
            if changes is not None and changes != self.changes:
                raise MobiQuantError(
                    "generation: something else changed the cache since its last token; fork() gives each its own",
                    "MQ_ERR_BUSY",
                )
            yield
        finally:
            self._in_use.release()

    def set_budget(self, budget: Budget) -> None:
        """From the next token on."""
        with self.alone():
            budget.apply(self.session)
            self.budget = budget

    def rewind(self, position: int) -> None:
        """Forget the tokens from `position` on."""
        with self.alone():
            self.session.rewind(position)
            self.changes += 1
            del self.history[position:]

    def reuse(self, tokens: Sequence[int], any_budget: bool) -> int:
        """As runtime.model.Model.reuse."""
        with self.alone():
            count = 0
            for token, (cached, budget) in zip(tokens[:-1], self.history, strict=False):
                if token != cached or not (any_budget or budget == self.budget):
                    break
                count += 1
            if count < min(self.session.rewind_floor, self.position):  # a sliding window has left what comes before
                count = 0
            self.rewind(count)
            return count

    def eval(self, ids: np.ndarray, all_logits: bool) -> np.ndarray:
        """As runtime.model.Model.eval, for int32 [n], n at least 1, that fit in the context."""
        logits = np.empty((len(ids) if all_logits else 1, self.session.vocab_size), np.float32)
        with self.alone():
            for start, piece in self._pieces(ids):
                end = start + len(piece)
                self._eval_piece(piece, logits[start:end] if all_logits else logits[: int(end == len(ids))])
            self._logits = logits[-1]
        return logits if all_logits else logits[-1]

    def eval_silently(self, ids: np.ndarray) -> None:
        """Evaluate int32 [n], at most a batch of them, for what it leaves in the cache."""
        self._eval_piece(ids, np.empty((0, self.session.vocab_size), np.float32))

    def hidden(self, ids: np.ndarray, width: int) -> np.ndarray:
        """The hidden states of int32 [n] in an empty cache after the final norm, float32 [n, width]."""
        hidden = np.empty((len(ids), width), np.float32)
        with self.alone():
            self.rewind(0)
            for start, piece in self._pieces(ids):
                self._eval_piece(piece, hidden[start : start + len(piece)], hidden=True)
        return hidden

    @property
    def logits(self) -> np.ndarray:
        """Of the last token evaluated. Raises ValueError before the first."""
        if self._logits is None:
            raise ValueError("logits: expected an evaluation before, found none")
        return self._logits

    def copy(self, other: CachedSequence) -> None:
        """Take over the other's cache."""
        with other.alone():
            self.session.set_state(other.session.state())
            self.history = list(other.history)
            self._logits = other._logits

    def save(self) -> bytes:
        """As runtime.model.Model.save_state."""
        with self.alone():
            return SavedSession(self.history, self.session.state()).pack()

    def load(self, state: bytes | bytearray | memoryview) -> None:
        """As runtime.model.Model.load_state."""
        saved = SavedSession.unpack(state)
        with self.alone():
            self.session.set_state(saved.cache)
            self.changes += 1
            self.history, self._logits = list(saved.history), None
            if self.position == len(saved.history):
                return
            found = f"{self.position} in the cache and {len(saved.history)} in its header"
            self.rewind(0)
            raise ValueError(f"saved session: expected one number of tokens, found {found}")

    def _pieces(self, ids: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        for start in range(0, len(ids), self._n_batch):
            yield start, ids[start : start + self._n_batch]

    def _eval_piece(self, piece: np.ndarray, output: np.ndarray, *, hidden: bool = False) -> None:
        self.changes += 1
        self.history += ((token, self.budget) for token in piece.tolist())
        try:
            (self.session.eval_hidden if hidden else self.session.eval)(piece, output)
        finally:  # an error, or Ctrl-C
            del self.history[self.position :]
