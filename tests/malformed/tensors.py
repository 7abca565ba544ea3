"""Tensors with wrong names, dimensions, types and places; tensors that are missing or too many; files that are cut."""

from __future__ import annotations

import re
from copy import deepcopy

import numpy as np

from export.limits import MAX_TENSOR_NAME
from malformed.header import FORMAT, TRUNCATED, one_of, wrapping
from malformed.parts import ALIGNMENT, TYPE_F16, TYPE_F32, TYPE_I8, Parts, TensorInfo
from malformed.registry import malformed


def some_tensor(parts: Parts, random: np.random.Generator, pattern: str = "") -> TensorInfo:
    return random.choice([tensor for tensor in parts.tensors if re.search(pattern, tensor.name.decode())])


def quoted(tensor: TensorInfo) -> str:
    return f"tensor '{re.escape(tensor.name.decode())}'"


# Names and number


@malformed(FORMAT)
def tensor_missing(parts: Parts, random: np.random.Generator) -> str:
    tensor = some_tensor(parts, random, r"norm|rope|scale_offset")
    parts.tensors.remove(tensor)
    return f"{quoted(tensor)} is missing"


@malformed(FORMAT)
def slice_missing(parts: Parts, random: np.random.Generator) -> str:
    tensor = some_tensor(parts, random, r"slice[1-4]$")
    parts.tensors.remove(tensor)
    return f"{quoted(tensor)} is missing"


@malformed(FORMAT)
def slice_twice(parts: Parts, random: np.random.Generator) -> str:
    tensor = some_tensor(parts, random, r"slice[1-4]$")
    parts.tensors.insert(int(random.integers(len(parts.tensors))), deepcopy(tensor))
    return f"{quoted(tensor)} appears twice"


@malformed(FORMAT)
def fifth_slice(parts: Parts, random: np.random.Generator) -> str:
    tensor = deepcopy(some_tensor(parts, random, r"slice4$"))
    tensor.name = tensor.name[:-1] + b"5"
    parts.tensors.append(tensor)
    return r"expected \d+ tensors, found \d+: some belong to no layer"


@malformed(FORMAT)
def router_table_missing(parts: Parts, random: np.random.Generator) -> str:
    tensor = some_tensor(parts, random, r"router_")
    parts.tensors.remove(tensor)
    return f"{quoted(tensor)} is missing"


@malformed(FORMAT)
def tensor_that_belongs_nowhere(parts: Parts, random: np.random.Generator) -> str:
    name = str(random.choice(["blk.0.attn_q.bias2", "blk.00.attn_q.slice1", "blk.7.attn_norm.weight", "x"]))
    parts.tensors.append(TensorInfo(name.encode(), [16], TYPE_F32, bytearray(64)))
    return r"expected \d+ tensors, found \d+: some belong to no layer"


@malformed(FORMAT)
def output_head_without_slices(parts: Parts, random: np.random.Generator) -> str:
    scales = deepcopy(parts.tensor("token_embd.scale_offset"))
    scales.name = b"output.scale_offset"
    parts.tensors.append(scales)
    return "tensor 'output.slice1' is missing"


@malformed(FORMAT)
def tensor_name_empty(parts: Parts, random: np.random.Generator) -> str:
    some_tensor(parts, random).name = b""
    return rf"name of a tensor at byte \d+: expected 1 to {MAX_TENSOR_NAME} bytes, found 0"


@malformed(FORMAT)
def tensor_name_too_long(parts: Parts, random: np.random.Generator) -> str:
    some_tensor(parts, random).name = b"t" * (size := MAX_TENSOR_NAME + int(random.integers(1, 500)))
    return rf"name of a tensor at byte \d+: expected 1 to {MAX_TENSOR_NAME} bytes, found {size}"


