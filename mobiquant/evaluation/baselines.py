"""Figures of other quantisations of the same model, to compare with: a JSON list that is read here and nowhere else.

    [{"name": "GPTQ 2", "bits_per_weight": 2.25, "kl": 0.728, "ppl": 45.5, "top1": 0.531,
      "text": "heldout.txt", "rule": "all"}, ...]

The first word of a name is the method, the rest tells its points apart. bits_per_weight counts the block linears with
their scales; kl is in nats per token and top1 a share, both against full precision. Figures that are not known are null
or left out. text and rule say what was scored; an entry without them is shown with every text. Other keys are notes.
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
    text: str | None = None
    rule: str | None = None

    @property
    def method(self) -> str:
        return self.name.split()[0]

    @property
    def label(self) -> str:
        """What tells it from the other points of its method; empty when it is the only one."""
        return " ".join(self.name.split()[1:])

    def belongs_to(self, text: str, rule: str) -> bool:
        """Whether it was taken on the text of this file name, scored by this rule."""
        return self.text in (None, text) and self.rule in (None, rule)


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
    values = {}
    for key, kind in Baseline.__annotations__.items():
        value, expected = entry.get(key), "a string" if kind.startswith("str") else "a number"
        fits = isinstance(value, str) if expected == "a string" else _is_number(value)
        if not fits and (value is not None or not kind.endswith("None")):
            raise ValueError(f"{where}: {key}: expected {expected}, found {value!r}")
        values[key] = value
    if not values["name"].strip():
        raise ValueError(f"{where}: name: expected at least one word, found {values['name']!r}")
    return Baseline(**values)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
