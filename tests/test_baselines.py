"""The baselines are what they say: the grid has 2^bits levels, GPTQ uses correlations, scores and resume hold."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
import torch
from benchmarks.baselines import __main__ as baselines
from benchmarks.baselines.gptq import gptq, gptq_weights
from benchmarks.baselines.grid import bits_per_weight
from benchmarks.baselines.rtn import round_to_nearest
from benchmarks.baselines.scores import add_window
from benchmarks.dense import DenseModel

from mobiquant.evaluation.scoring import Score
from mobiquant.slices import split_groups
from mobiquant.source import open_source


def seeded_weight(rows: int = 24, columns: int = 320) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))


def correlated_inputs(columns: int) -> torch.Tensor:
    """float64 [tokens, columns], with the few strong directions that a network's activations have."""
    generator = torch.Generator().manual_seed(2)
    mixing = torch.randn(columns, columns, generator=generator) / torch.arange(1, columns + 1).sqrt()[:, None]
    return (torch.randn(2000, columns, generator=generator) @ mixing).double()


def levels_used(rounded: torch.Tensor, weight: torch.Tensor, bits: int) -> torch.Tensor:
    """Which of the 2^bits levels between the ends of each group `rounded` takes, bool [rows, groups, 2^bits]; fails
    when a value is none of them, beyond what float16 scales and offsets explain."""
    groups = split_groups(weight)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    levels = low + (high - low) * torch.linspace(0, 1, 2**bits)
    distance, nearest = (split_groups(rounded)[..., None] - levels[:, :, None]).abs().min(-1)
    assert (distance <= 2**-9 * groups.abs().amax(-1, keepdim=True)).all()
    return torch.zeros_like(levels, dtype=torch.bool).scatter(-1, nearest, True)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_round_to_nearest_uses_2_to_the_bits_levels_from_end_to_end(bits: int) -> None:
    weight = seeded_weight()
    used = levels_used(round_to_nearest(weight, bits), weight, bits)
    assert used[..., 0].all() and used[..., -1].all()
    # 128 Gaussian weights leave none of four levels empty.
    assert bits > 2 or used.all()


def test_round_to_nearest_is_within_half_a_step_and_near_exact_at_8_bits() -> None:
    weight = seeded_weight()
    error = (round_to_nearest(weight, 8) - weight).abs()
    groups = split_groups(weight)
    step = (groups.amax(-1) - groups.amin(-1)).max() / 255
    assert error.max() < 0.6 * step
    assert error.square().mean().sqrt() / weight.square().mean().sqrt() < 0.01


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gptq_halves_the_output_error_on_correlated_inputs_and_stays_on_the_grid(bits: int) -> None:
    weight = seeded_weight()
    inputs = correlated_inputs(weight.shape[1])
    nearest, better = round_to_nearest(weight, bits), gptq(weight, inputs.T @ inputs, bits)

    def output_error(rounded: torch.Tensor) -> float:
        return (inputs @ (rounded - weight).double().T).square().sum().item()

    assert output_error(better) < 0.5 * output_error(nearest)
    assert levels_used(better, weight, bits).any(-1).all()


def test_gptq_without_correlations_is_round_to_nearest() -> None:
    weight = seeded_weight()
    strengths = torch.linspace(0.1, 3.0, weight.shape[1], dtype=torch.float64).flip(0)
    assert torch.equal(gptq(weight, strengths.diag(), 3), round_to_nearest(weight, 3))


def test_gptq_survives_inputs_that_are_always_zero() -> None:
    weight = seeded_weight()
    inputs = correlated_inputs(weight.shape[1])
    inputs[:, 5:9] = 0
    assert torch.isfinite(gptq(weight, inputs.T @ inputs, 2)).all()


def test_gptq_quantises_every_linear_and_changes_nothing_else(tiny_model: Path) -> None:
    source, originals = open_source(str(tiny_model)), DenseModel(tiny_model, "cpu").originals
    windows = np.random.default_rng(0).integers(2, 320, (4, 32))
    weights = gptq_weights(source, windows, 8, "cpu")
    assert weights.keys() == originals.keys()
    for name, weight in weights.items():
        assert 0 < (weight - originals[name]).abs().max() < 0.05 * originals[name].abs().max()


def test_scales_and_offsets_count_in_bits_per_weight() -> None:
    assert bits_per_weight([(64, 128), (8, 512)], 2) == 2.25
    assert bits_per_weight([(1, 200)], 4) == 4 + 2 * 32 / 200


def test_sums_on_the_device_are_those_of_the_scoring_rule() -> None:
    random = np.random.default_rng(0)
    logits, reference = (random.normal(0, 3, (50, 300)).astype(np.float32) for _ in range(2))
    reference[:25] = logits[:25]
    targets = random.integers(0, 300, 50).astype(np.int32)
    expected, found = Score(), Score()
    expected.add(logits, targets, reference)
    log_probs = [torch.from_numpy(values).double().log_softmax(-1) for values in (logits, reference)]
    add_window(found, log_probs[0], torch.from_numpy(targets), log_probs[1])
    assert dataclasses.asdict(found) == pytest.approx(dataclasses.asdict(expected), rel=1e-12)


@pytest.fixture
def texts(tmp_path: Path, tiny_text: str) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in (baselines.CALIBRATION, *(name for name, _, _ in baselines.TEXTS)):
        (folder / name).write_text(tiny_text, encoding="utf-8")
    return folder


def test_a_run_that_was_stopped_goes_on_and_gives_the_same_list(
    tiny_model: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = baselines.Settings(samples=4, windows=2)
    whole, stopped = tmp_path / "whole.json", tmp_path / "stopped.json"
    entries = baselines.run(str(tiny_model), texts, whole, settings)
    names = ["full precision", *(f"RTN {bits}" for bits in (2, 3, 4, 6, 8)), *(f"GPTQ {bits}" for bits in (2, 3, 4))]
    assert [entry.name for entry in entries] == [name for name in names for _ in baselines.TEXTS]
    assert entries[0].kl == 0 and entries[0].top1 == 1
    divergence = {entry.name: entry.kl for entry in entries if entry.text == "heldout.txt"}
    assert divergence["RTN 2"] > divergence["RTN 3"] > divergence["RTN 4"] > divergence["RTN 6"] > divergence["RTN 8"]

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(baselines, "gptq_weights", interrupt)
        baselines.run(str(tiny_model), texts, stopped, settings)
    assert not stopped.exists()
    with monkeypatch.context() as patch:
        patch.setattr(baselines, "round_to_nearest", interrupt)
        baselines.run(str(tiny_model), texts, stopped, settings)
    assert stopped.read_bytes() == whole.read_bytes()
    assert json.loads(whole.read_text())[3] == dataclasses.asdict(entries[3])
    assert sorted(path.name for path in tmp_path.glob("*.json*")) == ["stopped.json", "whole.json"]
