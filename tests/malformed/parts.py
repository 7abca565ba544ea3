"""A GGUF file taken apart into keys and tensors as bytes, and put together again as it stands, however wrong.

`Parts.build` gives back the very bytes of an unchanged file. Offsets follow from the sizes unless one was set; counts,
padding and checksums alike. That makes it the writer of files that no honest writer would write.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from zlib import crc32

from export.keys import ALIGNMENT, KEY_CHECKSUMS

U8, U32, I32, F32, BOOL, STRING, ARRAY, U64 = 0, 4, 5, 6, 7, 8, 9, 10
TYPE_F32, TYPE_F16, TYPE_I8 = 0, 1, 24
VALUE_SIZE = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
TENSOR_SIZE = {TYPE_F32: 4, TYPE_F16: 2, TYPE_I8: 1}


@dataclass
class Key:
    """`value`: the bytes after the type; of a string its length too, of an array the type and number of its items."""

    name: bytes
    type: int
    value: bytes
    name_length: int | None = None

    def build(self) -> bytes:
        length = len(self.name) if self.name_length is None else self.name_length
        return struct.pack("<Q", length) + self.name + struct.pack("<I", self.type) + self.value


@dataclass
class TensorInfo:
    """`dimensions` in the order of the file, the fastest first; `offset` None: after the tensor before."""

    name: bytes
    dimensions: list[int]
    type: int
    data: bytearray
    offset: int | None = None
    name_length: int | None = None
    dimension_count: int | None = None


@dataclass
class Parts:
    keys: list[Key]
    tensors: list[TensorInfo]
    magic: bytes = b"GGUF"
    version: int = 3
    key_count: int | None = None
    tensor_count: int | None = None
    tail: bytes = b""
    cut: int | None = None  # bytes that are left
    checksums_follow: bool = True  # the changes, when the file has any
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, data: bytes) -> Parts:
        """A well-formed file in parts."""
        version, tensor_count, key_count = struct.unpack_from("<IQQ", data, 4)
        at = 24
        keys, infos = [], []
        for _ in range(key_count):
            name, at = _string(data, at)
            (kind,) = struct.unpack_from("<I", data, at)
            end = _value_end(data, at + 4, kind)
            keys.append(Key(name, kind, data[at + 4 : end]))
            at = end
        for _ in range(tensor_count):
            name, at = _string(data, at)
            (count,) = struct.unpack_from("<I", data, at)
            *dimensions, kind, offset = struct.unpack_from(f"<{count}QIQ", data, at + 4)
            infos.append((name, dimensions, kind, offset))
            at += 4 + 8 * count + 12
        start = at + -at % ALIGNMENT
        tensors = []
        for name, dimensions, kind, offset in infos:
            size = TENSOR_SIZE[kind]
            for length in dimensions:
                size *= length
            tensors.append(TensorInfo(name, dimensions, kind, bytearray(data[start + offset : start + offset + size])))
        return cls(keys, tensors, version=version)

    def key(self, name: str) -> Key:
        return next(key for key in self.keys if key.name == name.encode())

    def tensor(self, name: str) -> TensorInfo:
        return next(tensor for tensor in self.tensors if tensor.name == name.encode())

    def metadata(self) -> bytes:
        """Header, keys and tensor infos, padded to where the first tensor lies."""
        tensor_count = len(self.tensors) if self.tensor_count is None else self.tensor_count
        key_count = len(self.keys) if self.key_count is None else self.key_count
        pieces = [self.magic, struct.pack("<IQQ", self.version, tensor_count, key_count)]
        pieces += [key.build() for key in self.keys]
        place = 0
        for tensor in self.tensors:
            length = len(tensor.name) if tensor.name_length is None else tensor.name_length
            count = len(tensor.dimensions) if tensor.dimension_count is None else tensor.dimension_count
            offset = place if tensor.offset is None else tensor.offset
            pieces += [struct.pack("<Q", length), tensor.name, struct.pack("<I", count)]
            pieces += [struct.pack(f"<{len(tensor.dimensions)}Q", *tensor.dimensions)]
            pieces += [struct.pack("<IQ", tensor.type, offset)]
            place += len(tensor.data) + -len(tensor.data) % ALIGNMENT
        return _padded(b"".join(pieces))

    def build(self) -> bytes:
        if self.checksums_follow:
            self._follow()
        whole = self.metadata() + b"".join(_padded(bytes(tensor.data)) for tensor in self.tensors) + self.tail
        return whole if self.cut is None else whole[: self.cut]

    def _follow(self) -> None:
        field = next((key for key in self.keys if key.name == KEY_CHECKSUMS.encode()), None)
        if field is None or field.type != ARRAY:
            return
        count = len(self.tensors) + 1
        field.value = array(U32, struct.pack(f"<{count}I", *[0] * count))
        sums = [crc32(tensor.data) for tensor in self.tensors]
        field.value = array(U32, struct.pack(f"<{count}I", *sums, 0))
        sums.append(crc32(self.metadata()))
        field.value = array(U32, struct.pack(f"<{count}I", *sums))


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def array(kind: int, values: bytes, count: int | None = None) -> bytes:
    return struct.pack("<IQ", kind, len(values) // VALUE_SIZE.get(kind, 1) if count is None else count) + values


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def f32(value: float) -> bytes:
    return struct.pack("<f", value)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % ALIGNMENT)


def _string(data: bytes, at: int) -> tuple[bytes, int]:
    (size,) = struct.unpack_from("<Q", data, at)
    return data[at + 8 : at + 8 + size], at + 8 + size


def _value_end(data: bytes, at: int, kind: int) -> int:
    if kind == STRING:
        return _string(data, at)[1]
    if kind != ARRAY:
        return at + VALUE_SIZE[kind]
    item, count = struct.unpack_from("<IQ", data, at)
    assert item in VALUE_SIZE
    return at + 12 + count * VALUE_SIZE[item]