@malformed(FORMAT)
def tensor_name_length_wraps(parts: Parts, random: np.random.Generator) -> str:
    some_tensor(parts, random).name_length = size = wrapping(random)
    return rf"name of a tensor at byte \d+: expected 1 to {MAX_TENSOR_NAME} bytes, found {size}"


@malformed(FORMAT)
def tensor_name_with_control_characters(parts: Parts, random: np.random.Generator) -> str:
    byte = int(random.choice([0, 10, 27, 127, 200]))
    some_tensor(parts, random).name += bytes([byte])
    return f"name of a tensor: expected printable ASCII, found byte 0x{byte:02x}"


# Dimensions and types


@malformed(FORMAT)
def no_or_too_many_dimensions(parts: Parts, random: np.random.Generator) -> str:
    tensor = some_tensor(parts, random)
    tensor.dimension_count = int(random.choice([0, 5, 255, 2**32 - 1]))
    return f"{quoted(tensor)}: expected 1 to 4 dimensions, found {tensor.dimension_count}"


@malformed(FORMAT)
def dimension_of_zero(parts: Parts, random: np.random.Generator) -> str:
    tensor = some_tensor(parts, random)
    place = int(random.integers(len(tensor.dimensions)))
    tensor.dimensions[place] = 0
    return f"{quoted(tensor)}: dimension {place} is 0: the size is zero or wraps"


@malformed(FORMAT)
def dimensions_that_wrap(parts: Parts, random: np.random.Generator) -> str:
    tensor = some_tensor(parts, random)
    tensor.dimensions = [[2**32, 2**32, 2**32, 1], [2**63, 2, 1, 1], [3, 2**63, 1, 1]][int(random.integers(3))]
    return rf"{quoted(tensor)}: dimension 1 is \d+: the size is zero or wraps"


@malformed(FORMAT)
def bytes_that_wrap(parts: Parts, random: np.random.Generator) -> str:
    tensor = some_tensor(parts, random, "norm|rope|router_.*head")
    tensor.dimensions = [one_of(random, 2**62, 2**63, 2**64 - 1)]
    return f"{quoted(tensor)}: its size wraps"


@malformed(FORMAT)
def end_that_wraps(parts: Parts, random: np.random.Generator) -> str:
    tensor = some_tensor(parts, random, "slice")
    tensor.dimensions = [2**64 - int(random.choice([1, 64, 4096]))]
    return f"{quoted(tensor)}: its end wraps"


@malformed(TRUNCATED)
def size_beyond_the_file(parts: Parts, random: np.random.Generator) -> str:
    tensor = some_tensor(parts, random)
    tensor.dimensions = [int(random.choice([2**30, 2**40, 2**60]))]
    return rf"{quoted(tensor)} ends at byte \d+, the file at \d+"


@malformed(FORMAT)
def type_that_is_not_there(parts: Parts, random: np.random.Generator) -> str:
    tensor = some_tensor(parts, random)
    tensor.type = int(random.choice([2, 3, 8, 12, 25, 26, 30, 40, 2**31, 2**32 - 1]))
    return f"{quoted(tensor)}: expected type F32, F16 or I8, found type {tensor.type}"


@malformed(FORMAT)
def type_of_another_tensor(parts: Parts, random: np.random.Generator) -> str:
    tensor = some_tensor(parts, random)
    found = int(random.choice([kind for kind in (TYPE_F32, TYPE_F16, TYPE_I8) if kind != tensor.type]))
    elements = len(tensor.data) // {TYPE_F32: 4, TYPE_F16: 2, TYPE_I8: 1}[tensor.type]
    expected, tensor.type = tensor.type, found
    tensor.data = bytearray(elements * {TYPE_F32: 4, TYPE_F16: 2, TYPE_I8: 1}[found])
    return f"{quoted(tensor)}: expected type {expected}, found {found}"


