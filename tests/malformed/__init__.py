"""Files that are wrong in one named way, made from a good one, and what the error for each must say.

`CLASSES` lists the ways. `make(good, kind, seed)` gives the bytes and the pattern that the error's message must match;
the same seed gives the same bytes. `python -m malformed FILE FOLDER` writes a few of every class for programs in C.
"""

from __future__ import annotations

import numpy as np

from malformed import header, sizes, tensors, values
from malformed.parts import Parts
from malformed.registry import CLASSES, Malformed

__all__ = ["CLASSES", "Malformed", "Parts", "header", "make", "sizes", "tensors", "values"]


def make(good: bytes, kind: Malformed, seed: int) -> tuple[bytes, str]:
    """The bytes of a file of this class and the pattern of its error."""
    parts = Parts.of(good)
    pattern = kind.spoil(parts, np.random.default_rng(seed))
    return parts.build(), pattern
