"""Writes one GGUF file, a tensor at a time: memory holds the largest tensor, never the model.

The file grows under a temporary name beside its target; the caller renames it after verification (runtime.files).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol
from zlib import crc32

import gguf
import numpy as np
from tqdm import tqdm

from export.checksums import fill_in_checksums, room_for_checksums
from export.keys import ALIGNMENT, ARCHITECTURE, KEY_ALIGNMENT, KEY_ARCHITECTURE
from export.metadata import Field
from export.plan import PlannedTensor


class TensorSource(Protocol):
    """Where tensor data comes from: a checkpoint, or a seeded generator. Reading twice gives the same bytes."""

    def read(self, tensor: PlannedTensor) -> np.ndarray:
        """The data of `tensor`, of exactly its dtype and shape. Raises ExportError on bad input."""
        ...


def write_file(path: Path, fields: Sequence[Field], plan: Sequence[PlannedTensor], source: TensorSource) -> None:
    """Write header, metadata with checksums, and every tensor of `plan` to `path`.

    Raises OSError, or ExportError from the source.
    """
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    writer.add_custom_alignment(ALIGNMENT)
    for field in (*fields, room_for_checksums(len(plan))):
        if field.key not in (KEY_ARCHITECTURE, KEY_ALIGNMENT):
            writer.add_key_value(field.key, field.value, field.type, field.item_type)
    for tensor in plan:
        writer.add_tensor_info(tensor.name, tensor.shape, tensor.dtype, tensor.nbytes)
    checksums = []
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        total = sum(tensor.nbytes for tensor in plan)
        with tqdm(total=total, unit="B", unit_scale=True, desc="writing", leave=False, disable=None) as progress:
            for tensor in plan:
                data = source.read(tensor)
                writer.write_tensor_data(data)
                checksums.append(crc32(np.ascontiguousarray(data)))
                progress.update(tensor.nbytes)
    finally:
        writer.close()
    fill_in_checksums(path, checksums)
