"""What commands do before they import torch. Nothing here imports it."""

from __future__ import annotations

import importlib.util
import os

_NEEDED = ("torch", "transformers", "safetensors", "tqdm")


def prepare_torch(n_threads: int | None = None) -> None:
    """Raise ValueError when torch or a companion is missing; set what must be set before the import.

    n_threads: of torch; None leaves it to torch.
    """
    if any(importlib.util.find_spec(name) is None for name in _NEEDED):
        raise ValueError("torch or its companions are not installed: pip install 'mobiquant[calibrate]'")
    # Threads that wait in busy loops make a step fifty times slower as soon as another process wants one of the cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if n_threads is not None:
        import torch

        torch.set_num_threads(n_threads)
