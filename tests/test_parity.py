"""The C runtime and the torch reference agree bit for bit: logits, router decisions, greedy tokens.

The bundled model runs here after a short calibration; `tests/benchmarks/parity.py` does the same for any other model.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
import torch
from benchmarks.parity import BUDGETS, compare
from torch.nn import functional
from transformers import AutoModelForCausalLM, DynamicCache

import mobiquant.transformers  # noqa: F401  (registers the quantizer)
from export.to_gguf import export_checkpoint
from mobiquant.arithmetic import ATTENTION_CHUNK, causal_attention
from mobiquant.calibrate import calibrate
from mobiquant.config import CalibrationSettings
from mobiquant.evaluation.scoring import make_windows
from mobiquant.reference import open_reference
from mobiquant.source import open_source
from runtime import Model

DEMO = Path(__file__).parents[1] / "mobiquant" / "demo"


def check(checkpoint: Path, file: Path, windows: list[np.ndarray], greedy: int, budgets) -> None:
    for result in compare(checkpoint, file, windows, greedy, budgets):
        assert result.kld == 0.0, result
        assert result.unequal == 0, result
        assert result.greedy_equal == result.greedy == greedy, result


def test_a_model_of_odd_sizes_gives_the_reference_bits_at_every_budget(tiny_checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    export_checkpoint(tiny_checkpoint, file)
    random = np.random.default_rng(3)
    windows = [random.integers(2, 320, 60).astype(np.int32) for _ in range(2)]
    check(tiny_checkpoint, file, windows, 50, BUDGETS)


def windowed(tiny_checkpoint: Path, folder: Path, window: int) -> Path:
    """Llama's tensors in an architecture that has windows: one block with, one without."""
    checkpoint = folder / "windowed"
    shutil.copytree(tiny_checkpoint, checkpoint)
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    config |= {"model_type": "smollm3", "no_rope_layers": [1, 1], "use_sliding_window": True}
    config |= {"sliding_window": window, "layer_types": ["sliding_attention", "full_attention"]}
    config |= {"max_position_embeddings": 2000, "pad_token_id": 0}
    (checkpoint / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return checkpoint


def test_windowed_blocks_give_the_reference_bits(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Rings that wrap, windows over the border of two chunks, and transformers' own cache of the window."""
    checkpoint = windowed(tiny_checkpoint, tmp_path, 70)
    file = tmp_path / "windowed.gguf"
    export_checkpoint(checkpoint, file)
    tokens = np.random.default_rng(8).integers(2, 320, 340).astype(np.int32)
    reference = open_reference(checkpoint)
    with Model(file, n_batch=20, avg_bits=3.0) as model:
        model.budget.apply(reference)
        expected = reference.logits(tokens)
        np.testing.assert_array_equal(model.eval(tokens, all_logits=True), expected)
        assert model._sequence.session.rewind_floor > 0  # the ring of 256 has wrapped

    loaded = AutoModelForCausalLM.from_pretrained(checkpoint)  # its cache keeps the window alone
    loaded.set_avg_bits(3.0)
    ids = torch.from_numpy(tokens.astype(np.int64))[None]
    cache = DynamicCache(config=loaded.config)
    for part in ids.split([250, 81, 1, 8], dim=1):
        logits = loaded(part, past_key_values=cache, use_cache=True).logits
    np.testing.assert_array_equal(logits[0].numpy(), expected[-8:])


def test_a_padded_batch_of_windowed_blocks_gives_the_bits_of_each_text(tiny_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = windowed(tiny_checkpoint, tmp_path, 11)
    loaded = AutoModelForCausalLM.from_pretrained(checkpoint)
    loaded.set_bits(4)
    reference = open_reference(checkpoint)
    reference.set_depth(2)
    random = np.random.default_rng(9)
    texts = [random.integers(2, 320, length) for length in (24, 15)]
    padded = torch.tensor([[0] * (24 - len(text)) + text.tolist() for text in texts])
    mask = torch.tensor([[0] * (24 - len(text)) + [1] * len(text) for text in texts])
    continued = loaded.generate(padded, attention_mask=mask, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    for row, text in zip(continued[:, 24:].numpy(), texts, strict=True):
        whole = np.concatenate([text, row])
        np.testing.assert_array_equal(reference.logits(whole)[len(text) - 1 : -1].argmax(-1), row)


def test_an_int8_cache_gives_the_reference_bits(tiny_checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    export_checkpoint(tiny_checkpoint, file)
    tokens = np.random.default_rng(8).integers(2, 320, 60).astype(np.int32)
    reference = open_reference(tiny_checkpoint, cache_type="q8_0")
    with Model(file, cache_type="q8_0", avg_bits=3.5) as model:
        model.budget.apply(reference)
        np.testing.assert_array_equal(model.eval(tokens, all_logits=True), reference.logits(tokens))


def test_the_bundled_model_gives_the_reference_bits(tmp_path: Path) -> None:
    source = open_source(str(DEMO / "tale-6m"))
    text = (DEMO / "calibration.txt").read_text(encoding="utf-8")
    settings = CalibrationSettings(samples=4, seq_len=128, distill_steps=10, distill_batch=1, device="cpu")
    calibrate(source, tmp_path / "checkpoint", text, settings)
    file = tmp_path / "tale-6m.gguf"
    export_checkpoint(tmp_path / "checkpoint", file)
    ids = source.tokenizer().encode((DEMO / "heldout.txt").read_text(encoding="utf-8")[:4000]).ids
    windows = [window.tokens for window in make_windows(ids, "all", 290, 0)[:1]]  # past one attention chunk
    check(tmp_path / "checkpoint", file, windows, 200, (2, 8, 3.0, 5.0))


def test_attention_of_the_last_tokens_alone_equals_theirs_in_the_whole_text():
    generator = torch.Generator().manual_seed(6)
    positions = 2 * ATTENTION_CHUNK + 37
    query, key, value = (torch.randn(2, positions, 6, generator=generator) for _ in range(3))
    for window in (0, 1, 40, ATTENTION_CHUNK, ATTENTION_CHUNK + 30):
        whole = causal_attention(query, key, value, 0.4, window=window)
        for last in (1, 30, ATTENTION_CHUNK + 3):
            alone = causal_attention(query[:, -last:], key, value, 0.4, window=window)
            torch.testing.assert_close(alone, whole[:, -last:], rtol=0, atol=0)
        seen = torch.ones(positions, positions, dtype=torch.bool).tril().triu(1 - (window or positions))
        expected = functional.scaled_dot_product_attention(query, key, value, seen, scale=0.4)
        torch.testing.assert_close(whole, expected, rtol=1e-4, atol=1e-5)
