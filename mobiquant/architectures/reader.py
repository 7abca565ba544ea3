"""Reading a config.json: every value with its type checked, every error with its key."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SLIDING, FULL = "sliding_attention", "full_attention"


class UnsupportedModelError(ValueError):
    """The model is not of a kind that the file format and the runtime can hold; the message says what and why."""


class ConfigReader:
    """A configuration with the defaults of its row; every reading checks the type and names the key."""

    def __init__(self, content: Mapping[str, Any], defaults: Mapping[str, Any], where: Path | str):
        self._content = {**defaults, **content}
        self._where = where

    def of(self, content: Mapping[str, Any]) -> ConfigReader:
        """Of an object inside this one."""
        return ConfigReader(content, {}, self._where)

    def error(self, key: str, expected: str, found: object) -> UnsupportedModelError:
        return UnsupportedModelError(f"{self._where}: {key}: expected {expected}, found {found!r}")

    def get(self, key: str) -> Any:
        return self._content.get(key)

    def integer(self, key: str, default: int | None = None, least: int = 1) -> int:
        value = self.get(key) if self.get(key) is not None else default
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(key, "a number of type int", value)
        if value < least:
            raise self.error(key, f"at least {least}", value)
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key) if self.get(key) is not None else default
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.error(key, "a number of type float", value)
        return float(value)

    def expect(self, key: str, value: Any) -> None:
        """The key, when it is there at all, must have this value."""
        found = self.get(key)
        if found is not None and found != value:
            raise self.error(key, repr(value), found)

    def layer_types(self, blocks: int) -> list[str] | None:
        """None when the configuration does not say."""
        kinds = self.get("layer_types")
        if kinds is None:
            return None
        if not isinstance(kinds, list) or len(kinds) != blocks:
            raise self.error("layer_types", f"a list of {blocks}", kinds)
        for kind in kinds:
            if kind not in (SLIDING, FULL):
                raise self.error("layer_types", f"{SLIDING} or {FULL}", kind)
        return kinds
