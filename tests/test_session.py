"""What the C library promises of a session: the same bits whatever the threads, batches and kernels; forks; errors."""

from __future__ import annotations

import os
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny import TINY

from export.keys import LINEARS
from export.to_gguf import export_synthetic
from runtime.native import MobiQuantError, NativeModel, NativeSession, kernels

SHAPE = replace(TINY, embedding_length=256, block_count=3, feed_forward_length=640, router_hidden=5)
TOKENS = np.random.default_rng(0).integers(0, 256, 90).astype(np.int32)
BUDGETS = [2, 4, 6, 8, 2.7, 3.5, 5.2]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("session") / "random.gguf"
    export_synthetic(SHAPE, target, "random")
    return target


@pytest.fixture(scope="module")
def model(path: Path) -> NativeModel:
    return NativeModel(path, allow_partial=False, mmap=True)


def open_session(model: NativeModel, threads: int = 1, batch: int = 512, kernel: str | None = None) -> NativeSession:
    return NativeSession(model, n_ctx=0, n_threads=threads, n_batch=batch, kernel=kernel)


def set_budget(session: NativeSession, bits: float) -> None:
    if isinstance(bits, int):
        session.set_depth(bits // 2)
    else:
        session.set_average_bits(bits)


def evaluate(session: NativeSession, tokens: np.ndarray, n_logits: int) -> np.ndarray:
    logits = np.empty((n_logits, SHAPE.vocab_size), np.float32)
    session.eval(tokens, logits)
    return logits


def logits_at(session: NativeSession, bits: float, pieces: list[int] | None = None) -> np.ndarray:
    """All logits of TOKENS from an empty cache, evaluated in pieces of the given lengths."""
    set_budget(session, bits)
    session.rewind(0)
    ends = np.cumsum(pieces or [len(TOKENS)])
    return np.concatenate([evaluate(session, part, len(part)) for part in np.split(TOKENS, ends[:-1])])


@pytest.mark.parametrize("bits", BUDGETS)
def test_logits_are_the_same_bits_for_1_2_3_and_8_threads(model: NativeModel, bits: float) -> None:
    expected = logits_at(open_session(model, 1), bits)
    assert np.isfinite(expected).all()
    for threads in (2, 3, 8):
        assert logits_at(open_session(model, threads), bits).tobytes() == expected.tobytes()


@pytest.mark.parametrize("bits", BUDGETS)
def test_logits_are_the_same_bits_under_every_kernel(model: NativeModel, bits: float) -> None:
    results = {
        kernel.name: logits_at(open_session(model, kernel=kernel.name), bits).tobytes()
        for kernel in kernels()
        if kernel.supported
    }
    assert "scalar" in results
    assert len(set(results.values())) == 1


@pytest.mark.parametrize("bits", BUDGETS)
def test_one_token_at_a_time_gives_the_bits_of_the_whole_prompt(model: NativeModel, bits: float) -> None:
    expected = logits_at(open_session(model), bits).tobytes()
    assert logits_at(open_session(model), bits, [1] * len(TOKENS)).tobytes() == expected
    assert logits_at(open_session(model, batch=7, threads=2), bits, [40, 1, 49]).tobytes() == expected


def test_a_context_of_several_attention_chunks_gives_the_same_bits_in_any_pieces(tmp_path: Path) -> None:
    file = tmp_path / "long.gguf"
    export_synthetic(replace(SHAPE, context_length=1000, block_count=1), file, "long")
    model = NativeModel(file, allow_partial=False, mmap=True)
    tokens = np.random.default_rng(1).integers(0, 256, 780).astype(np.int32)

    def last(pieces: list[int], threads: int, batch: int, kernel: str | None = None) -> bytes:
        session = open_session(model, threads, batch, kernel)
        for part in np.split(tokens, np.cumsum(pieces)[:-1]):
            logits = evaluate(session, part, 1)
        return logits.tobytes()

    expected = last([780], 1, 512)
    assert last([253, 1, 1, 1, 1, 255, 1, 266, 1], 3, 100) == expected
    assert last([500, *[1] * 280], 2, 512) == expected
    assert last([779, 1], 2, 37, "scalar") == expected


def test_routing_follows_the_budget_and_the_record_matches_the_counters(model: NativeModel) -> None:
    session = open_session(model)
    averages = []
    for bits in (2.0, 2.5, 3.0, 4.0, 6.0, 8.0):
        before = session.stats
        logits_at(session, bits)
        averages.append((session.stats - before).average_bits)
        weights = [rows * columns for rows, columns in map(SHAPE.linear, LINEARS)]
        record = session.depths(0, len(TOKENS)).astype(np.float64)
        assert record.shape == (len(TOKENS), SHAPE.block_count, len(weights))
        assert averages[-1] == pytest.approx(2 * np.average(record.mean(axis=(0, 1)), weights=weights))
    assert averages == sorted(averages)
    assert averages[0] == 2.0
    assert averages[-1] == 8.0
    assert 2.2 < averages[2] < 4.0


def test_a_rewound_session_continues_as_if_the_rest_had_never_been(model: NativeModel) -> None:
    session = open_session(model)
    expected = logits_at(session, 4)
    session.rewind(30)
    assert evaluate(session, TOKENS[30:], 60).tobytes() == expected[30:].tobytes()
    with pytest.raises(MobiQuantError, match="expected at most 90, found 91"):
        session.rewind(91)


def test_a_forked_child_computes_with_threads_of_its_own(model: NativeModel) -> None:
    session = open_session(model, threads=3)
    expected = logits_at(session, 3.5).tobytes()
    child = os.fork()
    if child == 0:
        os._exit(0 if logits_at(session, 3.5).tobytes() == expected else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert logits_at(session, 3.5).tobytes() == expected


def test_a_session_used_by_two_threads_at_once_refuses_one_by_name(model: NativeModel) -> None:
    session = open_session(model)
    outcomes: set[str] = set()

    def work() -> None:
        for _ in range(200):
            try:
                session.rewind(0)
                evaluate(session, TOKENS[:16], 1)
                outcomes.add("MQ_OK")
            except MobiQuantError as error:
                outcomes.add(error.status)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert outcomes == {"MQ_OK", "MQ_ERR_BUSY"}


def test_sessions_of_one_model_work_in_parallel_threads(model: NativeModel) -> None:
    expected = logits_at(open_session(model), 3.5).tobytes()
    results: list[bytes] = []
    workers = [
        threading.Thread(target=lambda: results.append(logits_at(open_session(model, threads=2), 3.5).tobytes()))
        for _ in range(8)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert results == [expected] * 8


@pytest.mark.parametrize(
    ("tokens", "status", "message"),
    [
        ([5, 272], "MQ_ERR_ARGUMENT", "token 1: expected an id from 0 to 271, found 272"),
        ([-1], "MQ_ERR_ARGUMENT", "token 0: expected an id from 0 to 271, found -1"),
        ([0] * 97, "MQ_ERR_CONTEXT_FULL", "97 tokens do not fit: 96 of 96 positions are left"),
    ],
)
def test_bad_tokens_are_refused_and_the_position_stays(
    model: NativeModel, tokens: list[int], status: str, message: str
) -> None:
    session = open_session(model)
    with pytest.raises(MobiQuantError, match=message) as caught:
        evaluate(session, np.array(tokens, np.int32), 1)
    assert caught.value.status == status
    assert session.position == 0


def test_bad_budgets_and_options_are_refused(model: NativeModel) -> None:
    session = open_session(model)
    for bits in (1.9, 8.1, float("nan")):
        with pytest.raises(MobiQuantError, match="average bits: expected 2 to 8"):
            session.set_average_bits(bits)
    with pytest.raises(MobiQuantError, match="depth: expected 1 to 4"):
        session.set_depth(5)
    with pytest.raises(MobiQuantError, match="kernel: 'abacus' is unknown"):
        open_session(model, kernel="abacus")
    with pytest.raises(MobiQuantError, match="n_ctx: expected at most 96"):
        NativeSession(model, n_ctx=97, n_threads=1, n_batch=8, kernel=None)
    with pytest.raises(MobiQuantError, match="n_threads: expected 1 to 256"):
        open_session(model, threads=1000)


def test_a_file_cut_after_a_slice_runs_at_the_depths_it_still_holds(path: Path, tmp_path: Path) -> None:
    whole = NativeModel(path, allow_partial=False, mmap=True)
    data, tier = path.read_bytes(), whole.info().slice_bytes[0]
    for depth in (1, 2, 3):
        cut = tmp_path / f"cut{depth}.gguf"
        cut.write_bytes(data[: len(data) - (4 - depth) * tier])
        with pytest.raises(MobiQuantError) as caught:
            NativeModel(cut, allow_partial=False, mmap=True)
        assert caught.value.status == "MQ_ERR_TRUNCATED"
        partial = NativeModel(cut, allow_partial=True, mmap=True)
        assert partial.info().max_depth == depth
        assert partial.info().expected_bytes == len(data)
        session = open_session(partial)
        with pytest.raises(MobiQuantError, match=f"depth: expected 1 to {depth}"):
            session.set_depth(depth + 1)
        assert logits_at(session, 2 * depth).tobytes() == logits_at(open_session(whole), 2 * depth).tobytes()
    cut.write_bytes(data[: len(data) - 3 * tier - 1])
    with pytest.raises(MobiQuantError, match="which even a 2-bit model needs"):
        NativeModel(cut, allow_partial=True, mmap=True)


def test_reading_the_file_into_memory_gives_the_same_bits(model: NativeModel, path: Path) -> None:
    read = NativeModel(path, allow_partial=False, mmap=False)
    assert logits_at(open_session(read), 4).tobytes() == logits_at(open_session(model), 4).tobytes()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read from /proc")
def test_a_long_context_costs_memory_when_it_is_used_and_not_before(tmp_path: Path) -> None:
    def resident() -> int:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))

    file = tmp_path / "long.gguf"
    export_synthetic(replace(TINY, context_length=1 << 18), file, "long")
    model = NativeModel(file, allow_partial=False, mmap=True)
    before = resident()
    session = open_session(model)
    assert session.cache_bytes == (1 << 18) * TINY.block_count * 2 * TINY.head_count_kv * TINY.head_dim * 2
    session.eval(TOKENS, np.empty((1, session.vocab_size), np.float32))
    tables = (1 << 18) * TINY.head_dim * 4  # cosines and sines of every position
    assert resident() - before < tables + session.cache_bytes / 8
    session.close()
