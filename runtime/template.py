"""Renders one chat template, in a process of its own: the template came with the file and is not trusted.

jinja2's immutable sandbox keeps it from the machine; the process bounds its memory and time, which no sandbox inside an
interpreter can (`'x' | center(10 ** 10)` is one call). runtime.chat starts this process, writes one JSON object to its
stdin and reads one from its stdout.
"""

from __future__ import annotations

import json
import sys
from typing import Any

MEMORY_BYTES = 512 << 20
CPU_SECONDS = 5
OUTPUT_CHARACTERS = 4 << 20


def main() -> None:
    """{"template", "variables"} in a line from stdin; {"text"} or {"error"} to stdout."""
    _limit_resources()

    try:
        # One line, not until the end: a process forked from ours since may hold the pipe open.
        request = json.loads(sys.stdin.readline())
        answer = {"text": render(request["template"], request["variables"])}
    except MemoryError:
        answer = {"error": f"it needs more than {MEMORY_BYTES >> 20} MB"}
    except Exception as error:  # a template can raise anything
        answer = {"error": f"{type(error).__name__}: {error}"[:500]}
    json.dump(answer, sys.stdout)


def render(template: str, variables: dict[str, Any]) -> str:
    """The text of a template in the dialect of transformers' chat templates. Raises jinja2's errors and ValueError."""
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """`{% generation %}` marks the assistant's words for training; here it is only its content."""

        tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

        def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    pieces, size = [], 0
    for piece in environment.from_string(template).generate(**variables):
        pieces.append(piece)
        size += len(piece)
        if size > OUTPUT_CHARACTERS:
            raise ValueError(f"expected at most {OUTPUT_CHARACTERS} characters of text, found more")
    return "".join(pieces)


def _limit_resources() -> None:
    try:
        import resource
    except ImportError:  # not a Unix system: the caller's time limit is what is left
        return
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes for HTML. No other option of json.dumps: `default` would call what the sandbox guards.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise ValueError(message)


def _strftime_now(form: str) -> str:
    from datetime import datetime

    return datetime.now().strftime(form)
