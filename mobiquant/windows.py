"""Sliding windows as config.json gives them: how many positions a token of each block sees."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def sliding_windows(config: Mapping[str, Any], blocks: int) -> tuple[int, ...]:
    """Per block the positions that a token sees, its own counted; 0: all. Raises ValueError that names the key."""
    window = config.get("sliding_window")
    if window is None or config.get("use_sliding_window") is False:
        return (0,) * blocks
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise ValueError(f"sliding_window: expected a number above 0, found {window!r}")
    kinds = config.get("layer_types") or ["sliding_attention"] * blocks
    if len(kinds) != blocks:
        raise ValueError(f"layer_types: expected {blocks} layers, found {len(kinds)}")
    unknown = sorted(set(kinds) - {"sliding_attention", "full_attention"})
    if unknown:
        raise ValueError(f"layer_types: expected sliding_attention or full_attention, found {unknown[0]}")
    return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)
