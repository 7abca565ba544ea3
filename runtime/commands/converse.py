"""`mobiquant chat`: a conversation in the terminal, or line by line from a pipe."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.budget import DEPTH_BITS
from runtime.commands.options import (
    add_model_options,
    add_sampling_options,
    one_line_errors,
    open_model,
    sampling_settings,
)
from runtime.commands.run import add_output_options, check_output_options

if TYPE_CHECKING:
    from runtime.model import Model
    from runtime.sampling import SamplingSettings

_HELP = """/bits N     precision from now on: 2, 4, 6 or 8 for every token, any other number from 2 to 8 as an average,
            static:X with one depth per linear
/avg N      average precision from now on, tokens routed one by one
/show-bits  colour tokens by the bits they read, or stop that
/reset      forget the conversation (not the system prompt)
/help       this list
/exit       leave, as Ctrl-D does
Ctrl-C ends an answer. A line that ends in \\ goes on in the next."""


def add_chat(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "chat",
        help="talk to a model",
        description="Talk to a model with its own chat template. Type a message and press Enter; /help lists the "
        "commands, Ctrl-C ends an answer, Ctrl-D leaves. Example: mobiquant chat -m model.gguf --avg-bits 3.5",
    )
    first = parser.add_mutually_exclusive_group()
    first.add_argument("-p", "--prompt", help="the first message")
    first.add_argument("-f", "--file", type=Path, metavar="FILE", help="file with the first message")
    parser.add_argument("-sys", "--system-prompt", metavar="TEXT", help="what the assistant should be like")
    parser.add_argument("-st", "--single-turn", action="store_true", help="leave after the first answer")
    add_output_options(parser)
    add_model_options(parser)
    add_sampling_options(parser)
    parser.set_defaults(func=chat_command, n_predict=0)


@one_line_errors
def chat_command(args: argparse.Namespace) -> int:
    """`mobiquant chat`."""
    from runtime.commands.console import write_picture
    from runtime.commands.picture import Scale
    from runtime.tokens import as_text

    check_output_options(args)
    settings = sampling_settings(args)
    first = as_text(args.file.read_bytes()).rstrip("\n") if args.file else args.prompt
    with open_model(args) as model:
        model.chat.prepare()
        conversation = Conversation(model, args, settings)
        if first is not None:
            conversation.answer(first)
        if first is None or not args.single_turn:
            _listen(conversation, once=args.single_turn)
        if args.html:
            write_picture(args.html, model.name, conversation.fragments, Scale())
    return 0


class Conversation:
    """Messages so far, and what answers and commands do to them."""

    def __init__(self, model: Model, args: argparse.Namespace, settings: SamplingSettings) -> None:
        from runtime.commands.page import Fragment

        self._model = model
        self._settings = settings
        self._stop, self._json, self._show_bits = args.stop, args.json, args.show_bits
        self._limit = args.n_predict if args.n_predict > 0 else None
        self._system = [] if args.system_prompt is None else [{"role": "system", "content": args.system_prompt}]
        self._messages = list(self._system)
        self.fragments: list[Fragment] = []

    @property
    def has_template(self) -> bool:
        """Whether the file says how a conversation is laid out."""
        return self._model.chat_template is not None

    def answer(self, text: str) -> None:
        """Add the user's message and print the answer. A conversation that no longer fits leaves the message out."""
        self._messages.append({"role": "user", "content": text})
        try:
            answer = self._answer_as_json() if self._json else self._stream_answer(text)
        except BaseException:
            self._messages.pop()
            raise
        self._messages.append({"role": "assistant", "content": answer})

    def command(self, line: str) -> bool:
        """Obey a line that begins with /; False when it says to leave. Raises ValueError for an unknown command."""
        name, _, value = line.partition(" ")
        if name in ("/exit", "/quit"):
            return False
        if name in ("/bits", "/avg"):
            self._set_bits(name, value)
        elif name == "/show-bits":
            self._show_bits = not self._show_bits
        elif name == "/reset":
            self._messages = list(self._system)
            self._model.reset()
        elif name == "/help":
            print(_HELP, file=sys.stderr)
        else:
            raise ValueError(f"{name}: expected a command, see /help")
        return True

    def _set_bits(self, name: str, value: str) -> None:
        try:
            bits = value if value.startswith("static:") else float(value)
        except ValueError:
            raise ValueError(f"{name}: expected a number from 2 to 8, found {value!r}") from None
        self._model.bits = int(bits) if name == "/bits" and bits in DEPTH_BITS else bits
        print(f"{self._model.budget} from now on", file=sys.stderr)

    def _stream_answer(self, text: str) -> str:
        from runtime.commands.console import ending_on_interrupt, print_pieces, print_summary
        from runtime.commands.page import Fragment
        from runtime.commands.picture import Scale
        from runtime.generation import Generation, Request

        chat = self._model.chat
        request = Request(
            chat.encode(self._messages),
            self._limit,
            (*self._stop, *chat.stop),
            sampling=self._settings,
            continues=False,
            keep_cache=True,  # a change of precision holds from now on, and does not compute the past again
        )
        chat.prepare()
        scale = Scale.of(self._model.budget) if self._show_bits else None
        with ending_on_interrupt() as interrupted:
            generation = Generation(self._model, request, interrupted)
            fragments = print_pieces(generation, scale)
            print(flush=True)
        print_summary(generation, scale)
        self.fragments += [Fragment(f"\n> {text}\n"), *fragments]
        return "".join(fragment.text for fragment in fragments)

    def _answer_as_json(self) -> str:
        from runtime.commands.console import ending_on_interrupt

        with ending_on_interrupt() as interrupted:
            result = self._model.create_chat_completion(
                self._messages,
                self._limit,
                stop=self._stop,
                keep_cache=True,
                cancelled=interrupted,
                **asdict(self._settings),
            )
        print(json.dumps(result, ensure_ascii=False), flush=True)
        return result["choices"][0]["message"]["content"]


