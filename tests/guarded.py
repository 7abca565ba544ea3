"""Arrays that end at a page nobody may touch: a kernel that reads or writes past its operand dies at once."""

from __future__ import annotations

import ctypes
import mmap

import numpy as np

_LIBC = ctypes.CDLL(None, use_errno=True)
_PROT_NONE = 0


def guarded(values: np.ndarray) -> np.ndarray:
    """A copy of `values` whose last byte is followed by an inaccessible page."""
    values = np.ascontiguousarray(values)
    pages = -(-max(values.nbytes, 1) // mmap.PAGESIZE) + 1
    memory = mmap.mmap(-1, pages * mmap.PAGESIZE)
    buffer = (ctypes.c_char * (pages * mmap.PAGESIZE)).from_buffer(memory)
    last = ctypes.addressof(buffer) + (pages - 1) * mmap.PAGESIZE
    if _LIBC.mprotect(ctypes.c_void_p(last), mmap.PAGESIZE, _PROT_NONE) != 0:
        raise OSError(ctypes.get_errno(), "mprotect failed")
    start = (pages - 1) * mmap.PAGESIZE - values.nbytes
    array = np.frombuffer(memory, values.dtype, values.size, start).reshape(values.shape)
    array[...] = values
    return array
