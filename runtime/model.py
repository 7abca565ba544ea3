"""`Model`: one opened file with its cache, evaluated at any average precision; the door of the runtime.

Owns opening, forking and closing, precision, and the loop of a generation. The cache and its tokens are in
runtime.sequence; what is made of new tokens is in other files: text in runtime.generation, results in
runtime.completion, the choice of a token in runtime.sampling.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from export.keys import KEY_ADD_BOS, KEY_BOS_TOKEN, KEY_CHAT_TEMPLATE, KEY_EOS_TOKENS, KEY_NAME, KEY_TOKENIZER
from runtime.budget import DEPTH_BITS, Budget, depth_of
from runtime.chat import ChatTemplate
from runtime.completion import create_chat_completion, create_completion
from runtime.cpu import physical_cores
from runtime.errors import MobiQuantError
from runtime.generation import LogitsProcessor
from runtime.native import CACHE_TYPES, ModelInfo, NativeModel, Stats, device_for
from runtime.sampling import Sampler, SamplingSettings
from runtime.sequence import CachedSequence, SessionOptions
from runtime.tokens import Tokenizer, shared_tokenizer


class Model:
    """A MoBiQuant file ready to run. One thread at a time may use it; `fork` gives another thread its own.

    path: the GGUF file.
    n_ctx: tokens the cache holds, 0 for the model's context. n_batch: prompt tokens computed together.
    cache_type: how keys and values are kept: "f16", "q8_0" for int8 with a scale for every 32 numbers (half the
    memory), or a pair, keys first.
    n_threads: None for one per physical core. kernel: kernels to use, None for $MOBIQUANT_KERNEL or the CPU's best.
    bits: one precision for every token, 2, 4, 6 or 8. avg_bits: an average from 2 to 8, tokens routed one by one.
    bits="static:X": an average from 2 to 8 with one depth per linear, the same for every token.
    Give one of the two, or neither for the highest precision in the file.
    output_bits: 2, 4, 6 or 8 for the output head, None for the file's default.
    allow_partial: accept a file cut after its last base slice. mmap: map the file instead of reading it.
    check_tensors: read all of the file first and refuse it when a checksum or a number in it is wrong.
    seed: for completions that name none. device: "cpu"; "cuda" for the GPU; "auto" for the GPU where it can be used,
    see `device_note`, else the CPU.

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
        cache_type: str | tuple[str, str] = "f16",
        bits: int | str | None = None,
        avg_bits: float | None = None,
        output_bits: int | None = None,
        allow_partial: bool = False,
        mmap: bool = True,
        check_tensors: bool = False,
        seed: int | None = None,
        device: str = "auto",
    ) -> None:
        if n_batch < 1:
            raise ValueError(f"n_batch: expected at least 1, found {n_batch}")
        keys, values = (cache_type, cache_type) if isinstance(cache_type, str) else cache_type
        for kind in (keys, values):
            if kind not in CACHE_TYPES:
                raise ValueError(f"cache_type: expected one of {', '.join(CACHE_TYPES)}, found {kind!r}")
        budget = Budget.requested(bits, avg_bits)
        self.path = Path(path)
        self.seed = seed
        options = SessionOptions(
            n_ctx,
            physical_cores() if n_threads is None else n_threads,
            n_batch,
            kernel or os.environ.get("MOBIQUANT_KERNEL") or None,
            keys,
            values,
        )
        device = device_for(device, options.kernel, (keys, values))
        native = NativeModel(
            self.path, allow_partial=allow_partial, mmap=mmap, check_tensors=check_tensors, device=device
        )
        self._open_session(native, options)
        try:
            self.budget = budget or Budget(2 * self.info.max_depth, routed=False)
            self.output_bits = output_bits
        except BaseException:
            self.close()
            raise

    @classmethod
    def from_pretrained(
        cls,
        repo_id: str,
        filename: str | None = None,
        *,
        revision: str | None = None,
        cache_dir: str | PathLike[str] | None = None,
        **options: Any,
    ) -> Model:
        """Download a file of the Hugging Face hub, or take it from the cache, and open it.

        repo_id: "user/model". filename: the GGUF file in it, needed when there are several. options: as of Model.
        Needs `pip install 'mobiquant[hub]'`. Raises as Model and as runtime.hub.download.
        """
        from runtime.hub import download

        return cls(download(repo_id, filename, revision=revision, cache_dir=cache_dir), **options)

    def _open_session(self, native: NativeModel, options: SessionOptions) -> None:
        self._native = native.retain()
        self._options = options
        try:
            self.info: ModelInfo = native.info()
            self._sequence = CachedSequence(native, options)
        except BaseException:
            native.release()
            raise
        self._closed = False

    def fork(self, *, n_threads: int | None = None, empty: bool = False) -> Model:
        """Another session of the same opened file, to be used by another thread and closed by itself.

        It starts with a copy of this one's cache, or with none when `empty`, and with the same precision. n_threads:
        None for as many as this one has. Raises MobiQuantError when this session is in use by another thread.
        """
        other = object.__new__(type(self))
        other.path, other.seed = self.path, self.seed
        threads = self._options.n_threads if n_threads is None else n_threads
        other._open_session(self._native, replace(self._options, n_threads=threads))
        try:
            other.tokenizer, other.budget, other.output_bits = self.tokenizer, self.budget, self.output_bits
            if not empty:
                other._sequence.copy(self._sequence)
        except BaseException:
            other.close()
            raise
        return other

    def close(self) -> None:
        """Free the cache; the file is released with the last of its forks. Closing twice is allowed.

        Raises MobiQuantError when another thread is using it."""
        with self._sequence.alone():
            if not self._closed:
                self._closed = True
                if "chat" in self.__dict__:
                    self.chat.close()
                self._sequence.session.close()
                self._native.release()

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The file's tokenizer. Raises ValueError when the file has none that works."""
        json = self._native.string(KEY_TOKENIZER)
        if json is None:
            raise ValueError(f"{self.path}: key {KEY_TOKENIZER}: expected the tokenizer, found nothing")
        bos, add_bos = self._native.integers(KEY_BOS_TOKEN), self._native.integers(KEY_ADD_BOS)
        try:
            return shared_tokenizer(
                json,
                bos=bos[0] if bos else None,
                add_bos=bool(add_bos[0]) if add_bos else bool(bos),
                eos=self._native.integers(KEY_EOS_TOKENS),
            )
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from error

    @property
    def name(self) -> str:
        """The name in the file, or the file's own name."""
        return self._native.string(KEY_NAME) or self.path.stem

    @property
    def chat_template(self) -> str | None:
        """The file's chat template (Jinja), None when it has none."""
        return self._native.string(KEY_CHAT_TEMPLATE)

    @cached_property
    def chat(self) -> ChatTemplate:
        """What lays out conversations: the file's chat template, or a plain dialogue when it has none."""
        return ChatTemplate(self.chat_template, self.tokenizer)

    @property
    def kernel(self) -> str:
        """Name of the kernels in use."""
        return self._sequence.session.kernel

    @property
    def device(self) -> str:
        """Where it runs: "cpu" or "cuda"."""
        return self._native.device

    @property
    def device_note(self) -> str:
        """The GPU's name; on the CPU, what stood in the way of the GPU under device="auto"."""
        return self._native.device_note

    @property
    def n_ctx(self) -> int:
        """Tokens the cache can hold."""
        return self._sequence.session.context

    @property
    def position(self) -> int:
        """Tokens in the cache."""
        return self._sequence.position

    @property
    def cache_bytes(self) -> int:
        """Bytes of the keys and values that the cache has room for."""
        return self._sequence.session.cache_bytes

    @property
    def stats(self) -> Stats:
        """Sums since the model was opened; subtract two to measure what lies between."""
        return self._sequence.session.stats

    @property
    def bits(self) -> int | float | str:
        """The precision from the next token on: an int is one for every token, a float an average that is routed,
        "static:X" an average with one depth per linear.

        Set it at any time, also during a generation: `model.bits = 4` or `model.bits = 3.5`. Raises ValueError.
        """
        return self._sequence.budget.value

    @bits.setter
    def bits(self, value: int | float | str) -> None:
        self.budget = Budget.of(value)

    @property
    def budget(self) -> Budget:
        """The same as `bits`, spelled out."""
        return self._sequence.budget

    @budget.setter
    def budget(self, budget: Budget) -> None:
        most = DEPTH_BITS[self.info.max_depth - 1]
        if budget.bits > most:
            raise ValueError(f"bits: expected at most {most}, what {self.path} holds, found {budget.bits:g}")
        self._sequence.set_budget(budget)

    @property
    def output_bits(self) -> int:
        """The precision of the output head: 2, 4, 6 or 8; set None for the file's default. Raises ValueError."""
        return 2 * self._output_depth

    @output_bits.setter
    def output_bits(self, bits: int | None) -> None:
        depth = self.info.output_depth if bits is None else depth_of(bits, "output_bits")
        self._sequence.session.set_output_depth(depth)
        self._output_depth = depth

    def tokenize(self, text: str | bytes, add_bos: bool = True, special: bool = False) -> list[int]:
        """Token ids of `text`, see runtime.tokens.Tokenizer.encode."""
        return self.tokenizer.encode(text, add_bos=add_bos, special=special)

    def detokenize(self, tokens: Sequence[int], special: bool = False) -> bytes:
        """UTF-8 text of token ids; special tokens are left out unless `special`."""
        return self.tokenizer.decode(tokens, special=special).encode("utf-8")

    def reset(self) -> None:
        """Forget all tokens."""
        self._sequence.rewind(0)

    def reuse(self, tokens: Sequence[int], *, any_budget: bool = False) -> int:
        """Keep of the cache what begins `tokens` and was computed at the present budget, or `any_budget`.

        Forgets the rest. Returns how many tokens are kept: never the last, which is computed again for its logits.
        """
        return self._sequence.reuse(tokens, any_budget)

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
        return self._sequence.eval(ids, all_logits)

    @property
    def logits(self) -> np.ndarray:
        """float32 [vocab_size] of the last token evaluated. Raises ValueError before the first."""
        return self._sequence.logits

    def depths(self, first: int, n: int) -> np.ndarray:
        """Slices that tokens first..first+n-1 of the cache read: uint8 [n, blocks, 7], linears in the order q, k, v,
        output, gate, up, down."""
        return self._sequence.session.depths(first, n)

    def average_bits(self, depths: np.ndarray) -> np.ndarray:
        """Average bits per weight that tokens read, float64 [n], from their depths [n, blocks, 7]."""
        sizes = self.info.linear_sizes
        return 2 * (depths.sum(axis=1, dtype=np.int64) @ sizes) / (depths.shape[1] * sizes.sum())

    def embed(self, text: str | bytes | Sequence[int], *, pooling: str = "mean", normalize: bool = True) -> np.ndarray:
        """The hidden states of `text`, or of token ids, after the final norm, in an empty cache.

        pooling: "mean" or "last" for one vector, float32 [width]; "none" for one per token, [n, width]. normalize: to
        length 1. Raises ValueError for another pooling and for no tokens, MobiQuantError as `eval`.
        """
        if pooling not in ("mean", "last", "none"):
            raise ValueError(f"pooling: expected mean, last or none, found {pooling!r}")
        ids = np.array(self.tokenize(text) if isinstance(text, str | bytes) else text, np.int32)
        if not len(ids):
            raise ValueError("embed: expected at least one token, found none")
        hidden = self._sequence.hidden(ids, self.info.embedding_length)
        vectors = hidden if pooling == "none" else hidden[-1] if pooling == "last" else hidden.mean(axis=0)
        return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True) if normalize else vectors

    def save_state(self) -> bytes:
        """The cache with its tokens, for `load_state` of a model opened from the same file."""
        return self._sequence.save()

    def load_state(self, state: bytes | bytearray | memoryview) -> None:
        """Continue where `save_state` was called. Everything is checked before the cache changes.

        Raises ValueError for bytes that are no saved session, MobiQuantError when the cache in them is damaged, belongs
        to another file or does not fit in the context.
        """
        self._sequence.load(state)

    def generate(
        self,
        tokens: Sequence[int],
        sampling: SamplingSettings | None = None,
        *,
        logits_processors: Sequence[LogitsProcessor] = (),
        keep_cache: bool = False,
        cancelled: Callable[[], bool] | None = None,
    ) -> Iterator[int]:
        """Token ids that continue `tokens`, up to and including an end token or until the context is full.

        What the cache already holds of `tokens`, computed at the present budget, is not computed again; with
        `keep_cache`, whatever budget it was computed at. logits_processors: each gets the tokens so far, int64 [n], and
        the logits, float32 [vocab], and returns logits. cancelled: asked between tokens and between pieces of the
        prompt; when true the generation ends. Raises as `eval` does, and when the cache was changed between two tokens.
        """
        sampler = Sampler(sampling or SamplingSettings(seed=self.seed))
        sequence = [int(token) for token in tokens]
        if len(sequence) > self.n_ctx:
            raise MobiQuantError(
                f"prompt: expected at most {self.n_ctx} tokens, the context, found {len(sequence)}",
                "MQ_ERR_CONTEXT_FULL",
            )
        cache = self._sequence
        with cache.alone():
            pending = sequence[cache.reuse(sequence, keep_cache) :]
            changes = cache.changes
        while True:
            while len(pending) > self._options.n_batch and not (cancelled and cancelled()):
                with cache.alone(changes):
                    cache.eval_silently(np.array(pending[: self._options.n_batch], np.int32))
                    changes = cache.changes
                pending = pending[self._options.n_batch :]
            if cancelled and cancelled():
                return
            with cache.alone(changes):
                logits = self.eval(pending)
                changes = cache.changes
            for process in logits_processors:
                logits = process(np.array(sequence, np.int64), logits)
            token = sampler.sample(logits, sequence)
            sequence.append(token)
            yield token
            if token in self.tokenizer.eos or self.position >= self.n_ctx:
                return
            pending = [token]

    create_completion = __call__ = create_completion
    create_chat_completion = create_chat_completion
