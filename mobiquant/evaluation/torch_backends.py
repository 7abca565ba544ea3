"""The folders that torch evaluates: a checkpoint by mobiquant.reference, and full precision by transformers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache

from export.vocab import read_vocabulary
from mobiquant.architectures import ModelSpec
from mobiquant.checkpoint import ROUTER_POINTS, is_checkpoint, open_checkpoint
from mobiquant.evaluation.backends import Backend, shared_prefix
from mobiquant.models import linear_shapes
from mobiquant.packing import GROUP_SIZE, SLICE_COUNT, TILE_ROWS, groups_of, tiles_of
from mobiquant.reference import open_reference
from mobiquant.source import open_source
from runtime.budget import Budget
from runtime.tokens import Tokenizer

_GATES = SLICE_COUNT - 1


def open_folder(path: Path, device: str, n_ctx: int) -> Backend:
    """A checkpoint, or another folder in full precision. Raises ValueError when it is neither."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: expected a CUDA device, found none")
    kind = CheckpointBackend if is_checkpoint(path) else FullPrecisionBackend
    return kind(path, device, n_ctx)


class CheckpointBackend:
    """A calibrated checkpoint, run by mobiquant.reference without a cache."""

    kind = "checkpoint"

    def __init__(self, path: Path, device: str, n_ctx: int) -> None:
        self._model = open_reference(path, device, exact=False)
        config = self._model.config
        self.tokenizer = _read_tokenizer(path, config.vocab_size)
        self.n_ctx = n_ctx or config.max_position_embeddings
        self.scale_bits, self.router_bits = overhead_bits(config, open_checkpoint(path).quantization.router.hidden_size)
        self.bits_read = float("nan")

    def set_budget(self, budget: Budget | None) -> None:
        if budget is None:
            self._model.set_depth(SLICE_COUNT)
        else:
            budget.apply(self._model)

    def predict(self, tokens: np.ndarray, first: int) -> Iterator[np.ndarray]:
        logits = self._model.logits(tokens[:-1])[first - 1 :]
        self.bits_read = self._model.bits_read
        yield logits

    def close(self) -> None:
        del self._model


class FullPrecisionBackend:
    """A Hugging Face folder in float32, its keys and values kept between calls that begin alike."""

    kind = "full precision"
    scale_bits = router_bits = 0.0

    def __init__(self, path: Path, device: str, n_ctx: int) -> None:
        self._path = path
        stored = open_source(str(path)).original.dtype or torch.float32
        self._model = open_full_precision(path).to(device)
        config = self._model.config
        self.tokenizer = _read_tokenizer(path, config.vocab_size)
        self.n_ctx = n_ctx or config.max_position_embeddings
        # Of the weights as stored; they are computed with in float32.
        self.bits_read = float(torch.finfo(stored).bits)
        self._cache, self._cached = _cache(), []

    def set_budget(self, budget: Budget | None) -> None:
        if budget is not None:
            raise ValueError(f"{self._path}: expected a GGUF file or a checkpoint for a budget, found full precision")
        self._cache, self._cached = _cache(), []

    @torch.no_grad()
    def predict(self, tokens: np.ndarray, first: int) -> Iterator[np.ndarray]:
        read = tokens[:-1].tolist()
        kept = shared_prefix(self._cached, read[: first - 1])
        if kept < len(self._cached):
            self._cache.crop(kept - len(self._cached))  # a negative number of tokens is taken off the end
        self._cached = read
        ids = torch.tensor([read[kept:]], device=self._model.device)
        output = self._model(ids, past_key_values=self._cache, use_cache=True, logits_to_keep=len(tokens) - first)
        yield output.logits[0].float().cpu().numpy()

    def close(self) -> None:
        del self._model, self._cache


def _cache() -> DynamicCache:
    """Of every position: made for a configuration with sliding windows, it forgets and cannot be cropped."""
    return DynamicCache()


def open_full_precision(path: Path | str) -> nn.Module:
    """The model of a Hugging Face folder in float32, for evaluation. Raises UnsupportedModelError, a ValueError."""
    return AutoModelForCausalLM.from_pretrained(open_source(str(path)).path, dtype=torch.float32).eval()


def overhead_bits(config: ModelSpec, router_hidden: int) -> tuple[float, float]:
    """Bits per routed weight of scales with offsets, and of routers, as the GGUF file stores them, padding included."""
    shapes = linear_shapes(config)
    weights = sum(rows * columns for rows, columns in shapes.values())
    tiles = sum(tiles_of(rows) * groups_of(columns) for rows, columns in shapes.values())
    routers = 0
    for names in ROUTER_POINTS.values():
        columns = groups_of(shapes[names[0]][1]) * GROUP_SIZE
        gates = len(names) * _GATES
        # int8 weights of the hidden layer; its scale and bias, and the heads with bias, in float32.
        routers += router_hidden * columns + 4 * (2 * router_hidden + gates * (router_hidden + 2))
    return 8 * tiles * TILE_ROWS * 2 * 2 / weights, 8 * routers / weights


def _read_tokenizer(path: Path, vocab_size: int) -> Tokenizer:
    vocabulary = read_vocabulary(path, vocab_size)
    return Tokenizer(
        vocabulary.tokenizer_json,
        bos=vocabulary.bos_token,
        add_bos=vocabulary.add_bos,
        eos=vocabulary.eos_tokens,
    )
