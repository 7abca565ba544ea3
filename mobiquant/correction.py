"""The running correction: what a routed text is given in its next stretch, so that its average comes out as asked.

The runtime does the same (runtime/src/budget.c) in the same order of float64 operations; docs/format.md describes it.
"""

from __future__ import annotations

import numpy as np

from mobiquant.packing import SLICE_BITS, SLICE_COUNT

_SHORTEST, _LONGEST, _SHARE = 64, 512, 2
_TRUST = 64.0  # tokens at which half of a measured bias is believed
_REACH = 1.0
_LEAST, _MOST = float(SLICE_BITS), float(SLICE_BITS * SLICE_COUNT)


def stretch_length(done: int) -> int:
    """Tokens in the stretch that begins at token `done`: half as many, rounded down to a power of two, 64 to 512."""
    length = _SHORTEST
    while length < _LONGEST and length * 2 <= done // _SHARE:
        length *= 2
    return length


class RunningCorrection:
    """Follows one sequence from position 0. asked: average bits, 2..8.

    bits: the budget of the present stretch; end: the position where the stretch ends, None when it has no end.
    """

    def __init__(self, asked: float) -> None:
        self._asked = self.bits = float(np.float32(asked))
        self._given = 0.0
        self._begin = 0
        # The least and the most are exact.
        self.end = stretch_length(0) if _LEAST < self._asked < _MOST else None

    def finish_stretch(self, average: float) -> None:
        """Go on to the next stretch. average: bits per routed weight read by all tokens so far."""
        assert self.end is not None
        self._given += self.bits * (self.end - self._begin)
        done = float(self.end)
        self._begin, self.end = self.end, self.end + stretch_length(self.end)
        bias = (self._given / done - average) * (done / (done + _TRUST))
        owed = (self._asked - average) * (done / (self.end - self._begin))
        shift = min(max(bias + owed, -_REACH), _REACH)
        self.bits = float(np.float32(min(max(self._asked + shift, _LEAST), _MOST)))
