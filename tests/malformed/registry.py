"""The list of classes: a function that spoils `Parts` and returns the pattern of the error, and what the error is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from malformed.parts import Parts

Spoil: TypeAlias = Callable[[Parts, np.random.Generator], str]


@dataclass(frozen=True)
class Malformed:
    """`status`: name of the error, "ValueError" where Python finds it. `found`: by what, "open" a file, "check" its
    tensors, "tokenizer" or "template"; all of it by `mobiquant verify`, and some by nothing else: "verify"."""

    name: str
    status: str
    found: str
    spoil: Spoil


CLASSES: list[Malformed] = []


def malformed(status: str, found: str = "open") -> Callable[[Spoil], Spoil]:
    """Register a function under its name."""

    def register(spoil: Spoil) -> Spoil:
        CLASSES.append(Malformed(spoil.__name__, status, found, spoil))
        return spoil

    return register
