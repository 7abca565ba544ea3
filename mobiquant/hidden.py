"""Hidden states of many windows between two blocks: in memory, or in a file when memory is short; the same numbers."""

from __future__ import annotations

import os
import tempfile
import weakref
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor


class HiddenStates(Protocol):
    """float32 [windows, seq_len, width] outside the device. Read and written by whole windows, numbers int64 [n]."""

    shape: tuple[int, int, int]

    def read(self, windows: Tensor, device: torch.device | str) -> Tensor:
        """A copy on the device, [n, seq_len, width]."""
        ...

    def write(self, windows: Tensor, states: Tensor) -> None:
        """Take over [n, seq_len, width] from any device."""
        ...


class StatesInMemory:
    """Hidden states in memory that stays in place for a GPU, whose copies then run at the speed of the bus."""

    def __init__(self, shape: tuple[int, int, int], device: torch.device):
        self.shape = shape
        self._states = torch.empty(shape)
        if device.type == "cuda":
            # Not torch's pinned memory, which rounds a size up to a power of two.
            runtime, address = torch.cuda.cudart(), self._states.data_ptr()
            if int(runtime.cudaHostRegister(address, self._states.nbytes, 0)) == 0:
                weakref.finalize(self, runtime.cudaHostUnregister, address)

    def read(self, windows: Tensor, device: torch.device | str) -> Tensor:
        result = torch.empty(len(windows), *self.shape[1:], device=device)
        for state, number in zip(result, windows.tolist(), strict=True):
            state.copy_(self._states[number])
        return result

    def write(self, windows: Tensor, states: Tensor) -> None:
        for state, number in zip(states, windows.tolist(), strict=True):
            self._states[number].copy_(state)


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

    def read(self, windows: Tensor, device: torch.device | str) -> Tensor:
        states = torch.empty(len(windows), *self.shape[1:])
        for number, state in zip(windows.tolist(), states, strict=True):
            self._transfer(os.preadv, number, state)
        return states.to(device)

    def write(self, windows: Tensor, states: Tensor) -> None:
        for number, state in zip(windows.tolist(), states.to("cpu", torch.float32).contiguous(), strict=True):
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


def hidden_states(shape: tuple[int, int, int], device: torch.device, folder: Path | None) -> HiddenStates:
    """Room for hidden states that a device works on: in a file in `folder`, or in memory without one."""
    return StatesInMemory(shape, device) if folder is None else StatesOnDisk(folder, shape)
