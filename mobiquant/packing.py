"""The plane layout `tile16x128`: 2-bit codes to bytes and back (docs/format.md, numpy only).

This file is the one definition of how a slice lies in memory. The C kernels read the same bytes, with no repacking.
Four neighbouring bytes hold four columns of one row, the operand of vpdpbusd, maddubs and sdot; the four 2-bit fields
of a byte are 4 columns apart, so a masked vector is already in the order of the activations.
"""

from __future__ import annotations

import numpy as np

GROUP_SIZE = 128
TILE_ROWS = 16
SLICE_BITS = 2
SLICE_COUNT = 4
LAYOUT = "tile16x128"

_STEP = 4  # columns in one 4-byte step, and steps in one 64-byte vector
_VECTORS = GROUP_SIZE // (_STEP * _STEP)
TILE_BYTES = TILE_ROWS * GROUP_SIZE * SLICE_BITS // 8


def tiles_of(rows: int) -> int:
    """Number of 16-row tiles that hold `rows` rows."""
    return -(-rows // TILE_ROWS)


def groups_of(columns: int) -> int:
    """Number of 128-column groups that hold `columns` columns."""
    return -(-columns // GROUP_SIZE)


def pack_plane(codes: np.ndarray, slice_index: int) -> np.ndarray:
    """Pack slice `slice_index` (1..4) of 8-bit codes.

    codes: uint8 [rows, columns]. Returns int8 [tiles, groups, 512], padding 0.
    """
    if not 1 <= slice_index <= SLICE_COUNT:
        raise ValueError(f"slice_index: expected 1..{SLICE_COUNT}, found {slice_index}")
    rows, columns = codes.shape
    tiles, groups = tiles_of(rows), groups_of(columns)
    shift = 8 - SLICE_BITS * slice_index
    plane = np.zeros((tiles * TILE_ROWS, groups * GROUP_SIZE), np.uint8)
    plane[:rows, :columns] = (codes >> shift) & 3
    # axes: tile, row r, group, vector v, field j, column c
    split = plane.reshape(tiles, TILE_ROWS, groups, _VECTORS, _STEP, _STEP)
    packed = split[..., 0, :].copy()
    for field in range(1, _STEP):
        packed |= split[..., field, :] << (SLICE_BITS * field)
    # tile, r, group, v, c -> tile, group, v, r, c
    packed = packed.transpose(0, 2, 3, 1, 4)
    return np.ascontiguousarray(packed).reshape(tiles, groups, TILE_BYTES).view(np.int8)


def unpack_plane(plane: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Inverse of `pack_plane` for one slice: int8 [tiles, groups, 512] -> uint8 [rows, columns] of 0..3."""
    tiles, groups = tiles_of(rows), groups_of(columns)
    if plane.shape != (tiles, groups, TILE_BYTES):
        raise ValueError(f"plane: expected shape {(tiles, groups, TILE_BYTES)}, found {plane.shape}")
    packed = plane.view(np.uint8).reshape(tiles, groups, _VECTORS, TILE_ROWS, _STEP)
    fields = np.stack([(packed >> (SLICE_BITS * field)) & 3 for field in range(_STEP)], axis=3)
    # tile, group, v, j, r, c -> tile, r, group, v, j, c
    codes = fields.transpose(0, 4, 1, 2, 3, 5)
    return codes.reshape(tiles * TILE_ROWS, groups * GROUP_SIZE)[:rows, :columns].copy()


def pack_scale_offset(scales: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Interleave scales and offsets, float16 [rows, groups] each, to float16 [tiles, groups, 2, 16]; padding is 0."""
    if scales.shape != offsets.shape:
        raise ValueError(f"offsets: expected shape {scales.shape}, found {offsets.shape}")
    rows, groups = scales.shape
    tiles = tiles_of(rows)
    packed = np.zeros((tiles, groups, 2, TILE_ROWS), np.float16)
    for index, values in enumerate((scales, offsets)):
        padded = np.zeros((tiles * TILE_ROWS, groups), np.float16)
        padded[:rows] = values
        packed[:, :, index, :] = padded.reshape(tiles, TILE_ROWS, groups).transpose(0, 2, 1)
    return packed


def unpack_scale_offset(packed: np.ndarray, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Inverse of `pack_scale_offset`: two float16 [rows, groups] arrays."""
    tiles, groups = packed.shape[:2]
    flat = packed.transpose(2, 0, 3, 1).reshape(2, tiles * TILE_ROWS, groups)
    return flat[0, :rows].copy(), flat[1, :rows].copy()
