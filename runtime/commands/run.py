"""`mobiquant run`: continue a prompt, once or, with -i, again and again with what is typed in between."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.commands.options import (
    add_model_options,
    add_sampling_options,
    one_line_errors,
    open_model,
    sampling_settings,
)
from runtime.errors import MobiQuantError

if TYPE_CHECKING:
    from runtime.model import Model
    from runtime.sampling import SamplingSettings


def add_run(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "run",
        help="continue a prompt",
        description="Continue a text. The text streams to stdout, a line of figures follows on stderr. Ctrl-C ends the "
        "text. Example: mobiquant run -m model.gguf -p 'The sea was' -n 64 --avg-bits 3",
    )
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("-p", "--prompt", help="text to continue")
    prompt.add_argument("-f", "--file", type=Path, metavar="FILE", help="file with the text to continue")
    parser.add_argument("-i", "--interactive", action="store_true", help="then go on with what you type; Ctrl-D ends")
    parser.add_argument(
        "--prompt-cache", type=Path, metavar="FILE", help="what was computed: taken from FILE if it exists, kept in it"
    )
    add_output_options(parser)
    add_model_options(parser)
    add_sampling_options(parser)
    parser.set_defaults(func=run_command, n_predict=128)


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """Where a generation ends and how it is shown; `chat` has the same."""
    parser.add_argument(
        "-n", "--n-predict", type=int, metavar="N", help="tokens to generate at most; 0: to the context"
    )
    parser.add_argument(
        "-r", "--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be repeated"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text, as in the Python API")
    parser.add_argument("--show-bits", action="store_true", help="colour every token by the bits it read; a histogram")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the coloured text as a page (or FILE.svg)")


def check_output_options(args: argparse.Namespace) -> None:
    """Raises ValueError for flags that contradict each other."""
    if args.json and (args.html or args.show_bits):
        raise ValueError("--json: expected without --show-bits and --html: the bits are in it")


@one_line_errors
def run_command(args: argparse.Namespace) -> int:
    """`mobiquant run`; returns 130 when Ctrl-C ended the text."""
    from runtime.commands.console import ending_on_interrupt
    from runtime.tokens import as_text

    check_output_options(args)
    if args.json and args.interactive:
        raise ValueError("--json: expected without -i")
    settings = sampling_settings(args)
    prompt = as_text(args.file.read_bytes() if args.prompt is None else args.prompt)
    with open_model(args) as model, _prompt_cache(model, args.prompt_cache):
        if not args.json:
            return _stream(args, model, prompt, settings)
        with ending_on_interrupt() as interrupted:
            result = model.create_completion(
                prompt,
                args.n_predict if args.n_predict > 0 else None,
                stop=args.stop,
                cancelled=interrupted,
                **asdict(settings),
            )
            print(json.dumps(result, ensure_ascii=False))
            return 130 if interrupted() else 0


@contextmanager
def _prompt_cache(model: Model, path: Path | None) -> Iterator[None]:
    """Begin with the session in the file at `path`, if there is one, and leave this one there."""
    from runtime.files import write_atomically

    if path is not None and path.exists():
        try:
            model.load_state(path.read_bytes())
        except (MobiQuantError, ValueError) as error:
            raise ValueError(f"{path}: {error}; delete it to begin anew") from error
    yield
    if path is not None:
        write_atomically(path, model.save_state())


def _stream(args: argparse.Namespace, model: Model, prompt: str, settings: SamplingSettings) -> int:
    from runtime.commands.console import ending_on_interrupt, print_pieces, print_summary, write_picture
    from runtime.commands.page import Fragment
    from runtime.commands.picture import Scale
    from runtime.generation import Generation, Request

    tokens, fragments = model.tokenize(prompt), [Fragment(prompt)]
    limit = args.n_predict if args.n_predict > 0 else None
    scale = Scale.of(model.budget)
    while True:
        with ending_on_interrupt() as interrupted:
            generation = Generation(model, Request(tokens, limit, args.stop, sampling=settings), interrupted)
            fragments += print_pieces(generation, scale if args.show_bits else None)
            print(flush=True)
            print_summary(generation, scale if args.show_bits else None)
            if interrupted() and not generation.figures.prompt.tokens:
                print("interrupted", file=sys.stderr)
            status = 130 if interrupted() else 0
        line = sys.stdin.readline() if args.interactive else ""
        if not line:
            break
        tokens = [*tokens, *(step.token for step in generation.steps), *model.tokenize(line, add_bos=False)]
        fragments.append(Fragment(line))
    if args.html:
        write_picture(args.html, f"{model.name}, {model.budget}", fragments, scale)
    return 0 if args.interactive else status
