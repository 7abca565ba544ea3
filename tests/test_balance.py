"""Balanced channels, on a tiny model of every architecture: the same function, more even activations."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from architectures import CASES, CONTEXT, VOCAB, Case, make_model  # noqa: E402

from mobiquant.balance import balanced, load_balances, measure_balance, save_balances  # noqa: E402
from mobiquant.checkpoint import ROUTER_POINTS  # noqa: E402
from mobiquant.sensitivity import position_embeddings  # noqa: E402
from mobiquant.source import open_source  # noqa: E402

CPU = torch.device("cpu")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_balanced_blocks_compute_what_the_model_s_own_do(case: Case, tmp_path: Path, tiny_text: str) -> None:
    make_model(case, tmp_path / "model", tiny_text)
    source = open_source(str(tmp_path / "model"))
    windows = np.random.default_rng(0).integers(VOCAB, size=(6, CONTEXT))
    balances = measure_balance(source, windows, 4, CPU)
    save_balances(tmp_path / "balance.safetensors", balances)
    changed = balanced(source, load_balances(tmp_path / "balance.safetensors"))
    positions = position_embeddings(source, CONTEXT, CPU)
    x = source.embed(torch.from_numpy(windows))
    for index in range(source.block_count):
        own, block = source.block(index), changed.block(index)
        spread = [channel_spread(own, x, positions), channel_spread(block, x, positions)]
        assert all(after < before for before, after in zip(*spread, strict=True)), spread
        expected = own(x, position_embeddings=positions)
        torch.testing.assert_close(block(x, position_embeddings=positions), expected, rtol=1e-4, atol=1e-4)
        x = expected


def channel_spread(block: torch.nn.Module, x: torch.Tensor, positions: tuple) -> list[float]:
    """Per router point, the standard deviation of log(rms) over the channels of its input."""
    inputs: list[torch.Tensor] = []
    hooks = [
        block.get_submodule(names[0]).register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
        for names in ROUTER_POINTS.values()
    ]
    block(x, position_embeddings=positions)
    for hook in hooks:
        hook.remove()
    return [value.square().mean((0, 1)).log().std().item() for value in inputs]


def test_a_silent_channel_is_balanced_by_finite_factors(tmp_path: Path, tiny_text: str) -> None:
    case = replace(CASES[1], name="silent")
    make_model(case, tmp_path, tiny_text)
    source = open_source(str(tmp_path))

    def silence(_: int, block: torch.nn.Module) -> None:
        block.input_layernorm.weight[:3] = 0.0
        block.mlp.up_proj.weight[:] = 0.0

    balances = measure_balance(source.adjusted(silence), np.zeros((1, CONTEXT), np.int64), 1, CPU)
    for balance in balances:
        for factors in vars(balance).values():
            assert factors.isfinite().all() and factors.min() > 0.05 and factors.max() < 20
