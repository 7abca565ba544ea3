"""One generation: tokens drawn from a model become pieces of text, with what each token read and how likely it was.

Owns the limits of a generation (count, stop strings, end tokens, precision for this one only) and its figures. Knows a
model by the protocol below; the forms in which results go out are in runtime.completion.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from runtime.budget import Budget
from runtime.native import Stats
from runtime.sampling import SamplingSettings, log_softmax
from runtime.stream import StopStrings, TextStream
from runtime.tokens import Tokenizer

LogitsProcessor = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(int64 [n] tokens so far, float32 [vocab] logits) -> logits, as in llama-cpp-python and transformers."""


class TokenModel(Protocol):
    """What a generation needs of a model; runtime.model.Model is one."""

    budget: Budget

    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def name(self) -> str: ...
    @property
    def seed(self) -> int | None: ...
    @property
    def position(self) -> int: ...
    @property
    def stats(self) -> Stats: ...
    @property
    def logits(self) -> np.ndarray: ...
    def depths(self, first: int, n: int) -> np.ndarray: ...
    def average_bits(self, depths: np.ndarray) -> np.ndarray: ...
    def reset(self) -> None: ...
    def eval(self, tokens: Sequence[int] | np.ndarray, all_logits: bool = False) -> np.ndarray: ...
    def generate(
        self,
        tokens: Sequence[int],
        sampling: SamplingSettings | None = None,
        *,
        logits_processors: Sequence[LogitsProcessor] = (),
        keep_cache: bool = False,
        cancelled: Callable[[], bool] | None = None,
    ) -> Iterator[int]: ...


