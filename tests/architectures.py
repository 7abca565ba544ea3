"""A seeded tiny model of every architecture, of sizes that do not divide, calibrated and exported; and its logits as
transformers, the blocks of calibration and the reference's arithmetic compute them in full precision.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from export.to_gguf import export_checkpoint
from mobiquant.arithmetic import causal_attention, rms_norm, rope_tables
from mobiquant.block import soft_capped
from mobiquant.calibrate import calibrate
from mobiquant.config import CalibrationSettings
from mobiquant.demo.train import train_tokenizer
from mobiquant.exact import run_block
from mobiquant.recipes import gains
from mobiquant.sensitivity import position_embeddings
from mobiquant.source import Source, open_source

CONTEXT, VOCAB, TOKENS, WINDOW = 48, 301, 40, 9
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


# Of the second block alone.
QWEN_WINDOW = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}


@dataclass(frozen=True)
class Case:
    """A tiny model. error: relative root mean square of C's logits at 8 bits against transformers', measured and
    rounded up; it is that of int8 activations.
    """

    name: str
    model_type: str
    width: int
    inner: int
    heads: int
    heads_kv: int
    blocks: int = 2
    error: float = 0.08
    recipe: str = "best"
    settings: dict[str, Any] = field(default_factory=dict)

    def config(self) -> dict[str, Any]:
        return {
            "model_type": self.model_type,
            "vocab_size": VOCAB,
            "hidden_size": self.width,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.blocks,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads_kv,
            "max_position_embeddings": CONTEXT,
            "rms_norm_eps": 1e-5,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": None,
            "tie_word_embeddings": False,
            **self.settings,
        }


CASES = [
    Case("llama-2", "llama", 96, 133, 3, 3, blocks=1, recipe="paper"),
    Case("llama-3", "llama", 100, 72, 4, 2, settings={"head_dim": 80, "rope_parameters": LLAMA3_ROPE}),
    Case("mistral", "mistral", 144, 200, 4, 1, recipe="paper", settings={"sliding_window": WINDOW}),
    Case("qwen2", "qwen2", 140, 77, 2, 1, settings={**QWEN_WINDOW, "tie_word_embeddings": True}),
    Case("qwen3", "qwen3", 72, 130, 3, 1, settings={"head_dim": 100}),
    Case("phi3", "phi3", 160, 90, 2, 1, settings={"partial_rotary_factor": 0.75}),
    Case(
        "smollm3", "smollm3", 132, 129, 2, 2, blocks=3, settings={"no_rope_layers": [1, 0, 1], "attention_bias": True}
    ),
    Case(
        "gemma2",
        "gemma2",
        68,
        104,
        2,
        1,
        settings={
            "head_dim": 256,
            "query_pre_attn_scalar": 144,
            "tie_word_embeddings": True,
            "sliding_window": WINDOW,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 4.0,
        },
    ),
    Case(
        "gemma3",
        "gemma3_text",
        100,
        141,
        4,
        2,
        blocks=3,
        settings={
            "head_dim": 66,
            "tie_word_embeddings": True,
            "sliding_window": WINDOW,
            "sliding_window_pattern": 2,
            "rope_theta": 30000.0,
            "rope_local_base_freq": 500.0,
        },
    ),
]


def make_model(case: Case, folder: Path, text: str) -> None:
    """Save a seeded model, its weights and vectors larger than transformers' own, so that every part of it shows."""
    torch.manual_seed(7)
    config = case.config()
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop("model_type"), **config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(0.0, 1.5 * parameter.shape[1] ** -0.5)
            else:
                parameter.add_(torch.randn_like(parameter) * (0.5 if name.endswith("bias") else 0.3))
    model.save_pretrained(folder)
    train_tokenizer(text.split("\n<|endoftext|>\n"), VOCAB).save(str(folder / "tokenizer.json"))


@dataclass(frozen=True)
class Made:
    case: Case
    source: Source
    checkpoint: Path
    file: Path
    tokens: np.ndarray
    expected: np.ndarray  # transformers' logits in float32


def make(case: Case, folder: Path, text: str) -> Made:
    """In `folder`: the model, its calibrated checkpoint and the file."""
    make_model(case, folder / "model", text)
    source = open_source(str(folder / "model"))
    settings = CalibrationSettings(
        recipe=case.recipe, samples=4, batch=2, seq_len=32, distill_steps=2, distill_batch=1, epochs=1, device="cpu"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gains, "FIT_STEPS", 10)  # most of the time otherwise
        calibrate(source, folder / "checkpoint", text, settings)
    read_outer_matrices_whole(folder / "checkpoint" / "config.json")
    export_checkpoint(folder / "checkpoint", folder / "model.gguf")
    tokens = np.random.default_rng(3).integers(2, VOCAB, TOKENS).astype(np.int32)
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens.astype(np.int64))[None]).logits[0].numpy()
    return Made(case, source, folder / "checkpoint", folder / "model.gguf", tokens, expected)


def read_outer_matrices_whole(file: Path) -> None:
    """At all four slices, whatever calibration found enough, so that the error is that of depth 4 everywhere."""
    config = json.loads(file.read_text())
    config["quantization_config"] |= {"embedding_depth": 4, "output_depth": 4}
    file.write_text(json.dumps(config))


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    """Root mean square of the difference, of that of what differs within a token."""
    spread = expected - expected.mean(-1, keepdims=True)
    return float(np.sqrt(np.square(found - expected).mean() / np.square(spread).mean()))


@torch.no_grad()
def block_logits(source: Source, tokens: np.ndarray) -> np.ndarray:
    """By the blocks that calibration works on."""
    x = source.embed(torch.from_numpy(tokens.astype(np.int64))[None])
    positions = position_embeddings(source, len(tokens), torch.device("cpu"))
    for index in range(source.block_count):
        x = source.block(index)(x, position_embeddings=positions)
    return source.capped(source.final_norm()(x) @ source.head().T)[0].numpy()


@torch.no_grad()
def exact_logits(source: Source, tokens: np.ndarray) -> np.ndarray:
    """By the runtime's arithmetic, but with linears, keys and values in full precision."""
    spec, x = source.config, source.embed(torch.from_numpy(tokens.astype(np.int64)))
    tables = [None, *(rope_tables(frequencies, len(tokens)) for frequencies in source.frequencies())]
    for index in range(source.block_count):

        def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, index: int = index) -> torch.Tensor:
            key, value = (part.repeat_interleave(len(query) // len(part), dim=0) for part in (key, value))
            window = spec.windows[index]
            return causal_attention(query, key, value, spec.attention_scale, spec.attention_softcap, window)

        x = run_block(source.block(index), x, tables[spec.ropes[index]], attend)
    logits = rms_norm(x, source.final_norm().weight, spec.rms_norm_eps) @ source.head().T
    return soft_capped(logits, spec.output_softcap).numpy()
