"""Reopens a written file with the `gguf` reader and compares all of it with what it was made from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np
from gguf import GGUFReader, GGUFValueType
from tqdm import tqdm

from export.errors import ExportError
from export.keys import ALIGNMENT
from export.metadata import Field
from export.plan import PlannedTensor
from export.writer import TensorSource


def verify_file(path: Path, fields: Sequence[Field], plan: Sequence[PlannedTensor], source: TensorSource) -> None:
    """Check every field, and the order, place, type, shape and bytes of every tensor, which `source` makes anew.

    Raises ExportError that names the key or tensor, the expected and the found.
    """
    try:
        reader = GGUFReader(path)
    except (ValueError, KeyError, IndexError) as error:
        raise ExportError(f"{path}: the written file cannot be read back: {error}") from error
    for field in fields:
        _expect(path, f"key {field.key}", _as_stored(field), _stored(reader, field.key))
    _expect(path, "tensor names", [tensor.name for tensor in plan], [tensor.name for tensor in reader.tensors])

    end = int(reader.data_offset)  # the reader's own number has 32 bits, too few for a large file
    total = sum(tensor.nbytes for tensor in plan)
    with tqdm(total=total, unit="B", unit_scale=True, desc="verifying", leave=False, disable=None) as progress:
        for planned, stored in zip(plan, reader.tensors, strict=True):
            _expect(path, f"tensor {planned.name}: offset", end, stored.data_offset)
            _expect(path, f"tensor {planned.name}: dtype", planned.dtype, stored.data.dtype)
            _expect(path, f"tensor {planned.name}: shape", planned.shape, tuple(stored.data.shape))
            # Not through the reader, which maps the file: pages that were read would stay.
            data = np.fromfile(path, np.uint8, planned.nbytes, offset=stored.data_offset)
            same = np.array_equal(source.read(planned).view(np.uint8).ravel(), data)
            _expect(path, f"tensor {planned.name}: equal bytes", True, same)
            end += -(-planned.nbytes // ALIGNMENT) * ALIGNMENT
            progress.update(planned.nbytes)
    _expect(path, "file size", end, path.stat().st_size)


def _as_stored(field: Field) -> object:
    """The field's value with the precision of its type in the file."""
    if GGUFValueType.FLOAT32 in (field.type, field.item_type):
        return np.asarray(field.value, np.float32).tolist()
    return field.value


def _stored(reader: GGUFReader, key: str) -> object:
    field: gguf.ReaderField | None = reader.get_field(key)
    return None if field is None else field.contents()


def _expect(path: Path, what: str, expected: object, found: object) -> None:
    if expected != found:
        raise ExportError(f"{path}: {what}: expected {expected!r:.200}, found {found!r:.200}")
