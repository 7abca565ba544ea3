"""Bodies of the OpenAI API as arguments of Model.create_completion and create_chat_completion.

Every field is checked here and an error names it. What the runtime cannot do is refused, not passed over: an answer
without the tools or the form that was asked for would be wrong. Fields of its own: `avg_bits`, `bits`, and the samplers
of runtime.sampling.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from runtime.budget import parse_bits

MAX_STOPS, MAX_STOP_CHARACTERS = 16, 500  # every piece of text is compared with each
MAX_LOGPROBS = 20


class BadRequest(ValueError):
    """The body is not one this server answers. `param`: the field, None for the body as a whole."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message if param is None else f"{param}: {message}")
        self.param = param


@dataclass(frozen=True)
class Call:
    """What to do. method: of Model; arguments: for it, `stream` included. usage: a streamed answer ends with a chunk
    of totals."""

    method: str
    arguments: Mapping[str, Any]
    stream: bool
    usage: bool


def parse_completion(body: bytes, max_tokens: int) -> Call:
    """Of /v1/completions. max_tokens: the most that one answer may have. Raises BadRequest."""
    fields = _object(body)
    arguments = _common(fields, max_tokens, default=16)
    arguments["prompt"] = _take(fields, "prompt", _prompt, required=True)
    arguments["echo"] = _take(fields, "echo", _flag, default=False)
    arguments["logprobs"] = _take(fields, "logprobs", _integer(0, MAX_LOGPROBS))
    return _call("create_completion", fields, arguments, only={"best_of": 1, "suffix": ""})


def parse_chat(body: bytes, max_tokens: int) -> Call:
    """Of /v1/chat/completions. The messages themselves are checked by runtime.chat. Raises BadRequest."""
    fields = _object(body)
    newer = _take(fields, "max_completion_tokens", _integer(0))
    if newer is not None:
        fields.setdefault("max_tokens", newer)
    arguments = _common(fields, max_tokens, default=max_tokens)
    arguments["messages"] = _take(fields, "messages", _messages, required=True)
    arguments["logprobs"] = _take(fields, "logprobs", _flag, default=False)
    arguments["top_logprobs"] = _take(fields, "top_logprobs", _integer(0, MAX_LOGPROBS), default=0)
    only = {"tools": [], "tool_choice": "none", "functions": [], "response_format": {"type": "text"}}
    return _call("create_chat_completion", fields, arguments, only)


# Fields that say nothing to this server, and what they are for.
_IGNORED = ("model", "user", "metadata", "store", "service_tier", "safety_identifier")


def _call(method: str, fields: dict[str, Any], arguments: dict[str, Any], only: Mapping[str, Any]) -> Call:
    stream = _take(fields, "stream", _flag, default=False)
    options = _take(fields, "stream_options", _mapping, default={})
    for name, value in {"n": 1, **only}.items():
        found = fields.pop(name, None)
        if found is not None and found != value:
            raise BadRequest(f"expected {value!r}, which is all that this server can do, found {found!r:.80}", name)
    for name in _IGNORED:
        fields.pop(name, None)
    if fields:
        raise BadRequest("expected a field that this server knows, found another", sorted(fields)[0])
    return Call(method, arguments | {"stream": stream}, stream, bool(options.get("include_usage")))


def _common(fields: dict[str, Any], max_tokens: int, default: int) -> dict[str, Any]:
    arguments = {
        "max_tokens": min(_take(fields, "max_tokens", _integer(0), default=default), max_tokens),
        "stop": _take(fields, "stop", _stops, default=[]),
        "avg_bits": _take(fields, "avg_bits", _number),
        "bits": _take(fields, "bits", _bits),
        "logit_bias": _take(fields, "logit_bias", _bias, default={}),
    }
    checks: dict[str, Callable[[Any], Any]] = dict.fromkeys(("top_k", "last_n", "mirostat_mode", "seed"), _integer(0))
    checks |= dict.fromkeys(
        ("temperature", "top_p", "min_p", "typical_p", "repeat_penalty", "frequency_penalty"), _number
    )
    checks |= dict.fromkeys(("presence_penalty", "mirostat_tau", "mirostat_eta"), _number)
    given = {name: _take(fields, name, check) for name, check in checks.items()}
    return arguments | {name: value for name, value in given.items() if value is not None}


def _object(body: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"body: expected JSON: {error}") from error
    if not isinstance(fields, dict):
        raise BadRequest(f"body: expected a JSON object, found {type(fields).__name__}")
    return fields


def _take(
    fields: dict[str, Any], name: str, check: Callable[[Any], Any], default: Any = None, *, required: bool = False
) -> Any:
    """The checked value of a field, which is removed; null counts as absent."""
    value = fields.pop(name, None)
    if value is None:
        if required:
            raise BadRequest("expected it, found nothing", name)
        return default
    try:
        return check(value)
    except ValueError as error:
        raise BadRequest(f"{error}, found {value!r:.80}", name) from error


def _integer(lowest: int, highest: int | None = None) -> Callable[[Any], int]:
    def check(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < lowest or value > (highest or value):
            raise ValueError(f"expected an integer from {lowest}" + (f" to {highest}" if highest else ""))
        return value

    return check


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("expected a number")
    try:
        return float(value)
    except OverflowError:
        raise ValueError("expected a number of at most 308 digits") from None


def _bits(value: Any) -> int | str:
    try:
        return parse_bits(str(value))
    except ValueError:
        raise ValueError("expected 2, 4, 6, 8 or static:X with X from 2 to 8") from None


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("expected true or false")
    return value


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("expected an object")
    return value


def _messages(value: Any) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise ValueError("expected a list of messages")
    return value


def _prompt(value: Any) -> str | list[int]:
    value = value[0] if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str) else value
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not all(type(token) is int and 0 <= token < 1 << 31 for token in value):
        raise ValueError("expected one text or a list of token ids")
    return value


def _stops(value: Any) -> list[str]:
    stops = [value] if isinstance(value, str) else value
    good = isinstance(stops, list) and len(stops) <= MAX_STOPS
    if not good or not all(isinstance(stop, str) and len(stop) <= MAX_STOP_CHARACTERS for stop in stops):
        raise ValueError(f"expected a text or a list of at most {MAX_STOPS}, each of at most {MAX_STOP_CHARACTERS}")
    return stops


def _bias(value: Any) -> dict[int, float]:
    try:
        return {int(token): _number(bias) for token, bias in value.items()}
    except (AttributeError, ValueError):
        raise ValueError("expected an object of token ids and numbers") from None