@dataclass(frozen=True)
class Likelihood:
    """Natural logarithm of a token's probability before sampling, and the most likely tokens with theirs."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Step:
    """One generated token. bits: average bits per weight read by the pass that chose it, of which depths are the
    slices, uint8 [blocks, 7], linears in the order q, k, v, output, gate, up, down."""

    token: int
    bits: float
    depths: np.ndarray
    likelihood: Likelihood | None = None


@dataclass(frozen=True)
class Piece:
    """What one token added to the text. The last piece has a finish reason: "stop" (end token or stop string) or
    "length". steps: the tokens whose text this completes; several where one alone was an incomplete character."""

    text: str
    steps: tuple[Step, ...] = ()
    finish_reason: str | None = None


@dataclass(frozen=True)
class Request:
    """What to generate. tokens: the prompt. max_tokens: None for as many as the context holds. stop: strings that end
    the text and are not part of it. budget: precision of this generation only; None leaves it to `model.bits`, which
    may change while it runs. logprobs: None, or how many of the most likely tokens each step lists. keep_cache: use
    what the cache holds of the prompt even if it was computed at another precision. continues: the text goes on from
    that of the prompt, so that a space between the two belongs to it; an answer in a conversation does not."""

    tokens: Sequence[int]
    max_tokens: int | None = None
    stop: Sequence[str] = ()
    budget: Budget | None = None
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    logits_processors: Sequence[LogitsProcessor] = ()
    logprobs: int | None = None
    keep_cache: bool = False
    continues: bool = True

    def __post_init__(self) -> None:
        if not len(self.tokens):
            raise ValueError("prompt: expected at least one token, found none")


@dataclass(frozen=True)
class Figures:
    """Speed and traffic of a generation. The first token comes with the prompt, so `generation` counts from the second;
    both are sums as in Model.stats."""

    prompt_tokens: int
    completion_tokens: int
    prompt: Stats
    prompt_s: float
    generation: Stats
    generation_s: float

    @property
    def measured(self) -> Stats:
        """The generation's sums, or the prompt's when one token was all."""
        return self.generation if self.generation.tokens else self.prompt


class Generation:
    """Iterate it once for the pieces; `steps`, `finish_reason` and `figures` tell what has come so far."""

    def __init__(self, model: TokenModel, request: Request, cancelled: Callable[[], bool] | None = None) -> None:
        self._model = model
        self._request = request
        self._cancelled = cancelled
        self.steps: list[Step] = []
        self.finish_reason: str | None = None
        self._start = self._prompt_end = time.perf_counter()
        self._stats_start = self._stats_prompt = model.stats
        self._end, self._stats_end = self._start, self._stats_start

    def __iter__(self) -> Iterator[Piece]:
        model, request = self._model, self._request
        before = model.budget
        if request.budget is not None:
            model.budget = request.budget
        self._start, self._stats_start = time.perf_counter(), model.stats
        try:
            for piece in self._pieces():
                self.finish_reason = piece.finish_reason
                yield piece
        finally:
            if request.budget is not None:
                model.budget = before

    @property
    def figures(self) -> Figures:
        return Figures(
            prompt_tokens=len(self._request.tokens),
            completion_tokens=len(self.steps),
            prompt=self._stats_prompt - self._stats_start,
            prompt_s=self._prompt_end - self._start,
            generation=self._stats_end - self._stats_prompt,
            generation_s=self._end - self._prompt_end,
        )

    def _pieces(self) -> Iterator[Piece]:
        request, stops = self._request, StopStrings(self._request.stop)
        stream = TextStream(self._model.tokenizer, request.tokens if request.continues else ())
        waiting: list[Step] = []  # tokens whose text is not out yet
        reason = "length"  # unless an end token, a stop string or the caller ends it before
        for step in self._steps():
            if step.token in self._model.tokenizer.eos:
                reason = "stop"
                break
            self.steps.append(step)
            waiting.append(step)
            text, stopped = stops.push(stream.push(step.token))
            if stopped:
                yield Piece(text, tuple(waiting), "stop")
                return
            yield Piece(text, tuple(waiting) if text else ())
            if text:
                waiting.clear()
            if len(self.steps) == request.max_tokens:
                break
        text, stopped = stops.push(stream.flush())
        yield Piece(text if stopped else text + stops.flush(), tuple(waiting), "stop" if stopped else reason)

    def _steps(self) -> Iterator[Step]:
        model, request = self._model, self._request
        if request.max_tokens == 0:
            return
        tokens = model.generate(
            request.tokens,
            request.sampling,
            logits_processors=request.logits_processors,
            keep_cache=request.keep_cache,
            cancelled=self._cancelled,
        )
        for index, token in enumerate(tokens):
            self._end, self._stats_end = time.perf_counter(), model.stats
            if index == 0:
                self._prompt_end, self._stats_prompt = self._end, self._stats_end
            depths = model.depths(model.position - 1, 1)
            step = Step(token, float(model.average_bits(depths)[0]), depths[0])
            if request.logprobs is not None:
                step = replace(step, likelihood=likelihoods(model.logits[None], [token], request.logprobs)[0])
            yield step


def likelihoods(logits: np.ndarray, tokens: Sequence[int], top: int) -> list[Likelihood]:
    """Of tokens [n] under float32 logits [n, vocab], each with the `top` most likely alternatives."""
    logprobs = log_softmax(logits)
    found = []
    for row, token in zip(logprobs, tokens, strict=True):
        best = np.argpartition(-row, min(top, len(row) - 1))[:top]
        best = best[np.argsort(-row[best], kind="stable")]
        found.append(Likelihood(float(row[token]), tuple((int(other), float(row[other])) for other in best)))
    return found


_SCORED_TOGETHER = 64  # prompt tokens whose logits are held at once


def prompt_likelihoods(
    model: TokenModel, tokens: Sequence[int], top: int, cancelled: Callable[[], bool] | None = None
) -> list[Likelihood | None]:
    """Of every prompt token given those before it; None for the first, and for the rest once `cancelled` is true.
    Leaves the prompt in the cache."""
    model.reset()
    found: list[Likelihood | None] = [None]
    for start in range(0, len(tokens), _SCORED_TOGETHER):
        if cancelled and cancelled():
            return found + [None] * (len(tokens) - len(found))
        logits = model.eval(tokens[start : start + _SCORED_TOGETHER], all_logits=True)
        following = tokens[start + 1 : start + 1 + len(logits)]
        found += likelihoods(logits[: len(following)], following, top)
    return found
