"""The device side: opens a MoBiQuant GGUF file and runs it at any average precision from 2 to 8 bits.

`from runtime import Model` is the whole public door. Nothing here imports torch.
"""

from __future__ import annotations

from runtime.model import Model
from runtime.native import MobiQuantError

__all__ = ["MobiQuantError", "Model"]
