"""The GPU gives the bits of the CPU: logits, depths, hidden states, greedy tokens, over shapes that fit no tile.

The CPU's are those of plain C under every kernel (test_session), so the fastest stands for it here.

Needs the CUDA library (`make cuda`, or MOBIQUANT_CUDA_LIBRARY) and a GPU that it can use; skipped with the reason
without.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny import TINY

from export.keys import ROUTER_POINTS
from export.metadata import metadata_fields
from export.plan import PlannedTensor, plan_tensors
from export.shape import ModelShape
from export.synthetic import SyntheticSource, synthetic_vocabulary
from export.writer import write_file
from runtime.commands.options import add_device_options, device_option
from runtime.commands.report import describe_machine
from runtime.model import Model
from runtime.native import MobiQuantError, NativeModel, NativeSession, device_info

USABLE, REASON = device_info()
gpu = pytest.mark.skipif(not USABLE, reason=REASON)

BUDGETS = (2, 4, 6, 8, 2.6, 3.5, 5.2)


def shape(
    context: int, width: int, feed_forward: int, heads: int, heads_kv: int, head_dim: int, **others
) -> ModelShape:
    sizes = {"embedding_length": width, "feed_forward_length": feed_forward, "head_dim": head_dim}
    return replace(TINY, context_length=context, head_count=heads, head_count_kv=heads_kv, **sizes, **others)


SHAPES = {
    "smallest": shape(64, 16, 24, 1, 1, 2, vocab_size=19, router_hidden=1),
    "odd": shape(400, 200, 333, 6, 2, 38, vocab_size=275, router_hidden=5, tied=False, block_count=3),
    "wide": shape(90, 1168, 4500, 9, 9, 130, vocab_size=1000, router_hidden=16, output_depth=2, block_count=1),
    "chunks": shape(800, 128, 256, 4, 1, 64, embedding_depth=3),
    # Biases, as Qwen 2 has them, and heads rotated in part; norms of heads, as Qwen 3, in blocks some of which do
    # not rotate, as SmolLM 3; and the activation and embedding of Gemma.
    "biased": shape(300, 160, 200, 4, 2, 40, qkv_bias=True, output_bias=True, rope_dim=24),
    "normed": shape(300, 136, 264, 6, 3, 36, qk_norm=True, qkv_bias=True, rope_pattern=(1, 0)),
    "scaled": shape(64, 128, 140, 2, 1, 64, activation="gelu_tanh", embedding_scale=11.25, attention_scale=0.2),
}


class OddSource(SyntheticSource):
    """Sizes that are no multiples of a tile; padding holds noise, which nothing may read into a result."""

    def __init__(self, shape: ModelShape) -> None:
        self._shape, self._seed = shape, 3
        self._noise = np.random.default_rng(3).integers(-128, 128, 100003, np.int8)

    def read(self, tensor: PlannedTensor) -> np.ndarray:
        data = super().read(tensor)
        norm = data.dtype == np.float32 and data.ndim == 1 and (data == 1).all()  # of different weights here
        return self._generator(tensor.name).uniform(0.5, 1.5, data.shape).astype(np.float32) if norm else data

    def _router(self, tensor: PlannedTensor) -> np.ndarray:
        if tensor.part == "hidden":
            point = tensor.module.removeprefix("router_")
            assert point in ROUTER_POINTS
            rows = self._generator(tensor.name).integers(-127, 128, tensor.shape).astype(np.int8)
            rows[:, self._shape.router_columns(point) :] = 0
            return rows
        return super()._router(tensor)


def write_model(target: Path, shape: ModelShape) -> None:
    vocabulary = synthetic_vocabulary()
    write_file(target, metadata_fields(target.stem, shape, vocabulary), plan_tensors(shape), OddSource(shape))


@pytest.fixture(scope="module", params=SHAPES)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape, target = SHAPES[request.param], tmp_path_factory.mktemp("cuda") / f"{request.param}.gguf"
    write_model(target, shape)
    return target


def open_session(path: Path, device: str, **options: int) -> NativeSession:
    model = NativeModel(path, allow_partial=False, mmap=True, device=device)
    assert model.device == device
    settings = {"n_ctx": 0, "n_threads": 1, "n_batch": 512} | options
    return NativeSession(model, kernel=None, **settings)


def set_budget(session: NativeSession, bits: float) -> None:
    session.rewind(0)
    (session.set_depth(bits // 2) if isinstance(bits, int) else session.set_average_bits(bits))


def tokens_of(session: NativeSession, n: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, session.vocab_size, n).astype(np.int32)


def evaluate(session: NativeSession, tokens: np.ndarray, n_logits: int) -> np.ndarray:
    logits = np.full((n_logits, session.vocab_size), np.nan, np.float32)
    session.eval(tokens, logits)
    return logits


@gpu
@pytest.mark.parametrize("bits", BUDGETS)
def test_logits_and_depths_are_those_of_plain_c(path: Path, bits: float) -> None:
    """A prompt, then token by token, then a few together: tokens of different depths."""
    results = []
    for device in ("cpu", "cuda"):
        session = open_session(path, device, n_batch=40)
        set_budget(session, bits)
        tokens = tokens_of(session, min(session.context, 90))
        logits = [evaluate(session, part, len(part)) for part in np.split(tokens, [45, 46, 47, 48, 50, 53])]
        results.append((np.concatenate(logits), session.depths(0, len(tokens)), session.stats))
    (cpu, cpu_depths, cpu_stats), (cuda, cuda_depths, cuda_stats) = results
    assert np.isfinite(cpu).all()
    assert (cuda_depths == cpu_depths).all()
    assert cuda.tobytes() == cpu.tobytes()
    assert cuda_stats == cpu_stats


@gpu
def test_every_position_of_a_long_text_is_that_of_plain_c(path: Path) -> None:
    cpu, cuda = open_session(path, "cpu"), open_session(path, "cuda")
    tokens = tokens_of(cpu, cpu.context)
    for session in (cpu, cuda):
        set_budget(session, 3.3)
    expected = [evaluate(cpu, part, 3) for part in (tokens[:-4], tokens[-4:])]
    found = [evaluate(cuda, part, 3) for part in (tokens[:-4], tokens[-4:])]
    assert np.concatenate(found).tobytes() == np.concatenate(expected).tobytes()


@gpu
def test_greedy_tokens_and_what_follows_them_are_those_of_the_cpu(path: Path) -> None:
    results = []
    for device in ("cpu", "cuda"):
        session = open_session(path, device)
        set_budget(session, 3.5)
        evaluate(session, tokens_of(session, 5), 0)
        count = min(session.context - 6, 150)  # over the end of a stretch
        chosen, _ = session.greedy(3, count)
        results.append((chosen, session.depths(0, session.position), evaluate(session, chosen[-1:], 1)))
    (cpu, cpu_depths, cpu_logits), (cuda, cuda_depths, cuda_logits) = results
    assert (cuda == cpu).all()
    assert (cuda_depths == cpu_depths).all()
    assert cuda_logits.tobytes() == cpu_logits.tobytes()


@gpu
def test_hidden_states_and_a_saved_cache_fit_both_sides(path: Path) -> None:
    cpu, cuda = open_session(path, "cpu"), open_session(path, "cuda")
    tokens, hidden = tokens_of(cpu, 50), []
    for session in (cpu, cuda):
        set_budget(session, 4.5)
        states = np.empty((7, NativeModel(path, allow_partial=False, mmap=True).info().embedding_length), np.float32)
        session.eval_hidden(tokens, states)
        hidden.append(states)
    assert hidden[0].tobytes() == hidden[1].tobytes()
    assert cpu.state() == cuda.state()
    other = open_session(path, "cuda")
    other.set_average_bits(4.5)
    other.set_state(cpu.state())
    assert evaluate(other, tokens[:2], 2).tobytes() == evaluate(cpu, tokens[:2], 2).tobytes()


@gpu
def test_a_rewound_session_repeats_itself_100_times(path: Path) -> None:
    session = open_session(path, "cuda")
    set_budget(session, 3.5)
    evaluate(session, tokens_of(session, 20), 0)
    runs = set()
    for _ in range(100):
        session.rewind(20)
        runs.add(evaluate(session, tokens_of(session, 3), 3).tobytes() + session.greedy(1, 5)[0].tobytes())
    assert len(runs) == 1


@gpu
def test_a_static_budget_and_another_depth_of_the_head_are_those_of_plain_c(path: Path) -> None:
    results = []
    for device in ("cpu", "cuda"):
        session = open_session(path, device)
        set_budget(session, 4)
        session.set_output_depth(1)
        first = evaluate(session, tokens_of(session, 3)[:1], 1)
        session.set_output_depth(3)
        results.append(first.tobytes() + evaluate(session, tokens_of(session, 3)[1:2], 1).tobytes())
    assert results[0] == results[1]


@gpu
def test_memory_on_the_gpu_is_the_file_the_cache_and_a_workspace(path: Path) -> None:
    session = open_session(path, "cuda")
    sizes, info = session.device_bytes, NativeModel(path, allow_partial=False, mmap=True).info()
    padded = -(-info.head_dim // 16) * 16
    positions = -(-session.context // 16) * 16
    cache = 2 * info.block_count * info.head_count_kv * positions * (info.head_dim + padded)
    assert 0 < sizes.weights <= info.file_bytes
    assert cache <= sizes.cache <= cache + 512
    assert sizes.workspace > 0


def small_file(folder: Path) -> Path:
    target = folder / "small.gguf"
    write_model(target, SHAPES["odd"])
    return target


def test_without_the_library_everything_runs_on_the_cpu_and_says_why(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("MOBIQUANT_CUDA_LIBRARY", str(tmp_path / "absent.so"))
    file = small_file(tmp_path)
    assert "absent.so is not there" in describe_machine().splitlines()[-1]
    with Model(file) as model:
        assert model.device == "cpu"
        assert "absent.so is not there" in model.device_note
    with pytest.raises(MobiQuantError, match=r"small\.gguf: cannot run on a GPU: .*absent\.so is not there") as refused:
        Model(file, device="cuda")
    assert refused.value.status == "MQ_ERR_DEVICE"
    with pytest.raises(MobiQuantError, match="device: expected cpu, cuda or auto, found 'tpu'"):
        Model(file, device="tpu")


def test_what_the_library_does_not_have_goes_to_the_cpu_by_name(tmp_path: Path, monkeypatch) -> None:
    """Whether a library is there or not: it is never asked to run a model with a sliding window."""
    write_model(tmp_path / "windows.gguf", replace(SHAPES["odd"], sliding_window=40))
    with Model(tmp_path / "windows.gguf") as model:
        assert model.device == "cpu"
        assert model.device_note == "the model has sliding windows, which the CUDA library does not compute"
    with Model(small_file(tmp_path), cache_type="q8_0") as model:
        assert (model.device, model.device_note) == ("cpu", "")


@pytest.mark.parametrize(
    ("flags", "device"),
    [
        ([], "auto"),
        (["--device", "cuda"], "cuda"),
        (["-ngl", "0"], "cpu"),
        (["-ngl", "99"], "cuda"),
        (["-ngl", "0", "--device", "cpu"], "cpu"),
    ],
)
def test_flags_ask_for_a_device(flags: list[str], device: str) -> None:
    parser = argparse.ArgumentParser()
    add_device_options(parser)
    assert device_option(parser.parse_args(flags)) == device


def test_flags_that_disagree_are_refused() -> None:
    with pytest.raises(ValueError, match="-ngl 0 is --device cpu, found --device cuda beside it"):
        device_option(argparse.Namespace(gpu_layers=0, device="cuda"))


def test_a_library_that_is_no_library_is_named(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "broken.so").write_bytes(b"not ELF")
    monkeypatch.setenv("MOBIQUANT_CUDA_LIBRARY", str(tmp_path / "broken.so"))
    assert "broken.so" in describe_machine().splitlines()[-1]
