"""A precision budget: one depth for all, a depth per linear, or an average that the routers spend token by token."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral
from typing import Protocol

DEPTH_BITS = (2, 4, 6, 8)
_STATIC = "static:"


class Adjustable(Protocol):
    """What a budget is applied to: a session of the C library, or the torch reference."""

    def set_depth(self, depth: int) -> None: ...
    def set_average_bits(self, bits: float) -> None: ...
    def set_static_bits(self, bits: float) -> None: ...


@dataclass(frozen=True)
class Budget:
    """`bits` per routed weight: for every token and linear alike; when `routed`, on average over tokens and linears;
    when `static`, on average over linears, each at one depth for every token.

    Raises ValueError for one depth that is not 2, 4, 6 or 8, for an average outside 2..8, and for routed and static.
    """

    bits: float
    routed: bool
    static: bool = False

    def __post_init__(self) -> None:
        if self.routed and self.static:
            raise ValueError(f"budget: expected routed or static bits, found both at {self.bits}")
        if not (self.routed or self.static):
            depth_of(self.bits, "bits")
        elif not DEPTH_BITS[0] <= self.bits <= DEPTH_BITS[-1]:
            name = "average bits" if self.routed else "static bits"
            raise ValueError(f"{name}: expected a number from {DEPTH_BITS[0]} to {DEPTH_BITS[-1]}, found {self.bits}")

    @classmethod
    def of(cls, bits: int | float | str) -> Budget:
        """An integer is one precision for every token, a float a routed average, a string what `parse_bits` takes."""
        if isinstance(bits, str):
            bits = parse_bits(bits)
        if isinstance(bits, str):
            return cls(float(bits.removeprefix(_STATIC)), routed=False, static=True)
        return cls(float(bits), routed=not isinstance(bits, Integral))

    @classmethod
    def parse(cls, text: str) -> Budget:
        """As a user writes it in a list: "4" is one precision for every token, "4.0" a routed average, "static:4" a
        static one. Raises ValueError."""
        try:
            if text.isdecimal():
                return cls.of(int(text))
            return cls.of(float(text) if "." in text and ":" not in text else text)
        except ValueError as error:
            raise ValueError(f"budget {text!r}: {error}") from error

    @classmethod
    def requested(cls, bits: int | str | None, avg_bits: float | None) -> Budget | None:
        """From the two ways to ask, of which at most one may be given; None when neither is."""
        if bits is not None and avg_bits is not None:
            raise ValueError(f"budget: expected bits or average bits, found both ({bits} and {avg_bits})")
        if bits is not None:
            return cls.of(bits) if isinstance(bits, str) else cls(bits, routed=False)
        return None if avg_bits is None else cls(float(avg_bits), routed=True)

    def __str__(self) -> str:
        return (
            f"{self.bits:g} bits {'on average' if self.routed else 'by linear' if self.static else 'for every token'}"
        )

    @property
    def value(self) -> int | float | str:
        """What `of` takes to give this budget."""
        if self.static:
            return f"{_STATIC}{self.bits:g}"
        return self.bits if self.routed else int(self.bits)

    @property
    def depth(self) -> int:
        """Slices to read, 1..4, of a budget with one depth for all."""
        return depth_of(self.bits, "bits")

    def apply(self, target: Adjustable) -> None:
        """Let the next tokens read this. Raises as the target's setters do when it lacks such a depth or order."""
        if self.routed:
            target.set_average_bits(self.bits)
        elif self.static:
            target.set_static_bits(self.bits)
        else:
            target.set_depth(self.depth)


def parse_bits(text: str) -> int | str:
    """2, 4, 6 or 8 as a number, or `static:X` with X from 2 to 8 as it is. Raises ValueError for anything else."""
    if text.startswith(_STATIC):
        try:
            Budget(float(text.removeprefix(_STATIC)), routed=False, static=True)
        except ValueError as error:
            raise ValueError(f"bits: expected {_STATIC}X with X from 2 to 8, found {text!r}") from error
        return text
    if text not in map(str, DEPTH_BITS):
        raise ValueError(f"bits: expected {', '.join(map(str, DEPTH_BITS))} or {_STATIC}X, found {text!r}")
    return int(text)


def depth_of(bits: float, name: str) -> int:
    """Number of 2-bit slices, 1..4. Raises ValueError, naming `name`, for anything but 2, 4, 6 or 8 bits."""
    if bits not in DEPTH_BITS:
        raise ValueError(f"{name}: expected one of {', '.join(map(str, DEPTH_BITS))}, found {bits}")
    return int(bits) // 2
