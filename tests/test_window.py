"""Sliding windows: what a token sees, rings of bounded memory, and what can be taken back of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny import TINY

from export.to_gguf import export_synthetic
from runtime import MobiQuantError, Model
from runtime.native import kernels

WINDOW, CONTEXT, BATCH = 300, 2048, 64
SHAPE = replace(TINY, context_length=CONTEXT, sliding_window=WINDOW, sliding_window_pattern=(1, 0))
TOKENS = np.random.default_rng(4).integers(0, 256, 1500)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Windowed and full blocks in turn, as in Gemma."""
    target = tmp_path_factory.mktemp("window") / "random.gguf"
    export_synthetic(SHAPE, target, "random")
    return target


@pytest.fixture(scope="module")
def logits(path: Path) -> np.ndarray:
    """Of all tokens in one batch, under the definition: nothing ever leaves this cache."""
    with Model(path, bits=4, n_batch=CONTEXT, kernel="scalar", n_threads=2) as model:
        return model.eval(TOKENS, all_logits=True)


@pytest.fixture
def model(path: Path) -> Iterator[Model]:
    with Model(path, bits=4, n_batch=BATCH) as opened:
        yield opened


def cache_bytes(slots: int) -> int:
    """Of one block: keys and values in f16."""
    return 2 * 2 * slots * SHAPE.head_count_kv * SHAPE.head_dim


def test_a_ring_holds_the_window_and_a_batch_whatever_the_context(path: Path, model: Model) -> None:
    assert model.cache_bytes == cache_bytes(CONTEXT) + cache_bytes(512)
    with Model(path, n_ctx=1024, n_batch=BATCH) as smaller:
        assert smaller.cache_bytes == cache_bytes(1024) + cache_bytes(512)
    with Model(path, n_ctx=400, n_batch=BATCH) as smaller:  # a context that the ring would exceed
        assert smaller.cache_bytes == 2 * cache_bytes(400)


@pytest.mark.parametrize("kernel", [kernel.name for kernel in kernels() if kernel.supported])
def test_every_kernel_and_split_of_the_tokens_gives_the_same_bits(path: Path, logits: np.ndarray, kernel: str) -> None:
    for n_batch, threads, first in ((BATCH, 2, 7), (33, 1, 1)):
        with Model(path, bits=4, n_batch=n_batch, kernel=kernel, n_threads=threads) as model:
            pieces = [model.eval(TOKENS[:first], all_logits=True)]
            pieces += [model.eval(TOKENS[i : i + 1], all_logits=True) for i in range(first, first + 5)]
            pieces += [model.eval(TOKENS[first + 5 : 1200], all_logits=True)]
            pieces += [model.eval(TOKENS[i : i + 1], all_logits=True) for i in range(1200, 1300)]
            pieces += [model.eval(TOKENS[1300:], all_logits=True)]
        np.testing.assert_array_equal(np.concatenate(pieces), logits)


def test_a_token_behind_the_window_is_not_seen(tmp_path: Path) -> None:
    """One block: the 300 last tokens decide the logits."""
    one = replace(SHAPE, block_count=1, sliding_window_pattern=())
    export_synthetic(one, tmp_path / "one.gguf", "one")
    other = TOKENS.copy()
    other[: 900 - WINDOW + 1] = 5
    with Model(tmp_path / "one.gguf", bits=4, n_batch=BATCH) as model:
        expected = model.eval(TOKENS[:901])
        model.reset()
        np.testing.assert_array_equal(model.eval(other[:901]), expected)
        model.reset()
        other[900 - WINDOW + 1] = 6
        assert not np.array_equal(model.eval(other[:901]), expected)


def test_a_rewind_goes_back_as_far_as_the_window_is_held(model: Model, logits: np.ndarray) -> None:
    model.eval(TOKENS)
    session = model._sequence.session
    floor = session.rewind_floor
    assert BATCH <= len(TOKENS) - floor <= 512
    with pytest.raises(MobiQuantError, match=f"expected 0, or at least {floor}: .* found {floor - 1}") as caught:
        session.rewind(floor - 1)
    assert (caught.value.status, session.position) == ("MQ_ERR_FORGOTTEN", len(TOKENS))
    session.rewind(floor)
    np.testing.assert_array_equal(model.eval(TOKENS[floor:], all_logits=True), logits[floor:])
    session.rewind(len(TOKENS) - BATCH)
    assert session.rewind_floor == floor  # what was lost stays lost
    model.reset()
    assert session.rewind_floor == 0
    np.testing.assert_array_equal(model.eval(TOKENS[:400], all_logits=True), logits[:400])


def test_a_prompt_that_begins_like_the_cache_is_computed_anew_where_the_window_is_gone(
    model: Model, logits: np.ndarray
) -> None:
    model.eval(TOKENS)
    assert model.reuse([*TOKENS[:1450], 3]) == 1450
    assert model.reuse([*TOKENS[:700], 3]) == 0
    np.testing.assert_array_equal(model.eval(TOKENS[:700], all_logits=True), logits[:700])


def test_state_and_fork_carry_the_window_and_one_token_can_be_taken_back(
    path: Path, model: Model, logits: np.ndarray
) -> None:
    model.eval(TOKENS[:1000])
    state = model.save_state()
    full_block = 1000 * (cache_bytes(1) + SHAPE.block_count * 7 + 4)
    assert len(state) - full_block - (WINDOW * cache_bytes(1)) < 6000  # headers
    with Model(path, bits=4, n_batch=5) as other, model.fork() as fork:
        other.load_state(state)
        assert other.save_state() == state
        for each in (other, fork):
            assert each.reuse([*TOKENS[:999], TOKENS[999]]) == 999
            np.testing.assert_array_equal(each.eval(TOKENS[999:], all_logits=True), logits[999:])
    with Model(path, bits=4) as other:
        other.load_state(state)
        assert other._sequence.session.rewind_floor == 999
        assert other.reuse([*TOKENS[:998], 7]) == 0


def test_a_state_of_another_window_is_refused(tmp_path: Path, model: Model) -> None:
    export_synthetic(replace(SHAPE, sliding_window=WINDOW + 1), tmp_path / "other.gguf", "random")
    model.eval(TOKENS[:20])
    with Model(tmp_path / "other.gguf") as other, pytest.raises(MobiQuantError, match="found another model's"):
        other.load_state(model.save_state())


@pytest.mark.parametrize(("pattern", "message"), [((1,), "an array of 2 u32, found 1"), ((2, 0), "0 to 1, found 2")])
def test_a_pattern_that_fits_no_block_is_refused(tmp_path: Path, pattern: tuple[int, ...], message: str) -> None:
    export_synthetic(replace(SHAPE, sliding_window_pattern=pattern), tmp_path / "bad.gguf", "bad")
    with pytest.raises(MobiQuantError, match=rf"key 'mobiquant.attention.sliding_window_pattern': expected {message}"):
        Model(tmp_path / "bad.gguf")
