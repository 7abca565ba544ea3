"""`Model`: one opened file with its cache, evaluated at any average precision; the door of the runtime.

Owns the policy over the C library: budgets, reuse of the cache between prompts, pieces of a long prompt. Text
completion is in runtime.completion, the choice of a token in runtime.sampling.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from os import PathLike
from pathlib import Path
from types import TracebackType

import numpy as np

from export.keys import KEY_ADD_BOS, KEY_BOS_TOKEN, KEY_CHAT_TEMPLATE, KEY_EOS_TOKENS, KEY_NAME, KEY_TOKENIZER
from runtime.budget import DEPTH_BITS, Budget, depth_of
from runtime.completion import create_completion
from runtime.cpu import physical_cores
from runtime.errors import MobiQuantError
from runtime.native import ModelInfo, NativeModel, NativeSession, Stats
from runtime.sampling import Sampler, SamplingSettings
from runtime.tokens import Tokenizer


class Model:
    """A MoBiQuant file ready to run.

    path: the GGUF file.
    n_ctx: tokens the cache holds, 0 for the model's context. n_batch: prompt tokens computed together.
    n_threads: None for one per physical core. kernel: kernels to use, None for $MOBIQUANT_KERNEL or the CPU's best.
    bits: one precision for every token, 2, 4, 6 or 8. avg_bits: an average from 2 to 8, tokens routed one by one.
    bits="static:X": an average from 2 to 8 with one depth per linear, the same for every token.
    Give one of the two, or neither for the highest precision in the file.
    output_bits: 2, 4, 6 or 8 for the output head, None for the file's default.
    allow_partial: accept a file cut after its last base slice. mmap: map the file instead of reading it.
    seed: for completions that name none.

    Raises MobiQuantError when the file or an option is refused, ValueError for a bad argument.
    """

    def __init__(
        self,
        path: str | PathLike[str],
        *,
        n_ctx: int = 0,
        n_threads: int | None = None,
        n_batch: int = 512,
        kernel: str | None = None,
        bits: int | str | None = None,
        avg_bits: float | None = None,
        output_bits: int | None = None,
        allow_partial: bool = False,
        mmap: bool = True,
        seed: int | None = None,
    ) -> None:
        if n_batch < 1:
            raise ValueError(f"n_batch: expected at least 1, found {n_batch}")
        budget = Budget.requested(bits, avg_bits)
        self.path = Path(path)
        self.seed = seed
        self._n_batch = n_batch
        self._native = NativeModel(self.path, allow_partial=allow_partial, mmap=mmap)
        try:
            self.info: ModelInfo = self._native.info()
            self._session = NativeSession(
                self._native,
                n_ctx=n_ctx,
                n_threads=physical_cores() if n_threads is None else n_threads,
                n_batch=n_batch,
                kernel=kernel or os.environ.get("MOBIQUANT_KERNEL") or None,
            )
        except BaseException:
            self._native.close()
            raise
        # Tokens in the cache, each with the budget it was computed at.
        self._history: list[tuple[int, Budget]] = []
        self._logits: np.ndarray | None = None
        try:
            self.budget = budget or Budget(2 * self.info.max_depth, routed=False)
            if output_bits is not None:
                self._session.set_output_depth(depth_of(output_bits, "output_bits"))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Free the cache and release the file. Closing twice is allowed."""
        self._session.close()
        self._native.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The file's tokenizer. Raises ValueError when the file has none."""
        json = self._native.string(KEY_TOKENIZER)
        if json is None:
            raise ValueError(f"{self.path}: key {KEY_TOKENIZER}: expected the tokenizer, found nothing")
        bos, add_bos = self._native.integers(KEY_BOS_TOKEN), self._native.integers(KEY_ADD_BOS)
        return Tokenizer(
            json,
            bos=bos[0] if bos else None,
            add_bos=bool(add_bos[0]) if add_bos else bool(bos),
            eos=self._native.integers(KEY_EOS_TOKENS),
        )

    @property
    def name(self) -> str:
        """The name in the file, or the file's own name."""
        return self._native.string(KEY_NAME) or self.path.stem

    @property
    def chat_template(self) -> str | None:
        """The file's chat template (Jinja), None when it has none."""
        return self._native.string(KEY_CHAT_TEMPLATE)

    @property
    def kernel(self) -> str:
        """Name of the kernels in use."""
        return self._session.kernel

    @property
    def n_ctx(self) -> int:
        """Tokens the cache can hold."""
        return self._session.context

    @property
    def position(self) -> int:
        """Tokens in the cache."""
        return self._session.position

    @property
    def stats(self) -> Stats:
        """Sums since the model was opened; subtract two to measure what lies between."""
        return self._session.stats

    @property
    def bits(self) -> int | float | str:
        """The precision from the next token on: an int is one for every token, a float an average that is routed,
        "static:X" an average with one depth per linear.

        Set it at any time, also during a generation: `model.bits = 4` or `model.bits = 3.5`. Raises ValueError.
        """
        return self._budget.value

    @bits.setter
    def bits(self, value: int | float | str) -> None:
        self.budget = Budget.of(value)

    @property
    def budget(self) -> Budget:
        """The same as `bits`, spelled out."""
        return self._budget

    @budget.setter
    def budget(self, budget: Budget) -> None:
        most = DEPTH_BITS[self.info.max_depth - 1]
        if budget.bits > most:
            raise ValueError(f"bits: expected at most {most}, what {self.path} holds, found {budget.bits:g}")
        budget.apply(self._session)
        self._budget = budget

    def tokenize(self, text: str | bytes, add_bos: bool = True, special: bool = False) -> list[int]:
        """Token ids of `text`, see runtime.tokens.Tokenizer.encode."""
        return self.tokenizer.encode(text, add_bos=add_bos, special=special)

    def detokenize(self, tokens: Sequence[int], special: bool = False) -> bytes:
        """UTF-8 text of token ids; special tokens are left out unless `special`."""
        return self.tokenizer.decode(tokens, special=special).encode("utf-8")

    def reset(self) -> None:
        """Forget all tokens."""
        self._rewind(0)

    def reuse(self, tokens: Sequence[int]) -> int:
        """Keep of the cache what begins `tokens` and was computed at the present budget, and forget the rest.

        Returns how many tokens are kept: never the last, which is computed again for its logits.
        """
        count = self._reusable(list(tokens))
        self._rewind(count)
        return count

    def eval(self, tokens: Sequence[int] | np.ndarray, all_logits: bool = False) -> np.ndarray:
        """Evaluate tokens after those in the cache.

        Returns float32 logits [vocab_size] of the last token, or [n, vocab_size] of each when `all_logits`.
        Long input is computed in pieces of n_batch, so that Ctrl-C works in between; the pieces done stay in the cache.
        Raises ValueError for no tokens, MobiQuantError for a bad token id or when they do not fit in the context.
        """
        ids = np.ascontiguousarray(tokens, np.int32)
        if ids.ndim != 1 or not len(ids):
            raise ValueError(f"tokens: expected at least one token in one dimension, found shape {ids.shape}")
        if self.position + len(ids) > self.n_ctx:
            used = f" of which {self.position} are used" if self.position else ""
            raise MobiQuantError(
                f"context: expected at most {self.n_ctx} tokens{used}, found {len(ids)} to add", "MQ_ERR_CONTEXT_FULL"
            )
        logits = np.empty((len(ids) if all_logits else 1, self.info.vocab_size), np.float32)
        for start in range(0, len(ids), self._n_batch):
            piece = ids[start : start + self._n_batch]
            end = start + len(piece)
            wanted = logits[start:end] if all_logits else logits[: int(end == len(ids))]
            self._session.eval(piece, wanted)
            self._history += ((token, self._budget) for token in piece.tolist())
        self._logits = logits[-1]
        return logits if all_logits else logits[-1]

    @property
    def logits(self) -> np.ndarray:
        """float32 [vocab_size] of the last token evaluated. Raises ValueError before the first."""
        if self._logits is None:
            raise ValueError("logits: expected an evaluation before, found none")
        return self._logits

    def depths(self, first: int, n: int) -> np.ndarray:
        """Slices that tokens first..first+n-1 of the cache read: uint8 [n, blocks, 7], linears in the order q, k, v,
        output, gate, up, down."""
        return self._session.depths(first, n)

    def generate(self, tokens: Sequence[int], sampling: SamplingSettings | None = None) -> Iterator[int]:
        """Token ids that continue `tokens`, up to and including an end token or until the context is full.

        What the cache already holds of `tokens`, computed at the present budget, is not computed again.
        Raises as `eval` does.
        """
        sampler = Sampler(sampling or SamplingSettings(seed=self.seed))
        sequence = [int(token) for token in tokens]
        self._rewind(self._reusable(sequence))
        pending = sequence[self.position :]
        while True:
            token = sampler.sample(self.eval(pending), sequence)
            sequence.append(token)
            yield token
            if token in self.tokenizer.eos or self.position >= self.n_ctx:
                return
            pending = [token]

    create_completion = __call__ = create_completion

    def _rewind(self, position: int) -> None:
        self._session.rewind(position)
        del self._history[position:]

    def _reusable(self, tokens: list[int]) -> int:
        """How many tokens from the start the cache holds at the present budget; the last is always computed again,
        for its logits."""
        count = 0
        for token, (cached, budget) in zip(tokens[:-1], self._history, strict=False):
            if token != cached or budget != self._budget:
                break
            count += 1
        return count
