"""A saved session continues with the same bits; one that was altered, cut or forged is refused and changes nothing."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny import TINY

from export.to_gguf import export_synthetic
from runtime import MobiQuantError, Model

TEXT = "a conversation that goes on tomorrow"
MORE = [7, 8, 9]
HEADER = 48  # bytes, of runtime/src/state.c


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Heads of 24: the cache pads its rows, the state does not.
    target = tmp_path_factory.mktemp("state") / "random.gguf"
    export_synthetic(replace(TINY, head_count=16, head_dim=24), target, "random")
    return target


@pytest.fixture
def model(path: Path) -> Iterator[Model]:
    with Model(path, seed=1) as opened:
        yield opened


def filled(model: Model) -> bytes:
    """Two precisions in one cache, then its state."""
    model.bits = 3.5
    model.eval(model.tokenize(TEXT))
    model.bits = 2
    model.eval([1, 2, 3])
    return model.save_state()


def test_session_goes_on_where_it_was_saved(path: Path, model: Model) -> None:
    state = filled(model)
    expected, depths = model.eval(MORE, all_logits=True), model.depths(0, model.position)
    with Model(path, bits=2, n_threads=2, n_batch=5, kernel="scalar") as other:
        other.load_state(memoryview(state))
        assert other.save_state() == state
        np.testing.assert_array_equal(other.eval(MORE, all_logits=True), expected)
        np.testing.assert_array_equal(other.depths(0, other.position), depths)


def test_running_correction_goes_on_too(path: Path, model: Model) -> None:
    model.bits = 3.5
    tokens = np.random.default_rng(2).integers(0, 256, 96)
    model.eval(tokens[:70])  # past the first stretch, whose average corrects the next
    state = model.save_state()
    expected = model.eval(tokens[70:], all_logits=True)
    with Model(path, avg_bits=3.5) as other:
        other.load_state(state)
        np.testing.assert_array_equal(other.eval(tokens[70:], all_logits=True), expected)
        np.testing.assert_array_equal(other.depths(70, 26), model.depths(70, 26))


def test_loaded_tokens_are_reused_at_the_precision_they_were_computed_at(path: Path, model: Model) -> None:
    model.bits = 4.5
    tokens = model.tokenize(TEXT)
    model.eval(tokens)
    with Model(path, avg_bits=4.5) as other:
        other.load_state(model.save_state())
        next(other.generate([*tokens, 5]))
        assert other.stats.tokens == 1
        other.bits = 2
        next(other.generate([*tokens, 5]))
        assert other.stats.tokens == 1 + len(tokens) + 1


def test_fork_is_independent_and_outlives_its_parent(path: Path) -> None:
    with Model(path, bits=4) as model:
        filled(model)
        other = model.fork()
        expected = model.eval(MORE)
        assert other.position == model.position - len(MORE)
    np.testing.assert_array_equal(other.eval(MORE), expected)
    assert (other.bits, other.fork(empty=True).position) == (2, 0)
    other.close()
    with pytest.raises(ValueError, match="found it closed"):
        other.eval(MORE)


def test_state_of_another_file_is_refused(model: Model, tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    export_synthetic(replace(TINY, head_count=16, head_dim=24, vocab_size=288), other, "random")
    state = filled(model)
    with Model(other) as stranger:
        with pytest.raises(MobiQuantError, match=r"expected one saved with .*other\.gguf, found another model's"):
            stranger.load_state(state)
        assert stranger.position == 0


def test_state_larger_than_the_context_is_refused(path: Path, model: Model) -> None:
    state = filled(model)
    with Model(path, n_ctx=8) as small, pytest.raises(MobiQuantError, match="expected at most 8 positions") as caught:
        small.load_state(state)
    assert caught.value.status == "MQ_ERR_CONTEXT_FULL"


def test_every_cut_and_every_flipped_byte_is_refused(path: Path, model: Model) -> None:
    model.eval([1, 2, 3])
    state = model.save_state()
    with Model(path) as other:
        for size in (*range(0, 200), len(state) - 1):
            with pytest.raises((ValueError, MobiQuantError)):
                other.load_state(state[:size])
        with pytest.raises(MobiQuantError):
            other.load_state(state + b"\0")
        random = np.random.default_rng(0)
        cache = state.index(b"MQSTATE")
        for at in random.integers(cache, len(state), 300).tolist() + list(range(cache, cache + HEADER)):
            altered = bytearray(state)
            altered[at] ^= 1 << int(random.integers(8))
            with pytest.raises(MobiQuantError, match="state: "):
                other.load_state(altered)
        assert other.position == 0
        other.load_state(state)
        assert other.position == 3


def checksum(data: bytes) -> int:
    """The checksum of runtime/src/state.c, so that a test can forge one."""
    value, mask = 0xCBF29CE484222325, (1 << 64) - 1
    whole = len(data) // 8 * 8
    for (word,) in struct.iter_unpack("<Q", data[:whole]):
        value = (value ^ word) * 0x100000001B3 & mask
        value ^= value >> 32
    for byte in data[whole:]:
        value = (value ^ byte) * 0x100000001B3 & mask
    return value


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (0, struct.pack("<f", 1.5), "expected average bits of 0 or from 2 to 8, found 1.5"),
        (0, struct.pack("<f", float("nan")), "expected average bits of 0 or from 2 to 8, found nan"),
        (12, b"\x05", "expected depths from 1 to 4, found 5"),  # after the bits of three positions
        (12, b"\x00", "expected depths from 1 to 4, found 0"),
        (-2, b"\x00\x7e", "expected finite keys and values"),
        (-2, b"\x00\xfc", "expected finite keys and values"),
    ],
)
def test_forged_values_are_refused_under_a_right_checksum(
    path: Path, model: Model, at: int, value: bytes, message: str
) -> None:
    model.eval([1, 2, 3])
    state = bytearray(model.save_state())
    cache = state.index(b"MQSTATE")
    body = state[cache + HEADER :]
    position = at % len(body)
    body[position : position + len(value)] = value
    state[cache + 32 : cache + 40] = struct.pack("<Q", checksum(body))
    state[cache + HEADER :] = body
    with Model(path) as other, pytest.raises(MobiQuantError, match=message):
        other.load_state(state)


@pytest.mark.parametrize(
    "changes",
    [
        {"tokens": [1, 2]},
        {"tokens": "abc"},
        {"tokens": [1, 2, 1e400]},
        {"budgets": []},
        {"budgets": [{"bits": 99, "routed": True}]},
        {"budgets": [{"colour": 1}]},
        {"used": [[0, 10**15], [0, 3 - 10**15]]},
        {"used": [[7, 3]]},
        {"used": None},
    ],
)
def test_forged_header_is_refused(path: Path, model: Model, changes: dict) -> None:
    model.eval([1, 2, 3])
    state = model.save_state()
    (size,) = struct.unpack_from("<I", state, 8)
    header = json.dumps(json.loads(state[12 : 12 + size]) | changes).encode()
    with Model(path) as other:
        with pytest.raises(ValueError, match="saved session: "):
            other.load_state(state[:8] + struct.pack("<I", len(header)) + header + state[12 + size :])
        assert other.position == 0


def test_header_and_cache_of_different_lengths_leave_an_empty_session(path: Path, model: Model) -> None:
    model.eval([1, 2, 3])
    state = model.save_state()
    model.eval([4])
    longer = model.save_state()
    (size,), (longer_size,) = struct.unpack_from("<I", state, 8), struct.unpack_from("<I", longer, 8)
    with Model(path) as other:
        with pytest.raises(ValueError, match="4 in the cache and 3 in its header"):
            other.load_state(state[: 12 + size] + longer[12 + longer_size :])
        assert other.position == 0
