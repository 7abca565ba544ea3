"""The tensors of a file in progressive order: name, type, shape, and which part of which module each one holds.

Pure arithmetic on a ModelShape: no tensor data is touched here (docs/format.md, "Order").
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np

from export.errors import ExportError
from export.keys import (
    LINEARS,
    ROUTER_POINTS,
    SUFFIX_SCALE_OFFSET,
    TENSOR_EMBEDDING,
    TENSOR_OUTPUT,
    TENSOR_OUTPUT_NORM,
    TENSOR_ROPE,
    TENSOR_ROPE_LOCAL,
    block_tensor,
    router_tensor,
    slice_tensor,
)
from export.limits import MAX_TENSOR_NAME
from export.shape import ModelShape
from mobiquant.packing import GROUP_SIZE, SLICE_COUNT, TILE_BYTES, TILE_ROWS, groups_of, tiles_of

INT8, FLOAT16, FLOAT32 = np.dtype(np.int8), np.dtype(np.float16), np.dtype(np.float32)


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the file. `module` is `attn_q`, `token_embd`, `router_attn_in`, `attn_norm.weight`, ...; `part` is
    `slice1`..`slice4`, `scale_offset`, a router part, or "" for a plain vector. `block` is None outside the blocks."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    module: str
    part: str = ""
    block: int | None = None

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    @property
    def slice_index(self) -> int | None:
        """1..4 for a plane, else None."""
        return int(self.part.removeprefix("slice")) if self.part.startswith("slice") else None


def plan_tensors(shape: ModelShape) -> list[PlannedTensor]:
    """All tensors of the file in file order. Raises ExportError for a name that GGUF readers cannot hold."""
    linears = [(name, block) for block in range(shape.block_count) for name in LINEARS]
    if shape.tied:  # one matrix, read at the deeper of its two default depths
        outer_depths = {TENSOR_EMBEDDING: max(shape.embedding_depth, shape.output_depth)}
    else:
        outer_depths = {TENSOR_EMBEDDING: shape.embedding_depth, TENSOR_OUTPUT: shape.output_depth}

    plan = _vectors(shape)
    for name, depth in outer_depths.items():
        plan.append(_scale_offset(shape, name))
        plan += [_plane(shape, name, index) for index in range(1, depth + 1)]
    for block in range(shape.block_count):
        for point, names in ROUTER_POINTS.items():
            plan += _router(shape, block, point, names)
    for name, block in linears:
        plan += [_scale_offset(shape, name, block), _plane(shape, name, 1, block)]
    for index in range(2, SLICE_COUNT + 1):
        plan += [_plane(shape, name, index) for name, depth in outer_depths.items() if index > depth]
        plan += [_plane(shape, name, index, block) for name, block in linears]

    for tensor in plan:
        size = len(tensor.name.encode())
        if size > MAX_TENSOR_NAME:
            raise ExportError(f"tensor {tensor.name}: expected a name of at most {MAX_TENSOR_NAME} bytes, found {size}")
    return plan


def _vectors(shape: ModelShape) -> list[PlannedTensor]:
    of_blocks = [
        PlannedTensor(block_tensor(block, name), FLOAT32, (length,), name, block=block)
        for block in range(shape.block_count)
        for name, length in shape.block_vectors().items()
    ]
    tables = (TENSOR_ROPE, TENSOR_ROPE_LOCAL) if 2 in shape.rope_pattern else (TENSOR_ROPE,)
    frequencies = ((shape.rope_dim or shape.head_dim) // 2,)
    return [
        *of_blocks,
        PlannedTensor(TENSOR_OUTPUT_NORM, FLOAT32, (shape.embedding_length,), TENSOR_OUTPUT_NORM),
        *(PlannedTensor(name, FLOAT32, frequencies, name) for name in tables),
    ]


def _owner(name: str, block: int | None) -> str:
    return name if block is None else block_tensor(block, name)


def _plane(shape: ModelShape, name: str, index: int, block: int | None = None) -> PlannedTensor:
    rows, columns = shape.linear(name)
    dimensions = (tiles_of(rows), groups_of(columns), TILE_BYTES)
    return PlannedTensor(slice_tensor(_owner(name, block), index), INT8, dimensions, name, f"slice{index}", block)


def _scale_offset(shape: ModelShape, name: str, block: int | None = None) -> PlannedTensor:
    rows, columns = shape.linear(name)
    dimensions = (tiles_of(rows), groups_of(columns), 2, TILE_ROWS)
    full_name = f"{_owner(name, block)}.{SUFFIX_SCALE_OFFSET}"
    return PlannedTensor(full_name, FLOAT16, dimensions, name, SUFFIX_SCALE_OFFSET, block)


def _router(shape: ModelShape, block: int, point: str, names: tuple[str, ...]) -> list[PlannedTensor]:
    hidden, linears, gates = shape.router_hidden, len(names), SLICE_COUNT - 1
    parts = {
        "hidden": (INT8, (hidden, groups_of(shape.router_columns(point)) * GROUP_SIZE)),
        "hidden_scale": (FLOAT32, (hidden,)),
        "hidden_bias": (FLOAT32, (hidden,)),
        "head": (FLOAT32, (linears, gates, hidden + 1)),
        "head_bias": (FLOAT32, (linears, gates)),
        "threshold": (FLOAT32, (linears, gates, len(shape.budgets))),
    }
    return [
        PlannedTensor(router_tensor(block, point, part), dtype, dimensions, f"router_{point}", part, block)
        for part, (dtype, dimensions) in parts.items()
    ]
