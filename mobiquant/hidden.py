"""Hidden states of many windows between two blocks: in memory, or in a file when memory is short.

A torch tensor is the one kind; `StatesOnDisk` is the other and gives the same numbers.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor


class HiddenStates(Protocol):
    """float32 [windows, seq_len, width]. Read and written by whole windows, windows given as int64 [n] or one number;
    what is read is a copy or must be treated as one."""

    shape: tuple[int, ...] | torch.Size

    def __getitem__(self, windows: Tensor | int) -> Tensor: ...
    def __setitem__(self, windows: Tensor | int, states: Tensor) -> None: ...


class StatesOnDisk:
    """Hidden states in a file without a name, which the system removes however the process ends.

    Read and written by plain calls, not mapped: resident memory is what was asked for. Raises OSError, on creation too
    when the disk has no room.
    """

    def __init__(self, folder: Path, shape: tuple[int, int, int]):
        self.shape = shape
        self._bytes = 4 * shape[1] * shape[2]
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  (as long-lived as this object)
        try:
            os.posix_fallocate(self._file.fileno(), 0, shape[0] * self._bytes)
        except OSError as error:
            raise OSError(
                error.errno, f"{shape[0] * self._bytes / 1e9:.1f} GB for hidden states: {error.strerror}", str(folder)
            ) from error

    def __getitem__(self, windows: Tensor | int) -> Tensor:
        numbers = _numbers(windows)
        states = torch.empty(len(numbers), *self.shape[1:])
        for number, state in zip(numbers, states, strict=True):
            self._transfer(os.preadv, number, state)
        return states[0] if isinstance(windows, int) else states

    def __setitem__(self, windows: Tensor | int, states: Tensor) -> None:
        numbers = _numbers(windows)
        states = states.to("cpu", torch.float32).reshape(len(numbers), *self.shape[1:]).contiguous()
        for number, state in zip(numbers, states, strict=True):
            self._transfer(os.pwritev, number, state)

    def _transfer(self, call, number: int, state: Tensor) -> None:
        if not 0 <= number < self.shape[0]:
            raise IndexError(f"window: expected 0..{self.shape[0] - 1}, found {number}")
        buffer, done = memoryview(state.detach().numpy()).cast("B"), 0
        while done < self._bytes:  # one call moves at most 2 GiB
            moved = call(self._file.fileno(), [buffer[done:]], number * self._bytes + done)
            if moved == 0:
                raise OSError("hidden states: their file ended early")
            done += moved


def hidden_states(windows: int, seq_len: int, width: int, folder: Path | None) -> HiddenStates:
    """Room for hidden states: in a file in `folder`, or in memory without one."""
    shape = (windows, seq_len, width)
    return torch.empty(shape) if folder is None else StatesOnDisk(folder, shape)


def _numbers(windows: Tensor | int) -> list[int]:
    return [windows] if isinstance(windows, int) else windows.tolist()
