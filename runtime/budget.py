"""A precision budget: one depth for every token, or an average that the routers spend token by token."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral

DEPTH_BITS = (2, 4, 6, 8)


@dataclass(frozen=True)
class Budget:
    """`bits` per routed weight, for every token alike or, when `routed`, on average.

    Raises ValueError for one depth that is not 2, 4, 6 or 8 and for an average outside 2..8.
    """

    bits: float
    routed: bool

    def __post_init__(self) -> None:
        if self.routed and not DEPTH_BITS[0] <= self.bits <= DEPTH_BITS[-1]:
            raise ValueError(
                f"average bits: expected a number from {DEPTH_BITS[0]} to {DEPTH_BITS[-1]}, found {self.bits}"
            )
        if not self.routed:
            depth_of(self.bits, "bits")

    @classmethod
    def of(cls, bits: int | float) -> Budget:
        """An integer is one precision for every token, a float an average."""
        return cls(float(bits), routed=not isinstance(bits, Integral))

    @classmethod
    def requested(cls, bits: int | None, avg_bits: float | None) -> Budget | None:
        """From the two ways to ask, of which at most one may be given; None when neither is."""
        if bits is not None and avg_bits is not None:
            raise ValueError(f"budget: expected bits or average bits, found both ({bits} and {avg_bits})")
        if bits is not None:
            return cls(bits, routed=False)
        return None if avg_bits is None else cls(float(avg_bits), routed=True)

    def __str__(self) -> str:
        return f"{self.bits:g} bits {'on average' if self.routed else 'for every token'}"

    @property
    def depth(self) -> int:
        """Slices to read, 1..4, of a budget that is not routed."""
        return depth_of(self.bits, "bits")


def depth_of(bits: float, name: str) -> int:
    """Number of 2-bit slices, 1..4. Raises ValueError, naming `name`, for anything but 2, 4, 6 or 8 bits."""
    if bits not in DEPTH_BITS:
        raise ValueError(f"{name}: expected one of {', '.join(map(str, DEPTH_BITS))}, found {bits}")
    return int(bits) // 2
