"""Budgets: the static order from gains to the depths that are read, and averages that hold while a text runs."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny import TINY

from export.keys import KEY_STATIC_ORDER, LINEARS
from export.to_gguf import export_synthetic
from mobiquant.correction import RunningCorrection
from mobiquant.static import static_depths, static_order
from runtime import MobiQuantError, Model

N = TINY.block_count * len(LINEARS)
ORDER = static_order(np.random.default_rng(0).exponential(1.0, (N, 3)) / [1, 8, 64])
WEIGHTS = np.tile([np.prod(TINY.linear(name)) for name in LINEARS], TINY.block_count)
TOKENS = np.random.default_rng(1).integers(0, 256, 20)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("budgets") / "random.gguf"
    export_synthetic(replace(TINY, static_order=tuple(ORDER.tolist())), target, "random")
    return target


# The static order


def test_order_raises_the_best_gain_per_bit_first_and_every_linear_three_times() -> None:
    gains = np.array([[8.0, 4.0, 1.0], [6.0, 5.0, 0.5]])
    assert static_order(gains).tolist() == [0, 1, 1, 0, 0, 1]


def test_a_poor_slice_before_a_rich_one_counts_with_it() -> None:
    # Alone, slice 2 of linear 0 is worth less than any of linear 1; with slice 3 it is worth 5 a slice.
    gains = np.array([[1.0, 9.0, 0.1], [4.0, 3.0, 2.0]])
    assert static_order(gains).tolist() == [0, 0, 1, 1, 1, 0]


def test_budgets_are_nested_and_spend_no_more_than_asked() -> None:
    before = np.ones(N, np.uint8)
    for bits in np.linspace(2, 8, 61):
        depths = static_depths(ORDER, WEIGHTS, bits)
        average = 2 * np.average(depths, weights=WEIGHTS)
        assert average <= bits + 1e-6
        assert average > bits - 2 * WEIGHTS.max() / WEIGHTS.sum() - 1e-6
        assert (depths >= before).all()
        before = depths
    assert (before == 4).all()


def test_runtime_reads_the_depths_of_the_order_and_no_router(path: Path) -> None:
    with Model(path) as model:
        for bits in (2, 2.3, 3, 4.45, 6, 7.99, 8):
            model.reset()
            before = model.stats
            model.bits = f"static:{bits}"
            model.eval(TOKENS)
            expected = static_depths(ORDER, WEIGHTS, bits)
            assert (model.depths(0, len(TOKENS)).reshape(len(TOKENS), -1) == expected).all()
            assert (model.stats - before).average_bits == 2 * np.average(expected, weights=WEIGHTS)
        static = (model.stats - before).bytes_read
        model.reset()
        before = model.stats
        model.bits = 8
        model.eval(TOKENS)
        assert static == (model.stats - before).bytes_read
    with Model(path, bits="static:3") as model:
        assert model.bits == "static:3"


def test_a_cut_file_spends_a_static_budget_on_the_slices_it_has(path: Path, tmp_path: Path) -> None:
    with Model(path) as whole:
        tier = whole.info.slice_bytes[3]
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(path.read_bytes()[: -2 * tier])
    with Model(cut, bits="static:4", allow_partial=True) as model:
        model.eval(TOKENS)
        assert (model.depths(0, len(TOKENS)) == 2).all()
        model.bits = "static:3.5"
        model.reset()
        model.eval(TOKENS)
        assert set(np.unique(model.depths(0, len(TOKENS)))) == {1, 2}
        with pytest.raises(ValueError, match=r"bits: expected at most 4, what .* holds, found 4\.5"):
            model.bits = "static:4.5"


def test_a_file_without_an_order_says_so(tmp_path: Path) -> None:
    export_synthetic(TINY, tmp_path / "old.gguf", "old")
    with Model(tmp_path / "old.gguf") as model:
        with pytest.raises(MobiQuantError, match=r"static bits: .*old\.gguf has no key 'mobiquant\.static\.order'"):
            model.bits = "static:3"
        assert model.bits == 8


@pytest.mark.parametrize("bits", ["static:", "static:1.9", "static:nan", "static:x", "dynamic:3", "3"])
def test_bad_bits_in_words_are_refused(path: Path, bits: str) -> None:
    with Model(path) as model, pytest.raises(ValueError, match=f"bits: expected .*static:X.*{bits}"):
        model.bits = bits


def spoiled(data: bytes, change: Callable[[bytearray, int], None]) -> bytes:
    """`change` gets the file and the place of the array's item type: u32 type, u64 count, then the values."""
    copy = bytearray(data)
    key = KEY_STATIC_ORDER.encode()
    change(copy, copy.index(key) + len(key) + 4)
    return bytes(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda data, at: struct.pack_into("<I", data, at, 5),
            f"expected an array of {3 * N} u32, found {3 * N} of type 5",
        ),
        (lambda data, at: struct.pack_into("<I", data, at + 12, N), f"expected linears below {N}, found {N}"),
        (
            lambda data, at: struct.pack_into("<4I", data, at + 12, *[5] * 4),
            "expected every linear 3 times, found linear 5 more often",
        ),
    ],
)
def test_a_malformed_order_is_refused(
    path: Path, tmp_path: Path, change: Callable[[bytearray, int], None], message: str
) -> None:
    (tmp_path / "bad.gguf").write_bytes(spoiled(path.read_bytes(), change))
    with pytest.raises(MobiQuantError, match=re.escape(message)) as caught:
        Model(tmp_path / "bad.gguf")
    assert caught.value.status == "MQ_ERR_FORMAT"
    assert KEY_STATIC_ORDER in str(caught.value)


