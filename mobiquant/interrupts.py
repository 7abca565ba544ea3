"""Ctrl-C in a command-line process: one line and status 130, whenever it comes.

Python raises KeyboardInterrupt between any two instructions, also where nobody can catch it: during imports, in a
destructor, at exit. There the process ends at once here; where a command has something to tidy up or to tell, Ctrl-C is
raised as ever. Only the entry points of commands call this: a library leaves signals alone.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

STATUS = 130


def end_at_once() -> None:
    """From now on Ctrl-C ends the process: for imports, and whatever else has nothing to tidy up."""
    _handle(lambda number, frame: _end())


def run(command: Callable[[], int]) -> int:
    """The status of a command, which Ctrl-C reaches as KeyboardInterrupt; after it Ctrl-C no longer matters."""
    sys.unraisablehook = _end_if_interrupted
    try:
        _handle(signal.default_int_handler)
        return command()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return STATUS
    finally:
        _handle(signal.SIG_IGN)


def _handle(handler: Callable[[int, object], object] | signal.Handlers) -> None:
    # A process started in the background with Ctrl-C ignored is to stay so.
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, handler)


def _end() -> NoReturn:
    os.write(sys.stderr.fileno(), b"interrupted\n")
    os._exit(STATUS)


def _end_if_interrupted(unraisable: sys.UnraisableHookArgs) -> None:
    """Python would print and forget a Ctrl-C that comes in a destructor or callback."""
    if isinstance(unraisable.exc_value, KeyboardInterrupt):
        _end()
    sys.__unraisablehook__(unraisable)
