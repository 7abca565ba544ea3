"""Shared fixtures: a tiny seeded Llama folder made in seconds, a text for it, and its calibrated checkpoint."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

# Two test processes on two cores must not wait for each other in busy loops.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

TINY_CONTEXT = 64


@pytest.fixture(scope="session")
def tiny_text() -> str:
    """Seeded words in lines, with document separators as in real calibration texts."""
    random = np.random.default_rng(5)
    letters = np.array(list("aeioubdklmnrst"))
    words = ["".join(random.choice(letters, size=random.integers(2, 7))) for _ in range(60)]
    documents = [" ".join(random.choice(words, size=80)) for _ in range(40)]
    return "\n<|endoftext|>\n".join(documents) + "\n<|endoftext|>\n"


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, tiny_text: str) -> Path:
    """A Hugging Face folder: 2 blocks, sizes that are no multiples of 128 or 16, grouped-query attention, tied head.

    Seeded random weights, larger than transformers' own, so that its predictions are far from uniform.
    """
    torch = pytest.importorskip("torch")
    from transformers import LlamaForCausalLM

    from mobiquant.demo.train import Shape, model_config, train_tokenizer

    folder = tmp_path_factory.mktemp("tiny-model")
    shape = Shape(vocab=320, width=144, layers=2, heads=4, kv_heads=2, feed_forward=200, context=TINY_CONTEXT)
    torch.manual_seed(1)
    model = LlamaForCausalLM(model_config(shape))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0.0, 1.5 * parameter.shape[1] ** -0.5)
    model.save_pretrained(folder)
    train_tokenizer(tiny_text.split("\n<|endoftext|>\n"), shape.vocab).save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="session")
def tiny_settings():
    """Calibration settings that take seconds."""
    from mobiquant.config import CalibrationSettings

    return CalibrationSettings(
        samples=8, batch=2, seq_len=TINY_CONTEXT, distill_steps=10, distill_batch=2, epochs=1, device="cpu"
    )


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_text: str, tiny_settings) -> Path:
    """The calibrated checkpoint of `tiny_model`."""
    from mobiquant.calibrate import calibrate
    from mobiquant.source import open_source

    folder = tmp_path_factory.mktemp("tiny") / "checkpoint"
    calibrate(open_source(str(tiny_model)), folder, tiny_text, tiny_settings)
    return folder
