"""The device side: opens a MoBiQuant GGUF file and runs it at any average precision from 2 to 8 bits.

`from runtime import Model` is the whole public door. Nothing here imports torch.
"""

from __future__ import annotations

from typing import Any

from runtime.errors import MobiQuantError

__all__ = ["MobiQuantError", "Model"]


def __getattr__(name: str) -> Any:
    # Only who asks for Model needs the compiled module: commands that only calibrate work without it.
    if name == "Model":
        from runtime.model import Model

        return Model
    raise AttributeError(f"module 'runtime' has no attribute {name!r}")