def _listen(conversation: Conversation, *, once: bool) -> None:
    """Messages and commands from stdin until its end. In a terminal an error is a line and the conversation goes on."""
    terminal = sys.stdin.isatty()
    if terminal:
        if not conversation.has_template:
            print("The file has no chat template: the model continues a written dialogue.", file=sys.stderr)
        print("Type a message; /help lists the commands, Ctrl-D leaves.", file=sys.stderr)
    while (line := _read_message(terminal)) is not None:
        try:
            if line.startswith("/"):
                if not conversation.command(line):
                    return
            elif line.strip():
                conversation.answer(line)
                if once:
                    return
        except KeyboardInterrupt:  # before or after an answer's tokens; a terminal is there to go on
            if not terminal:
                raise
            print(file=sys.stderr)
        except (RuntimeError, ValueError) as error:
            if not terminal:
                raise
            hint = "; /reset forgets the conversation" if getattr(error, "status", "") == "MQ_ERR_CONTEXT_FULL" else ""
            print(f"error: {error}{hint}", file=sys.stderr)


def _read_message(terminal: bool) -> str | None:
    """One message, joined over lines that end in a backslash; None at the end of the input."""
    lines: list[str] = []
    while True:
        try:
            line = _prompted() if terminal else sys.stdin.readline()
        except KeyboardInterrupt:  # at the prompt it throws the line away
            if not terminal:
                raise
            print(file=sys.stderr)
            lines = []
            continue
        if not line:
            return None if not lines else "\n".join(lines)
        line = line.rstrip("\n")
        lines.append(line.removesuffix("\\"))
        if not line.endswith("\\"):
            return "\n".join(lines)


def _prompted() -> str:
    """A line with the terminal's own editing; empty at Ctrl-D."""
    import readline  # noqa: F401  (importing it gives input() its line editing)

    try:
        return input("> ") + "\n"
    except EOFError:
        print(file=sys.stderr)
        return ""
