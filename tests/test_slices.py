"""MoBiSlice: codes, nesting, decoding and the straight-through gradient."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from mobiquant.activations import quantize_activations  # noqa: E402
from mobiquant.linear import SliceEmbedding, SliceLinear  # noqa: E402
from mobiquant.slices import (  # noqa: E402
    MIN_SCALE,
    decode_straight_through,
    scale_offset,
    slice_weight,
    split_groups,
    unslice_weight,
)


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(24, 300, generator=torch.Generator().manual_seed(0))


def recursive_residuals(weight: np.ndarray, scale: np.ndarray, offset: np.ndarray) -> list[np.ndarray]:
    """The paper's definition in float64: the weights at depths 1 to 4. scale and offset: one per weight."""
    residual, total, result = weight.copy(), np.zeros_like(weight), []
    for index in range(4):
        step = scale / 4**index
        zero = offset / scale if index == 0 else 2.0
        digit = np.clip(np.floor(residual / step + zero), 0, 3)
        part = step * (digit - zero + 0.5)
        residual, total = residual - part, total + part
        result.append(total.copy())
    return result


@pytest.mark.parametrize("clip", [None, 0.5])
def test_every_depth_is_the_sum_of_recursive_residuals(weight, clip):
    shape = (24, 3, 1)
    factors = () if clip is None else (torch.full(shape, clip), torch.full(shape, clip))
    sliced = slice_weight(weight, *factors)
    scale, offset = (x.double().numpy().repeat(128, 1)[:, :300] for x in (sliced.scales, sliced.offsets))
    for depth, expected in enumerate(recursive_residuals(weight.double().numpy(), scale, offset), start=1):
        got = unslice_weight(sliced, depth).numpy()
        # A weight on the border of two cells may fall to either side in float32.
        moved = np.abs(got - expected) > 1e-5
        assert moved.mean() < 1e-3
        assert np.all(np.abs(got - expected) <= scale * 4.0 ** (1 - depth) * 1.001)


def test_error_shrinks_by_four_with_every_slice(weight):
    sliced = slice_weight(weight)
    errors = [(unslice_weight(sliced, depth) - weight).square().mean().sqrt().item() for depth in (1, 2, 3, 4)]
    for coarse, fine in pairwise(errors):
        assert 3.5 < coarse / fine < 4.5


def test_constant_and_zero_groups_keep_a_usable_scale():
    weight = torch.cat((torch.zeros(2, 128), torch.full((2, 128), 3.0)), 1)
    sliced = slice_weight(weight)
    assert sliced.scales.min().item() == MIN_SCALE
    assert (unslice_weight(sliced, 4) - weight).abs().max() < 1e-3


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_weights_that_cannot_be_stored_are_refused(value):
    with pytest.raises(ValueError, match="weights: expected"):
        slice_weight(torch.full((1, 128), value))


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_training_weights_equal_stored_weights(weight, depth):
    gamma = beta = torch.full((24, 3, 1), 1.0)
    groups = split_groups(weight)
    trained = decode_straight_through(groups, *scale_offset(groups, gamma, beta), depth).flatten(1)[:, :300]
    stored = unslice_weight(slice_weight(weight, gamma, beta), depth)
    assert torch.equal(trained, stored)


def test_gradient_of_clipped_weights_is_that_of_the_range_end():
    groups = torch.tensor([[[-10.0] + [0.1] * 126 + [10.0]]])
    scale, offset = (torch.full((1, 1, 1), value, requires_grad=True) for value in (1.0, 2.0))
    value = decode_straight_through(groups, scale, offset, 2)
    value[0, 0, -1].backward(retain_graph=True)
    # The last cell at depth 2: s/4·15.5 - o.
    assert scale.grad.item() == pytest.approx(15.5 / 4)
    assert offset.grad.item() == pytest.approx(-1.0)


def test_linear_is_the_matrix_product_on_quantised_activations(weight):
    sliced = slice_weight(weight)
    layer, x = SliceLinear(sliced), torch.randn(5, 300, generator=torch.Generator().manual_seed(1))
    dequantized = quantize_activations(x).dequantized()
    assert (dequantized - x).abs().max() <= x.abs().max() / 127 * 0.51
    for depth in (1, 2, 3, 4):
        layer.depth = depth
        torch.testing.assert_close(layer(x), dequantized @ unslice_weight(sliced, depth).T, rtol=1e-4, atol=1e-4)


def test_activations_round_half_to_even_and_small_groups_are_zero():
    x = torch.zeros(1, 256)
    x[0, :3] = torch.tensor([127.0, 0.5, 1.5])
    x[0, 128] = 1e-31
    quantized = quantize_activations(x)
    assert quantized.codes[0, 0, :3].tolist() == [127.0, 0.0, 2.0]
    assert quantized.scales[0].tolist() == [1.0, 0.0]
    assert quantized.codes[0, 1].abs().max() == 0


def test_embedding_gives_the_rows_of_the_table(weight):
    sliced = slice_weight(weight)
    ids = torch.tensor([[3, 0], [23, 3]])
    for depth in (1, 4):
        assert torch.equal(SliceEmbedding(sliced, depth)(ids), unslice_weight(sliced, depth)[ids])
