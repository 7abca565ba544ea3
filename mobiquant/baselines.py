"""Figures of other quantisations of the same model, to compare with: a JSON list that is read here and nowhere else.

    [{"name": "GPTQ 2", "bits_per_weight": 2.25, "kl": 0.728, "ppl": 45.5, "top1": 0.531}, ...]

bits_per_weight counts the block linears with their scales; kl is in nats per token and top1 a share, both against full
precision on the text that the comparison is about. Figures that are not known are null or left out.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Baseline:
    """One point of another method."""

    name: str
    bits_per_weight: float
    kl: float | None = None
    ppl: float | None = None
    top1: float | None = None


def read_baselines(path: Path) -> list[Baseline]:
    """The points of one file. Raises ValueError that names the file, entry and key, OSError when it cannot be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON: {error}") from error
    if not isinstance(content, list):
        raise ValueError(f"{path}: expected a list of baselines, found {type(content).__name__}")
    return [_baseline(entry, f"{path}: entry {index}") for index, entry in enumerate(content)]


def _baseline(entry: object, where: str) -> Baseline:
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: expected an object, found {type(entry).__name__}")
    if not isinstance(entry.get("name"), str):
        raise ValueError(f"{where}: name: expected a string, found {entry.get('name')!r}")
    bits = _number(entry, "bits_per_weight", where)
    if bits is None:
        raise ValueError(f"{where}: bits_per_weight: expected a number, found nothing")
    return Baseline(entry["name"], bits, *(_number(entry, key, where) for key in ("kl", "ppl", "top1")))


def _number(entry: dict[str, object], key: str, where: str) -> float | None:
    value = entry.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{where}: {key}: expected a number, found {value!r}")
    return float(value)
