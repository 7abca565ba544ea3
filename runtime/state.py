"""A saved session as bytes: the tokens in the cache with their precision, and the cache as the C library gives it.

8 bytes  magic       4 bytes  length of the header, little-endian       4 bytes  its CRC-32
header   JSON: {"tokens": [...], "budgets": [{"bits": ..., "routed": ...}, ...], "used": [[index, count], ...]}
cache    checked by the C library (runtime/src/state.c)
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby

from runtime.budget import Budget

_MAGIC = b"MQSAVED2"
_PREFIX = struct.Struct("<8sII")


@dataclass(frozen=True)
class SavedSession:
    """history: each token in the cache with the budget it was computed at, oldest first."""

    history: Sequence[tuple[int, Budget]]
    cache: bytes | bytearray | memoryview

    def pack(self) -> bytes:
        """The bytes of the file."""
        budgets = list(dict.fromkeys(budget for _, budget in self.history))
        header = {
            "tokens": [token for token, _ in self.history],
            "budgets": [asdict(budget) for budget in budgets],
            "used": [
                [budgets.index(budget), len(list(run))] for budget, run in groupby(budget for _, budget in self.history)
            ],
        }
        text = json.dumps(header, separators=(",", ":")).encode("ascii")
        return b"".join((_PREFIX.pack(_MAGIC, len(text), zlib.crc32(text)), text, self.cache))

    @classmethod
    def unpack(cls, data: bytes | bytearray | memoryview) -> SavedSession:
        """Inverse of `pack`. Raises ValueError for bytes that are no saved session; the cache is not looked at."""
        data = memoryview(data).cast("B")
        if len(data) < _PREFIX.size or bytes(data[: len(_MAGIC)]) != _MAGIC:
            raise ValueError("saved session: expected bytes that save_state gave, found something else")
        _, size, checksum = _PREFIX.unpack_from(data)
        if size > len(data) - _PREFIX.size:
            raise ValueError(f"saved session: expected a header of {size} bytes, found {len(data) - _PREFIX.size}")
        text = bytes(data[_PREFIX.size : _PREFIX.size + size])
        if zlib.crc32(text) != checksum:
            raise ValueError("saved session: its header was altered: its checksum differs")
        try:
            header = json.loads(text)
            tokens = [int(token) for token in header["tokens"]]
            budgets = [Budget(**budget) for budget in header["budgets"]]
            runs = [(budgets[index], count) for index, count in header["used"]]
            if any(count < 1 for _, count in runs) or sum(count for _, count in runs) != len(tokens):
                raise ValueError("expected one budget for every token")
            used = [budget for budget, count in runs for _ in range(count)]
        except (ArithmeticError, IndexError, KeyError, RecursionError, TypeError, ValueError) as error:
            raise ValueError(f"saved session: its header is damaged: {error}") from error
        return cls(list(zip(tokens, used, strict=True)), data[_PREFIX.size + size :])