@malformed(FORMAT)
def shape_of_the_same_size(parts: Parts, random: np.random.Generator) -> str:
    tensor = some_tensor(parts, random, "slice|hidden$")
    tensor.dimensions = [tensor.dimensions[0] * 2, *tensor.dimensions[1:]]
    tensor.dimensions[-1] //= 2
    if 0 in tensor.dimensions:
        tensor.dimensions = [len(tensor.data)]
    return rf"{quoted(tensor)}: expected shape \(.*\), found \(.*\)"


@malformed(FORMAT)
def shape_of_another_size(parts: Parts, random: np.random.Generator) -> str:
    tensor = some_tensor(parts, random)
    factor = int(random.integers(2, 5))
    tensor.dimensions[-1] *= factor
    tensor.data *= factor
    return rf"{quoted(tensor)}: expected shape \(.*\), found \(.*\)"


@malformed(FORMAT)
def threshold_table_of_another_shape(parts: Parts, random: np.random.Generator) -> str:
    tensor = some_tensor(parts, random, "threshold")
    tensor.dimensions.reverse()
    return rf"{quoted(tensor)}: expected shape \(.*\), found \(.*\)"


# Places


def _other_place(parts: Parts, random: np.random.Generator, change: int) -> str:
    place = int(random.integers(1, len(parts.tensors)))
    start = sum(len(tensor.data) + -len(tensor.data) % ALIGNMENT for tensor in parts.tensors[:place])
    parts.tensors[place].offset = found = (start + change) % 2**64
    return rf"{quoted(parts.tensors[place])}: expected offset {start} \(no gap, no overlap\), found {found}"


@malformed(FORMAT)
def tensors_that_overlap(parts: Parts, random: np.random.Generator) -> str:
    return _other_place(parts, random, -ALIGNMENT)


@malformed(FORMAT)
def gap_between_tensors(parts: Parts, random: np.random.Generator) -> str:
    return _other_place(parts, random, ALIGNMENT * int(random.integers(1, 100)))


@malformed(FORMAT)
def offset_off_the_alignment(parts: Parts, random: np.random.Generator) -> str:
    return _other_place(parts, random, int(random.integers(1, ALIGNMENT)))


@malformed(FORMAT)
def offset_that_wraps(parts: Parts, random: np.random.Generator) -> str:
    return _other_place(parts, random, wrapping(random) - wrapping(random) % ALIGNMENT + 2**62)


@malformed(FORMAT)
def two_tensors_in_one_place(parts: Parts, random: np.random.Generator) -> str:
    parts.tensors[1].offset = 0
    return rf"{quoted(parts.tensors[1])}: expected offset \d+ \(no gap, no overlap\), found 0"


@malformed(FORMAT)
def places_exchanged(parts: Parts, random: np.random.Generator) -> str:
    first, second = parts.tensors[:2]
    first.offset, second.offset = len(first.data), 0
    return rf"{quoted(first)}: expected offset 0 \(no gap, no overlap\)"


# Ends


@malformed(FORMAT)
def bytes_after_the_end(parts: Parts, random: np.random.Generator) -> str:
    parts.tail = random.bytes(int(random.choice([1, 63, 64, 4096])))
    return r"expected \d+ bytes, found \d+: bytes after the last tensor"


@malformed(TRUNCATED)
def cut_in_tensor_infos(parts: Parts, random: np.random.Generator) -> str:
    begin = 24 + sum(len(key.build()) for key in parts.keys)
    size = sum(24 + len(tensor.name) + 8 * len(tensor.dimensions) for tensor in parts.tensors)
    parts.cut = begin + int(random.integers(size * 3 // 4, size))
    return "file ends in its header: (name|number|dimension|type|offset)"


@malformed(TRUNCATED)
def cut_in_tensor_data(parts: Parts, random: np.random.Generator) -> str:
    whole = len(parts.build())
    parts.cut = int(random.integers(len(parts.metadata()), whole - ALIGNMENT))
    return r"tensor '[\w.]+' ends at byte \d+, the file at \d+"
