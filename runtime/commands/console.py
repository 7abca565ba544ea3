"""A generation in the terminal: pieces printed as they come, coloured when asked, ended by Ctrl-C; then the figures."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from runtime.commands.page import Fragment, html_page, svg_picture
from runtime.commands.picture import Scale, coloured, histogram, wants_colour
from runtime.files import write_atomically
from runtime.generation import Figures, Generation


@contextmanager
def ending_on_interrupt() -> Iterator[Callable[[], bool]]:
    """Ctrl-C makes the function true instead of raising; a second Ctrl-C raises KeyboardInterrupt."""
    interrupted = False

    def handle(number: int, frame: object) -> None:
        nonlocal interrupted
        if interrupted:
            raise KeyboardInterrupt
        interrupted = True

    before = signal.getsignal(signal.SIGINT)
    if before is not signal.SIG_IGN:  # a command started in the background with Ctrl-C ignored is to stay so
        signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: interrupted
    finally:
        signal.signal(signal.SIGINT, before)


def print_pieces(generation: Generation, scale: Scale | None) -> list[Fragment]:
    """Stream the text to stdout as it comes, coloured by `scale` if any, and return it with its tokens."""
    shown = scale if wants_colour(sys.stdout) else None
    fragments = []
    for piece in generation:
        if piece.text:
            fragments.append(Fragment(piece.text, piece.steps))
            text = coloured(piece.text, fragments[-1].bits, shown) if shown and piece.steps else piece.text
            print(text, end="", flush=True)
    return fragments


def figures_line(figures: Figures) -> str:
    """Speeds, precision and traffic. The first generated token comes with the prompt, so it is not timed."""
    generation, measured = figures.generation, figures.measured
    speed = generation.tokens / figures.generation_s if figures.generation_s else 0.0
    return (
        f"prompt {figures.prompt_tokens} tokens, {figures.prompt.tokens / figures.prompt_s:.1f} tok/s; "
        f"generation {generation.tokens} tokens, {speed:.1f} tok/s; "
        f"average bits {measured.average_bits:.2f}; {measured.bytes_per_token / 1e6:.2f} MB read per token"
    )


def print_summary(generation: Generation, scale: Scale | None) -> None:
    """One line of figures on stderr; with a scale also the histogram."""
    if generation.figures.prompt.tokens:
        print(figures_line(generation.figures), file=sys.stderr)
    if scale and generation.steps:
        bits = [step.bits for step in generation.steps]
        print(histogram(bits, scale, colour=wants_colour(sys.stderr)), file=sys.stderr)


def write_picture(path: Path, title: str, fragments: Sequence[Fragment], scale: Scale) -> None:
    """An HTML page, or an SVG picture when the name ends so."""
    text = (svg_picture if path.suffix == ".svg" else html_page)(title, fragments, scale)
    write_atomically(path, text.encode("utf-8"))
