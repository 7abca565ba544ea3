"""Conversations to prompt tokens with the model's own chat template.

The template is rendered by runtime.template in a process with limits. What people write never becomes a control token:
a marker such as `<|eot_id|>` inside a message has another name while the template is rendered, so that it can be told
from the template's own, and is encoded as text.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from runtime.tokens import Tokenizer

Message = Mapping[str, Any]

TEMPLATE_BYTES = 256 << 10
RENDER_SECONDS = 20.0  # with starting the process, on a busy machine; it may compute for less (runtime.template)

PLAIN_TEMPLATE = """{{ bos_token }}
{%- for message in messages %}
{%- if message.role == 'system' %}{{ message.content }}

{% elif message.role == 'user' %}User: {{ message.content }}
{% else %}Assistant: {{ message.content }}
{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}Assistant:{% endif %}"""
"""For a file without a template: a base model continues a written dialogue."""
PLAIN_STOP = "\nUser:"

# Unicode noncharacters: they never stand for anything in text, so one that no message uses can mark a place.
_MARKS = [chr(code) for code in range(0xFDD0, 0xFDF0)]

# Without the entry for the working directory: a file lying there must not be taken for a module.
_START = "import sys; sys.path = [sys.argv[1], *filter(None, sys.path)]; from runtime.template import main; main()"


class ChatTemplate:
    """Renders conversations. source: the template, None for a plain written dialogue, which ends at `stop`.

    Raises ValueError for a template that is too large; errors inside it appear when a conversation is rendered.
    """

    def __init__(self, source: str | None, tokenizer: Tokenizer) -> None:
        self.stop = () if source else (PLAIN_STOP,)
        self._source = source or PLAIN_TEMPLATE
        self._tokenizer = tokenizer
        self._ready: subprocess.Popen[str] | None = None
        self._owner = os.getpid()  # whose child `_ready` is
        self._lock = threading.Lock()
        size = len(self._source.encode("utf-8"))
        if size > TEMPLATE_BYTES:
            raise ValueError(f"chat template: expected at most {TEMPLATE_BYTES} bytes, found {size}")

    def encode(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> list[int]:
        """Prompt tokens of a conversation: mappings with `role` and `content`, and what else the template knows.

        Content is text, or a list of {"type": "text", "text": ...}. add_generation_prompt: end where the assistant's
        answer begins. Raises ValueError for a message without them, and when the template refuses the conversation,
        computes longer than 5 s, or needs more memory than it may have.
        """
        try:
            return self._encode(messages, add_generation_prompt)
        except RecursionError:
            raise ValueError("messages: expected fewer levels of lists and objects") from None

    def _encode(self, messages: Sequence[Message], add_generation_prompt: bool) -> list[int]:
        checked = [_checked(message, index) for index, message in enumerate(messages)]
        if not checked:
            raise ValueError("messages: expected at least one, found none")
        texts, tokenizer = list(_strings(checked)), self._tokenizer
        forged = any(tokenizer.has_markers(text) for text in texts)
        mark = next((mark for mark in _MARKS if not any(mark in text for text in texts)), None)
        if mark is None:
            raise ValueError("messages: expected text, found every noncharacter from U+FDD0 to U+FDEF")
        # Longest first: one marker may hold another.
        markers = sorted(tokenizer.markers, key=len, reverse=True)
        own = re.compile("|".join(map(re.escape, markers)))
        variables = {
            "messages": _renamed(checked, own, lambda marker: f"{mark}{markers.index(marker)}{mark}")
            if forged
            else checked,
            "tools": None,  # templates ask whether these are none, not whether they are defined
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            "bos_token": tokenizer.marker(tokenizer.bos),
            "eos_token": tokenizer.marker(tokenizer.end),
        }
        text = self._render(variables)
        if not forged:
            return tokenizer.encode(text, add_bos=False, special=True)
        # What is a marker now is the template's; between them those of the messages get their names again.
        names = re.compile(f"{mark}({'|'.join(map(str, range(len(markers))))}){mark}")
        texts = [names.sub(lambda name: markers[int(name[1])], between) for between in own.split(text)]
        return tokenizer.encode_between(texts, own.findall(text))

    def prepare(self) -> None:
        """Start the process that renders the next conversation, so that it is ready when one comes."""
        with self._lock:
            self._ready = self._take_ready() or _start_renderer()

    def close(self) -> None:
        """End the process that waits for a conversation, if any."""
        with self._lock:
            ready = self._take_ready()
        if ready is not None:
            ready.kill()
            ready.communicate()

    def _take_ready(self) -> subprocess.Popen[str] | None:
        """The waiting process; not one of our parent's, after a fork."""
        ready, self._ready = self._ready, None
        if self._owner != os.getpid():
            self._owner, ready = os.getpid(), None
        return ready

    def _render(self, variables: dict[str, Any]) -> str:
        with self._lock:
            process = self._take_ready() or _start_renderer()
        request = json.dumps({"template": self._source, "variables": variables}) + "\n"
        try:
            output, _ = process.communicate(request, timeout=RENDER_SECONDS)
        except BaseException as error:
            process.kill()
            process.communicate()
            if isinstance(error, subprocess.TimeoutExpired):
                raise ValueError(f"chat template: expected a result within {RENDER_SECONDS:g} s, found none") from None
            raise
        try:
            answer = json.loads(output)
        except ValueError:  # killed by a limit
            answer = {"error": "it was stopped at its limit of time or memory"}
        if "error" in answer:
            raise ValueError(f"chat template: {answer['error']}")
        return answer["text"]


def _start_renderer() -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", _START, str(Path(__file__).parent.parent)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        encoding="utf-8",
        start_new_session=True,  # Ctrl-C in the terminal is for us, not for it
    )


def _checked(message: Message, index: int) -> dict[str, Any]:
    where = f"messages[{index}]"
    if not isinstance(message, Mapping):
        raise ValueError(f"{where}: expected an object with role and content, found {type(message).__name__}")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise ValueError(f"{where}.role: expected a name such as user, found {role!r}")
    if isinstance(content, list):
        if not all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in content):
            raise ValueError(f"{where}.content: expected parts of type text only, found another")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise ValueError(f"{where}.content: expected text, found {type(content).__name__}")
    return {**message, "role": role, "content": content}


def _strings(value: object) -> list[str]:
    if isinstance(value, str):
        return [value]
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return [text for part in parts for text in _strings(part)]


def _renamed(value: Any, markers: re.Pattern[str], name: Callable[[str], str]) -> Any:
    """`value` with another name for every marker in its strings."""
    if isinstance(value, str):
        return markers.sub(lambda found: name(found[0]), value)
    if isinstance(value, Mapping):
        return {key: _renamed(part, markers, name) for key, part in value.items()}
    return [_renamed(part, markers, name) for part in value] if isinstance(value, list) else value
