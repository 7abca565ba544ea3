"""Completions and chat completions over a model, in the result shapes of llama-cpp-python and the OpenAI API.

`create_completion` and `create_chat_completion` are methods of runtime.model.Model. Beside the usual fields a result
has `bits` (average bits read per weight, for every token and overall) and `timings` (llama-server's names).
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, overload

from runtime.budget import Budget
from runtime.chat import ChatTemplate, Message
from runtime.generation import (
    Figures,
    Generation,
    Likelihood,
    LogitsProcessor,
    Piece,
    Request,
    Step,
    TokenModel,
    prompt_likelihoods,
)
from runtime.sampling import SamplingOptions, SamplingSettings
from runtime.tokens import Tokenizer, as_text

if TYPE_CHECKING:
    from typing_extensions import Unpack

Result = dict[str, Any]


class ChatModel(TokenModel, Protocol):
    """A model that can also lay out a conversation."""

    @property
    def chat(self) -> ChatTemplate: ...


class CompletionOptions(SamplingOptions, total=False):
    """Keyword arguments that both kinds of completion share."""

    stop: str | Sequence[str] | None
    logits_processor: LogitsProcessor | Sequence[LogitsProcessor]
    avg_bits: float | None
    bits: int | str | None
    keep_cache: bool
    cancelled: Callable[[], bool] | None


@overload
def create_completion(
    model: TokenModel,
    prompt: str | bytes | Sequence[int],
    max_tokens: int | None = 16,
    *,
    stream: Literal[False] = False,
    echo: bool = False,
    logprobs: int | None = None,
    **options: Unpack[CompletionOptions],
) -> Result: ...
@overload
def create_completion(
    model: TokenModel,
    prompt: str | bytes | Sequence[int],
    max_tokens: int | None = 16,
    *,
    stream: Literal[True],
    echo: bool = False,
    logprobs: int | None = None,
    **options: Unpack[CompletionOptions],
) -> Iterator[Result]: ...
def create_completion(
    model: TokenModel,
    prompt: str | bytes | Sequence[int],
    max_tokens: int | None = 16,
    *,
    stop: str | Sequence[str] | None = None,
    echo: bool = False,
    stream: bool = False,
    logprobs: int | None = None,
    logits_processor: LogitsProcessor | Sequence[LogitsProcessor] = (),
    avg_bits: float | None = None,
    bits: int | str | None = None,
    keep_cache: bool = False,
    cancelled: Callable[[], bool] | None = None,
    **sampling: Unpack[SamplingOptions],
) -> Result | Iterator[Result]:
    """Complete `prompt`, text or token ids; with `stream`, an iterator of chunks.

    max_tokens: None or less than 0: until the context is full; 0: none, useful with `echo`. stop: text at which to end,
    not part of the result. echo: begin with the prompt. logprobs: list this many alternatives for each token, with
    `echo` for the prompt's too. logits_processor: called before each draw with the tokens so far and the logits.
    avg_bits, bits: precision of this completion only, as in Model. keep_cache: use what the cache holds of the prompt
    even if it was computed at another precision. cancelled: asked between tokens and between pieces
    of the prompt; when true the completion ends. sampling: see SamplingSettings; without a seed, the model's.
    Raises ValueError for a bad argument, MobiQuantError when the prompt does not fit in the context.
    """
    tokens = model.tokenizer.encode(prompt) if isinstance(prompt, str | bytes) else [int(token) for token in prompt]
    request = Request(
        tokens,
        None if max_tokens is None or max_tokens < 0 else max_tokens,
        _as_stops(stop),
        Budget.requested(bits, avg_bits),
        _settings(model, sampling),
        [logits_processor] if callable(logits_processor) else logits_processor,
        logprobs,
        keep_cache,
    )
    head = _head("cmpl", "text_completion", model)
    before: list[Likelihood | None] = []
    start = ""
    if echo:
        start = model.tokenizer.decode(tokens) if not isinstance(prompt, str | bytes) else as_text(prompt)
        if logprobs is not None:
            before = _scored_prompt(model, request, cancelled)
    generation = Generation(model, request, cancelled)
    log = _CompletionLogprobs(model.tokenizer, logprobs is not None)
    if stream:
        return _completion_chunks(head, start, log.of_prompt(tokens, before), generation, log)
    texts, found = [start], [log.of_prompt(tokens, before)]
    for piece in generation:
        texts.append(piece.text)
        found.append(log.of(piece.steps))
    choice = _choice("".join(texts), log.joined(found), generation.finish_reason)
    return head | {"choices": [choice]} | _totals(generation)


@overload
def create_chat_completion(
    model: ChatModel,
    messages: Sequence[Message],
    max_tokens: int | None = None,
    *,
    stream: Literal[False] = False,
    logprobs: bool = False,
    top_logprobs: int = 0,
    **options: Unpack[CompletionOptions],
) -> Result: ...
@overload
def create_chat_completion(
    model: ChatModel,
    messages: Sequence[Message],
    max_tokens: int | None = None,
    *,
    stream: Literal[True],
    logprobs: bool = False,
    top_logprobs: int = 0,
    **options: Unpack[CompletionOptions],
) -> Iterator[Result]: ...
def create_chat_completion(
    model: ChatModel,
    messages: Sequence[Message],
    max_tokens: int | None = None,
    *,
    stop: str | Sequence[str] | None = None,
    stream: bool = False,
    logprobs: bool = False,
    top_logprobs: int = 0,
    logits_processor: LogitsProcessor | Sequence[LogitsProcessor] = (),
    avg_bits: float | None = None,
    bits: int | str | None = None,
    keep_cache: bool = False,
    cancelled: Callable[[], bool] | None = None,
    **sampling: Unpack[SamplingOptions],
) -> Result | Iterator[Result]:
    """The assistant's answer to a conversation, laid out by the file's chat template; with `stream`, chunks.

    messages: mappings with `role` and `content`. logprobs, top_logprobs: as in the OpenAI API. The other arguments and
    the errors are those of create_completion and of ChatTemplate.encode.
    """
    request = Request(
        model.chat.encode(messages),
        None if max_tokens is None or max_tokens < 0 else max_tokens,
        (*_as_stops(stop), *model.chat.stop),
        Budget.requested(bits, avg_bits),
        _settings(model, sampling),
        [logits_processor] if callable(logits_processor) else logits_processor,
        top_logprobs if logprobs else None,
        keep_cache,
        continues=False,
    )
    generation = Generation(model, request, cancelled)
    if stream:
        return _chat_chunks(_head("chatcmpl", "chat.completion.chunk", model), generation, model.tokenizer)
    text = "".join(piece.text for piece in generation)
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": text},
        "logprobs": _chat_logprobs(generation.steps, model.tokenizer),
        "finish_reason": generation.finish_reason,
    }
    return _head("chatcmpl", "chat.completion", model) | {"choices": [choice]} | _totals(generation)


def _completion_chunks(
    head: Result, start: str, start_log: Result | None, generation: Generation, log: _CompletionLogprobs
) -> Iterator[Result]:
    if start:
        yield head | {"choices": [_choice(start, start_log, None)]}
    for piece in generation:
        if piece.text or piece.finish_reason:
            choice = _choice(piece.text, log.of(piece.steps), piece.finish_reason)
            yield head | {"choices": [choice]} | _chunk_end(piece, generation)


def _chat_chunks(head: Result, generation: Generation, tokenizer: Tokenizer) -> Iterator[Result]:
    def chunk(delta: Result, piece: Piece | None = None, *, ends: bool = False) -> Result:
        reason = piece.finish_reason if piece and ends else None
        logprobs = _chat_logprobs(piece.steps, tokenizer) if piece and not ends else None
        return head | {"choices": [{"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": reason}]}

    yield chunk({"role": "assistant", "content": ""})
    for piece in generation:
        if piece.text:
            yield chunk({"content": piece.text}, piece) | {"bits": _bits(piece.steps)}
        if piece.finish_reason:
            yield chunk({}, piece, ends=True) | _totals(generation)


def _chunk_end(piece: Piece, generation: Generation) -> Result:
    return {"bits": _bits(piece.steps)} if piece.finish_reason is None else _totals(generation)


def _head(prefix: str, kind: str, model: TokenModel) -> Result:
    return {"id": f"{prefix}-{uuid.uuid4()}", "object": kind, "created": int(time.time()), "model": model.name}


def _choice(text: str, logprobs: Result | None, finish_reason: str | None) -> Result:
    return {"text": text, "index": 0, "logprobs": logprobs, "finish_reason": finish_reason}


def _totals(generation: Generation) -> Result:
    figures = generation.figures
    usage = {
        "prompt_tokens": figures.prompt_tokens,
        "completion_tokens": figures.completion_tokens,
        "total_tokens": figures.prompt_tokens + figures.completion_tokens,
    }
    return {"usage": usage, "bits": _bits(generation.steps), "timings": _timings(figures)}


def _bits(steps: Sequence[Step]) -> Result:
    bits = [step.bits for step in steps]
    return {"average": sum(bits) / len(bits) if bits else None, "tokens": bits}


def _timings(figures: Figures) -> Result:
    def speed(count: int, seconds: float) -> float | None:
        return count / seconds if seconds > 0 else None

    return {
        "prompt_n": figures.prompt.tokens,  # computed, that is without what the cache held
        "prompt_ms": 1e3 * figures.prompt_s,
        "prompt_per_second": speed(figures.prompt.tokens, figures.prompt_s),
        "predicted_n": figures.generation.tokens,
        "predicted_ms": 1e3 * figures.generation_s,
        "predicted_per_second": speed(figures.generation.tokens, figures.generation_s),
        "bytes_per_token": figures.measured.bytes_per_token if figures.measured.tokens else None,
    }


class _CompletionLogprobs:
    """The `logprobs` object of text completions, whose offsets count the characters of all chunks."""

    def __init__(self, tokenizer: Tokenizer, wanted: bool) -> None:
        self._tokenizer = tokenizer
        self._wanted = wanted
        self._offset = 0

    def of_prompt(self, tokens: Sequence[int], likelihoods: Sequence[Likelihood | None]) -> Result | None:
        return self._object(list(zip(tokens, likelihoods, strict=True))) if likelihoods else None

    def of(self, steps: Sequence[Step]) -> Result | None:
        return self._object([(step.token, step.likelihood) for step in steps]) if self._wanted else None

    def joined(self, parts: Sequence[Result | None]) -> Result | None:
        """One object of several, those that are None left out."""
        present = [part for part in parts if part is not None]
        return {key: [item for part in present for item in part[key]] for key in present[0]} if present else None

    def _object(self, entries: Sequence[tuple[int, Likelihood | None]]) -> Result:
        texts, offsets = [], []
        for token, _ in entries:
            texts.append(_token_text(token, self._tokenizer))
            offsets.append(self._offset)
            self._offset += len(texts[-1])
        return {
            "tokens": texts,
            "text_offset": offsets,
            "token_logprobs": [likelihood and likelihood.logprob for _, likelihood in entries],
            "top_logprobs": [
                likelihood and {_token_text(token, self._tokenizer): logprob for token, logprob in likelihood.top}
                for _, likelihood in entries
            ],
        }


def _chat_logprobs(steps: Sequence[Step], tokenizer: Tokenizer) -> Result | None:
    def entry(token: int, logprob: float) -> Result:
        text = _token_text(token, tokenizer)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode("utf-8"))}

    content = [
        entry(step.token, step.likelihood.logprob)
        | {"top_logprobs": [entry(token, logprob) for token, logprob in step.likelihood.top]}
        for step in steps
        if step.likelihood is not None
    ]
    return {"content": content} if content else None


def _scored_prompt(
    model: TokenModel, request: Request, cancelled: Callable[[], bool] | None
) -> list[Likelihood | None]:
    before = model.budget
    try:
        if request.budget is not None:
            model.budget = request.budget
        return prompt_likelihoods(model, request.tokens, request.logprobs or 0, cancelled)
    finally:
        model.budget = before


def _settings(model: TokenModel, sampling: SamplingOptions) -> SamplingSettings:
    options: dict[str, Any] = dict(sampling)
    if options.get("seed") is None:
        options["seed"] = model.seed
    try:
        return SamplingSettings(**options)
    except TypeError as error:
        names = ", ".join(sorted(set(options) - set(SamplingOptions.__annotations__)))
        raise TypeError(f"sampling: expected arguments of SamplingSettings, found {names}") from error


def _token_text(token: int, tokenizer: Tokenizer) -> str:
    return tokenizer.piece(token)


def _as_stops(stop: str | Sequence[str] | None) -> Sequence[str]:
    return [stop] if isinstance(stop, str) else stop or ()
