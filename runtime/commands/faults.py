"""A mapped file that becomes shorter while a command reads it: one line and status 1 in place of a bus error.

Reading a page that the file no longer has is a signal, SIGBUS, which Python cannot handle. A program may end in good
order then, a library may not decide that: so only commands call this (runtime/program/fault.h).
"""

from __future__ import annotations

from pathlib import Path

from runtime._native import ffi, lib
from runtime.model import Model
from runtime.native import NativeModel

_STATUS = 1


def watch(path: Path, model: Model | NativeModel | None = None) -> None:
    """Before the file at `path` is opened, and again with the model as which it was: then only its own faults count."""
    native = model._native if isinstance(model, Model) else model
    lib.mq_watch_file(str(path).encode(), ffi.NULL if native is None else native.handle, _STATUS)
