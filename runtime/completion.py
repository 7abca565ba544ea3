"""Text completion over a Model: stop strings, pieces of text as they come, and llama-cpp-python's result shapes."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from runtime.budget import Budget
from runtime.sampling import SamplingSettings
from runtime.tokens import TextStream

if TYPE_CHECKING:
    from runtime.model import Model


@dataclass(frozen=True)
class Piece:
    """What one token added. The last piece has a finish reason: "stop" (end token or stop string) or "length"."""

    text: str
    tokens: int  # generated so far, an end token not counted
    finish_reason: str | None = None


class StopStrings:
    """Cuts text that arrives in pieces at the first stop string, which may be spread over several pieces."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Text that is certain to come before any stop string, and whether one was found."""
        text = self._held + text
        found = [index for stop in self._stops if (index := text.find(stop)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        # Hold back the longest end that could be the start of a stop string.
        ends = [size for stop in self._stops for size in range(1, len(stop)) if text.endswith(stop[:size])]
        certain = len(text) - max(ends, default=0)
        self._held = text[certain:]
        return text[:certain], False

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held


def stream_text(
    model: Model,
    tokens: Sequence[int],
    *,
    max_tokens: int | None,
    sampling: SamplingSettings,
    stop: Sequence[str] = (),
    budget: Budget | None = None,
) -> Iterator[Piece]:
    """One Piece per generated token, then a last one with the finish reason.

    max_tokens: None or 0 and less: until the context is full. budget: for this generation only; None leaves it to
    `model.bits`, which may change while it runs. Raises as Model.generate.
    """
    limit = max_tokens if max_tokens is not None and max_tokens > 0 else None
    before = model.budget
    if budget:
        model.budget = budget
    stream, stops = TextStream(model.tokenizer), StopStrings(stop)
    count, text, reason = 0, "", "length"
    try:
        for token in model.generate(tokens, sampling):
            if token in model.tokenizer.eos:
                reason = "stop"
                break
            count += 1
            text, stopped = stops.push(stream.push(token))
            if stopped:
                yield Piece(text, count, "stop")
                return
            yield Piece(text, count)
            if count == limit:
                break
        text, stopped = stops.push(stream.flush())
        yield Piece(text if stopped else text + stops.flush(), count, "stop" if stopped else reason)
    finally:
        if budget:
            model.budget = before


def create_completion(
    model: Model,
    prompt: str | bytes | Sequence[int],
    max_tokens: int | None = 16,
    temperature: float = 0.8,
    top_p: float = 0.95,
    top_k: int = 40,
    min_p: float = 0.05,
    repeat_penalty: float = 1.0,
    stop: str | Sequence[str] | None = None,
    seed: int | None = None,
    echo: bool = False,
    stream: bool = False,
    avg_bits: float | None = None,
    bits: int | str | None = None,
) -> dict[str, Any] | Iterator[dict[str, Any]]:
    """Complete `prompt`, text or token ids, and return llama-cpp-python's dictionary, or with `stream` its chunks.

    max_tokens: None or 0 and less: until the context is full. stop: text at which to end, not part of the result.
    echo: begin the text with the prompt. avg_bits, bits: precision of this completion only, as in Model.
    Raises ValueError for a bad argument, MobiQuantError when the prompt does not fit in the context.
    """
    tokens = model.tokenize(prompt) if isinstance(prompt, str | bytes) else [int(token) for token in prompt]
    if not tokens:
        raise ValueError("prompt: expected at least one token, found none")
    pieces = stream_text(
        model,
        tokens,
        max_tokens=max_tokens,
        sampling=SamplingSettings(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repeat_penalty=repeat_penalty,
            seed=model.seed if seed is None else seed,
        ),
        stop=[stop] if isinstance(stop, str) else stop or (),
        budget=Budget.requested(bits, avg_bits),
    )
    head = {
        "id": f"cmpl-{uuid.uuid4()}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": str(model.path),
    }
    start = ""
    if echo:
        start = model.detokenize(tokens).decode("utf-8") if not isinstance(prompt, str | bytes) else _as_text(prompt)
    if stream:
        return _chunks(head, start, pieces)

    texts, last = [start], Piece("", 0)
    for last in pieces:
        texts.append(last.text)
    usage = {
        "prompt_tokens": len(tokens),
        "completion_tokens": last.tokens,
        "total_tokens": len(tokens) + last.tokens,
    }
    return head | {"choices": [_choice("".join(texts), last.finish_reason)], "usage": usage}


def _chunks(head: dict[str, Any], start: str, pieces: Iterator[Piece]) -> Iterator[dict[str, Any]]:
    if start:
        yield head | {"choices": [_choice(start, None)]}
    for piece in pieces:
        if piece.text or piece.finish_reason:
            yield head | {"choices": [_choice(piece.text, piece.finish_reason)]}


def _choice(text: str, finish_reason: str | None) -> dict[str, Any]:
    return {"text": text, "index": 0, "logprobs": None, "finish_reason": finish_reason}


def _as_text(prompt: str | bytes) -> str:
    return prompt.decode("utf-8") if isinstance(prompt, bytes) else prompt
