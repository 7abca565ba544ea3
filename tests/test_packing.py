"""The plane layout: packing loses nothing, and one byte lies where docs/format.md says."""

from __future__ import annotations

import numpy as np
import pytest

from mobiquant.packing import (
    SLICE_COUNT,
    TILE_BYTES,
    groups_of,
    pack_plane,
    pack_scale_offset,
    tiles_of,
    unpack_plane,
    unpack_scale_offset,
)

SHAPES = [(1, 1), (16, 128), (17, 129), (40, 300)]


@pytest.mark.parametrize("shape", SHAPES)
def test_unpacked_planes_give_back_the_codes(shape):
    codes = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    back = np.zeros(shape, np.uint8)
    for index in range(1, SLICE_COUNT + 1):
        plane = pack_plane(codes, index)
        assert plane.shape == (tiles_of(shape[0]), groups_of(shape[1]), TILE_BYTES)
        back = back << 2 | unpack_plane(plane, *shape)
    np.testing.assert_array_equal(back, codes)


def test_each_code_lies_in_the_byte_and_bits_of_the_format():
    rows, columns = 32, 256
    random = np.random.default_rng(1)
    for row, column in random.integers(0, (rows, columns), (50, 2)):
        codes = np.zeros((rows, columns), np.uint8)
        codes[row, column] = 0b10 << 4  # second slice
        plane = pack_plane(codes, 2).view(np.uint8)
        inside = column % 128
        v, j, c = inside // 16, inside % 16 // 4, inside % 4
        expected = np.zeros_like(plane)
        expected[row // 16, column // 128, 64 * v + 4 * (row % 16) + c] = 0b10 << 2 * j
        np.testing.assert_array_equal(plane, expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_scales_and_offsets_come_back_and_padding_is_zero(shape):
    rows, groups = shape[0], groups_of(shape[1])
    random = np.random.default_rng(2)
    scales, offsets = random.normal(size=(2, rows, groups)).astype(np.float16)
    packed = pack_scale_offset(scales, offsets)
    for back, original in zip(unpack_scale_offset(packed, rows), (scales, offsets), strict=True):
        np.testing.assert_array_equal(back, original)
    assert np.count_nonzero(packed) == np.count_nonzero(scales) + np.count_nonzero(offsets)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"slice_index: expected 1\.\.4, found 5"):
        pack_plane(np.zeros((16, 128), np.uint8), 5)
    with pytest.raises(ValueError, match=r"plane: expected shape \(1, 1, 512\)"):
        unpack_plane(np.zeros((2, 1, 512), np.int8), 16, 128)
    with pytest.raises(ValueError, match=r"offsets: expected shape"):
        pack_scale_offset(np.zeros((16, 1), np.float16), np.zeros((16, 2), np.float16))
