"""The int8 cache: the bits of its definition in the memory that it says, and never mistaken for f16."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny import TINY

from export.to_gguf import export_synthetic
from runtime import MobiQuantError, Model
from runtime.native import kernels

# Heads of 40: a group of 32 and one of 8, and values that are padded to 48.
SHAPE = replace(TINY, context_length=700, head_count=16, head_dim=40, sliding_window=100, sliding_window_pattern=(1, 0))
TOKENS = np.random.default_rng(4).integers(0, 256, 420)
TYPES = [("q8_0", "q8_0"), ("q8_0", "f16"), ("f16", "q8_0")]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("cache") / "random.gguf"
    export_synthetic(SHAPE, target, "random")
    return target


@pytest.mark.parametrize("types", TYPES)
def test_every_kernel_and_split_gives_the_same_bits(path: Path, types: tuple[str, str]) -> None:
    with Model(path, bits=4, kernel="scalar", cache_type=types) as model:
        expected = model.eval(TOKENS, all_logits=True)
    with Model(path, bits=4) as model:
        exact = model.eval(TOKENS, all_logits=True)
    assert 0 < np.abs(expected - exact).max() < 0.1 * np.abs(exact).max()
    for kernel in (kernel.name for kernel in kernels() if kernel.supported):
        with Model(path, bits=4, n_batch=50, n_threads=2, kernel=kernel, cache_type=types) as model:
            pieces = [model.eval(TOKENS[:9], all_logits=True), model.eval(TOKENS[9:400], all_logits=True)]
            pieces += [model.eval(TOKENS[i : i + 1], all_logits=True) for i in range(400, 420)]
            np.testing.assert_array_equal(np.concatenate(pieces), expected)


def test_the_cache_takes_the_bytes_of_its_types(path: Path) -> None:
    slots = (704 + 256) * SHAPE.head_count_kv  # a full block and a ring
    half, int8 = {"keys": 2 * 40, "values": 2 * 48}, {"keys": 40 + 2 * 2, "values": 48 + 2 * 2}
    for types in (("f16", "f16"), *TYPES):
        with Model(path, cache_type=types, n_batch=64) as model:
            sizes = [int8 if kind == "q8_0" else half for kind in types]
            assert model.cache_bytes == slots * (sizes[0]["keys"] + sizes[1]["values"])


@pytest.mark.parametrize("types", TYPES)
def test_state_and_fork_carry_the_rounded_numbers(path: Path, types: tuple[str, str]) -> None:
    with Model(path, bits=4, cache_type=types) as model, Model(path, bits=4, cache_type=types, n_batch=7) as other:
        model.eval(TOKENS[:300])
        state = model.save_state()
        other.load_state(state)
        assert other.save_state() == state
        with model.fork() as fork:
            expected = model.eval(TOKENS[300:], all_logits=True)
            for each in (other, fork):
                np.testing.assert_array_equal(each.eval(TOKENS[300:], all_logits=True), expected)


def test_a_state_of_another_cache_type_is_refused(path: Path) -> None:
    with Model(path, cache_type=("q8_0", "f16")) as model, Model(path) as other:
        model.eval(TOKENS[:20])
        message = "expected keys of cache type f16 and values of f16, found q8_0 and f16"
        with pytest.raises(MobiQuantError, match=message) as caught:
            other.load_state(model.save_state())
        assert (caught.value.status, other.position) == ("MQ_ERR_ARGUMENT", 0)


def test_an_unknown_type_is_refused_by_name(path: Path) -> None:
    with pytest.raises(ValueError, match="cache_type: expected one of f16, q8_0, found 'q4_0'"):
        Model(path, cache_type="q4_0")
