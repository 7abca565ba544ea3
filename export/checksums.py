"""Checksums of a file (docs/format.md, Checksums): the CRC-32 of every tensor in file order, then that of the metadata.

They are known when everything else is written, so the writer leaves room for them and fills it in at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from zlib import crc32

import numpy as np
from gguf import GGUFReader, GGUFValueType

from export.keys import KEY_CHECKSUMS
from export.metadata import Field

_VALUE = np.dtype("<u4")
_PARTS_BEFORE_VALUES = 5  # of an array in the reader: length of the name, name, type, type of the items, their number


def room_for_checksums(tensors: int) -> Field:
    """The field of a file of so many tensors before its checksums are known: zeros."""
    return Field(KEY_CHECKSUMS, [0] * (tensors + 1), GGUFValueType.ARRAY, GGUFValueType.UINT32)


def metadata_checksum(path: Path) -> int:
    """CRC-32 of everything before the first tensor, with its own checksum, the last of the list, as zeros."""
    reader = GGUFReader(path)
    _, end = _place(reader)
    with path.open("rb") as file:
        metadata = bytearray(file.read(int(reader.data_offset)))
    metadata[end - _VALUE.itemsize : end] = bytes(_VALUE.itemsize)
    return crc32(metadata)


def fill_in_checksums(path: Path, of_tensors: Sequence[int]) -> None:
    """Write `of_tensors`, and the checksum of the metadata after them, into the room that the file has for them."""
    start, end = _place(GGUFReader(path))
    _write(path, start, of_tensors)
    _write(path, end - _VALUE.itemsize, [metadata_checksum(path)])


def _write(path: Path, place: int, values: Sequence[int]) -> None:
    with path.open("rb+") as file:
        file.seek(place)
        file.write(np.array(values, _VALUE).tobytes())


def _place(reader: GGUFReader) -> tuple[int, int]:
    """Where the list of checksums begins in the file, and where it ends."""
    field = reader.fields[KEY_CHECKSUMS]
    start = field.offset + sum(part.nbytes for part in field.parts[:_PARTS_BEFORE_VALUES])
    return start, start + len(field.data) * _VALUE.itemsize