def test_an_order_of_another_length_is_refused(tmp_path: Path) -> None:
    export_synthetic(replace(TINY, static_order=(0,) * 40), tmp_path / "short.gguf", "short")
    with pytest.raises(MobiQuantError, match=f"expected an array of {3 * N} u32, found 40 of type 4"):
        Model(tmp_path / "short.gguf")


# The running correction


def spent_on_average(asked: float, tokens: int, bias: float, noise: float, seed: int) -> float:
    """Average bits of a text that reads `bias` more than it is given, and a random amount that differs by token."""
    random, correction = np.random.default_rng(seed), RunningCorrection(asked)
    read = np.zeros(0)
    while len(read) < tokens:
        assert correction.end is not None and 2 <= correction.bits <= 8
        given = np.clip(correction.bits + bias + noise * random.standard_normal(correction.end - len(read)), 2, 8)
        read = np.append(read, given)
        correction.finish_stretch(read.mean())
    return float(read[:tokens].mean())


@pytest.mark.parametrize("bias", [-0.4, -0.1, 0.0, 0.3])
@pytest.mark.parametrize("asked", [2.5, 3.0, 4.7, 7.0])
def test_correction_brings_a_biased_text_to_the_average_asked_for(asked: float, bias: float) -> None:
    for tokens, tolerance in ((256, 0.06), (1024, 0.02), (4096, 0.01)):
        errors = [spent_on_average(asked, tokens, bias, 0.3, seed) - asked for seed in range(8)]
        assert abs(np.mean(errors)) < tolerance


def test_least_and_most_are_never_corrected() -> None:
    assert RunningCorrection(2.0).end is None and RunningCorrection(8.0).end is None


LONG_TEXT = np.random.default_rng(2).integers(0, 256, 1000)


@pytest.fixture(scope="module")
def long_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("long") / "random.gguf"
    export_synthetic(replace(TINY, context_length=1024), target, "random")
    return target


def logits_of(model: Model, tokens: np.ndarray, pieces: int = 1000) -> bytes:
    parts = [model.eval(tokens[at : at + pieces], all_logits=True) for at in range(0, len(tokens), pieces)]
    return np.concatenate(parts).tobytes()


@pytest.mark.parametrize("bits", [2.3, 3.0, 4.5, 7.0])
def test_runtime_reads_the_average_asked_for(long_path: Path, bits: float) -> None:
    with Model(long_path, avg_bits=bits) as model:
        model.eval(LONG_TEXT)
        assert model.stats.average_bits == pytest.approx(bits, abs=0.05)


def test_a_cut_file_reads_the_average_asked_for_with_the_slices_it_has(long_path: Path, tmp_path: Path) -> None:
    with Model(long_path) as whole:
        tier = whole.info.slice_bytes[3]
    (tmp_path / "cut.gguf").write_bytes(long_path.read_bytes()[: -2 * tier])
    with Model(tmp_path / "cut.gguf", avg_bits=3.0, allow_partial=True) as model:
        model.eval(LONG_TEXT)
        assert model.stats.average_bits == pytest.approx(3.0, abs=0.03)
        model.bits = 4.0
        model.reset()
        model.eval(TOKENS)
        assert (model.depths(0, len(TOKENS)) == 2).all()


def test_corrected_text_gives_the_same_bits_in_pieces_of_any_length_and_after_a_rewind(long_path: Path) -> None:
    tokens = LONG_TEXT[:400]
    with Model(long_path, avg_bits=3.3) as model, Model(long_path, avg_bits=3.3, n_batch=37, n_threads=2) as other:
        expected = logits_of(model, tokens)
        assert logits_of(other, tokens, 150) == expected
        other.reset()
        assert logits_of(other, tokens[:130], 1) + logits_of(other, tokens[130:]) == expected
        for position in (300, 192, 130, 5):
            other._sequence.rewind(position)
            row = 4 * other.info.vocab_size
            assert logits_of(other, tokens[position:]) == expected[position * row :]


def test_another_budget_between_leaves_no_trace_in_what_came_before_it(long_path: Path) -> None:
    tokens = LONG_TEXT[:400]
    with Model(long_path, avg_bits=3.3) as model:
        expected = logits_of(model, tokens)
        model._sequence.rewind(200)
        for bits in (6.0, 4, 3.3):
            model.bits = bits
            model.eval(tokens[:30])
        model._sequence.rewind(200)
        row = 4 * model.info.vocab_size
        assert logits_of(model, tokens[200:]) == expected[200 * row :]


def test_a_new_budget_starts_a_correction_of_its_own(long_path: Path) -> None:
    with Model(long_path, bits=8) as model:
        model.eval(LONG_TEXT[:500])
        before = model.stats
        model.bits = 3.0
        model.eval(LONG_TEXT[500:])
        assert (model.stats - before).average_bits == pytest.approx(3.0, abs=0.05)


# Embedding and output head


def test_depths_outside_the_blocks_are_the_least_whose_cost_is_below_one_per_cent() -> None:
    outer = pytest.importorskip("mobiquant.outer")
    # By embedding depth, then by head depth.
    growth = np.array(
        [[0.3, 0.1, 0.1, 0.1], [0.2, 0.03, 0.02, 0.02], [0.2, 0.02, 0.008, 0.006], [0.2, 0.008, 0.0, 0.0]]
    )
    assert outer.OuterCosts(growth, growth).choose() == (4, 2)
    divergence = np.where(growth == 0.008, 0.011, growth)
    assert outer.OuterCosts(growth, divergence).choose() == (4, 3)
    assert outer.OuterCosts(growth, growth + 1).choose() == (4, 4)
