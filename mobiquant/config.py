"""Settings of a calibration and the `quantization_config` entry of a checkpoint's config.json (no torch here).

Owns: which settings exist, their defaults and limits, and their form as a dictionary. Does not own: what they do.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mobiquant.packing import GROUP_SIZE, SLICE_BITS, SLICE_COUNT

QUANT_METHOD = "mobiquant"
FORMAT_VERSION = 1
MAX_ROUTER_HIDDEN = 16
MAX_SEQ_LEN = 2048
BUDGET_COUNT = 32


def default_budgets() -> tuple[float, ...]:
    """The average-bits targets of a threshold table: 32 values from 2 to 8, exact in float32."""
    lowest, highest = float(SLICE_BITS), float(SLICE_BITS * SLICE_COUNT)
    return tuple(float(value) for value in np.linspace(lowest, highest, BUDGET_COUNT, dtype=np.float32))


@dataclass(frozen=True)
class CalibrationSettings:
    """Everything that decides the numbers of a calibration, apart from the model and the text.

    samples: token windows for training, one for each depth at least;
    seq_len: tokens per window, None means the model's context, at most 2048;
    batch: windows per step; clip_lr, router_lr: AdamW step sizes; lambda_bits: weight of (average bits - target)²
    in the routed loss; distill_steps: training steps of the base slice in recipe best; distill_batch: windows per such
    step; device: where the current block lives, or the whole model where recipe best can hold it.
    """

    recipe: str = "best"
    samples: int = 128
    seq_len: int | None = None
    epochs: int = 20
    batch: int = 1
    clip_lr: float = 2e-2
    router_lr: float = 5e-3
    lambda_bits: float = 0.1
    distill_steps: int = 800
    distill_batch: int = 16
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        _expect_types(self, "settings")
        for name, lowest in (("samples", SLICE_COUNT), ("epochs", 1), ("batch", 1), ("seed", 0)):
            if getattr(self, name) < lowest:
                raise ValueError(f"{name}: expected at least {lowest}, found {getattr(self, name)}")
        if self.seq_len is not None and self.seq_len < 2:
            raise ValueError(f"seq_len: expected at least 2, found {self.seq_len}")
        for name in ("clip_lr", "router_lr", "lambda_bits"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}: expected a finite number, 0 or more, found {getattr(self, name)}")

    def resolved(self, context_length: int) -> CalibrationSettings:
        """The same settings with `seq_len` filled in. Raises ValueError when it exceeds the model's context."""
        seq_len = min(context_length, MAX_SEQ_LEN) if self.seq_len is None else self.seq_len
        if seq_len > context_length:
            raise ValueError(f"seq_len: expected at most the model's context {context_length}, found {seq_len}")
        return dataclasses.replace(self, seq_len=seq_len)


@dataclass(frozen=True)
class RouterConfig:
    """hidden_size: units H of every router, 1..16; budgets: average bits of the table entries, ascending, 2 to 8."""

    hidden_size: int
    budgets: tuple[float, ...] = field(default_factory=default_budgets)

    def __post_init__(self) -> None:
        _expect_types(self, "router")
        if not 1 <= self.hidden_size <= MAX_ROUTER_HIDDEN:
            raise ValueError(f"router.hidden_size: expected 1..{MAX_ROUTER_HIDDEN}, found {self.hidden_size}")
        lowest, highest = SLICE_BITS, SLICE_BITS * SLICE_COUNT
        ascending = all(low < high for low, high in zip(self.budgets, self.budgets[1:], strict=False))
        if len(self.budgets) < 2 or self.budgets[0] != lowest or self.budgets[-1] != highest or not ascending:
            raise ValueError(f"router.budgets: expected ascending from {lowest} to {highest}, found {self.budgets}")


@dataclass(frozen=True)
class QuantizationConfig:
    """What config.json says of the slices. Default depths of embedding and head: 1..4 slices of 2 bits."""

    router: RouterConfig
    embedding_depth: int = SLICE_COUNT
    output_depth: int = SLICE_COUNT
    settings: CalibrationSettings = field(default_factory=CalibrationSettings)

    def __post_init__(self) -> None:
        for name in ("embedding_depth", "output_depth"):
            depth = getattr(self, name)
            if isinstance(depth, bool) or not isinstance(depth, int) or not 1 <= depth <= SLICE_COUNT:
                raise ValueError(f"{name}: expected a depth 1..{SLICE_COUNT}, found {depth!r}")

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, with the constants of the format that a reader checks."""
        settings = dataclasses.asdict(self.settings)
        recipe = settings.pop("recipe")
        return {
            "quant_method": QUANT_METHOD,
            "format_version": FORMAT_VERSION,
            "group_size": GROUP_SIZE,
            "slice_bits": [SLICE_BITS] * SLICE_COUNT,
            "embedding_depth": self.embedding_depth,
            "output_depth": self.output_depth,
            "router": {"hidden_size": self.router.hidden_size, "budgets": list(self.router.budgets)},
            "recipe": recipe,
            "settings": settings,
        }

    @classmethod
    def from_dict(cls, entry: dict[str, Any]) -> QuantizationConfig:
        """Inverse of `to_dict`. Raises ValueError that names the key, what was expected and what was found."""
        constants = {
            "quant_method": QUANT_METHOD,
            "format_version": FORMAT_VERSION,
            "group_size": GROUP_SIZE,
            "slice_bits": [SLICE_BITS] * SLICE_COUNT,
        }
        for key, expected in constants.items():
            if _required(entry, key) != expected:
                raise ValueError(f"{key}: expected {expected!r}, found {entry[key]!r}")
        router, settings = _required(entry, "router"), _required(entry, "settings")
        for key, value in (("router", router), ("settings", settings)):
            if not isinstance(value, dict):
                raise ValueError(f"{key}: expected an object, found {value!r}")
        # A record of how it was made: settings that came later have their defaults, those that went are passed over.
        known = {item.name for item in dataclasses.fields(CalibrationSettings)} - {"recipe"}
        settings = {key: value for key, value in settings.items() if key in known}
        budgets = _required(router, "budgets", "router.")
        if not isinstance(budgets, list) or not all(isinstance(value, float | int) for value in budgets):
            raise ValueError(f"router.budgets: expected a list of numbers, found {budgets!r}")
        return cls(
            router=RouterConfig(_required(router, "hidden_size", "router."), tuple(map(float, budgets))),
            embedding_depth=_required(entry, "embedding_depth"),
            output_depth=_required(entry, "output_depth"),
            settings=CalibrationSettings(recipe=_required(entry, "recipe"), **settings),
        )


def _required(entry: dict[str, Any], key: str, prefix: str = "") -> Any:
    if key not in entry:
        raise ValueError(f"{prefix}{key}: expected in quantization_config, found nothing")
    return entry[key]


def _expect_types(instance: object, where: str) -> None:
    """Check int, float, str and their optional forms, which is all that JSON can get wrong here."""
    kinds = {"int": (int,), "float": (int, float), "str": (str,), "int | None": (int, type(None))}
    for item in dataclasses.fields(instance):  # type: ignore[arg-type]
        value, expected = getattr(instance, item.name), kinds.get(str(item.type))
        if expected is not None and (isinstance(value, bool) or not isinstance(value, expected)):
            raise ValueError(f"{where}.{item.name}: expected {item.type}, found {value!r}")
