"""Seeded files of known model shapes with random weights, for measuring speed without a trained model.

Such a file is valid in every part: weights have a standard deviation near 0.02, so logits stay finite, and the routers
reach about the average bits asked for. What it writes is noise.
"""

from __future__ import annotations

from dataclasses import replace
from zlib import crc32

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from export.errors import ExportError
from export.keys import LINEARS, SUFFIX_BIAS, SUFFIX_SCALE_OFFSET, TENSOR_ROPE, TENSOR_ROPE_LOCAL, router_tensor
from export.plan import PlannedTensor
from export.shape import ModelShape
from export.vocab import Vocabulary
from mobiquant.config import default_budgets
from mobiquant.packing import GROUP_SIZE, SLICE_COUNT, TILE_ROWS


def _in_file_order(blocks: int) -> tuple[int, ...]:
    """A static order without preference: every linear's second slice, then every third, then every fourth."""
    return tuple(range(blocks * len(LINEARS))) * (SLICE_COUNT - 1)


# The sizes of tale-6m with room for a long text: of its cache every token takes 3 kB.
_SMALL = ModelShape(
    vocab_size=4096,
    context_length=32768,
    embedding_length=256,
    block_count=6,
    feed_forward_length=768,
    head_count=4,
    head_count_kv=2,
    head_dim=64,
    rms_epsilon=1e-5,
    rope_freq_base=1000000.0,
    tied=True,
    router_hidden=16,
    budgets=default_budgets(),
    static_order=_in_file_order(6),
)

SHAPES: dict[str, ModelShape] = {
    "llama-3.2-1b": ModelShape(
        vocab_size=32000,
        context_length=4096,
        embedding_length=2048,
        block_count=16,
        feed_forward_length=8192,
        head_count=32,
        head_count_kv=8,
        head_dim=64,
        rms_epsilon=1e-5,
        rope_freq_base=500000.0,
        tied=True,
        router_hidden=16,
        budgets=default_budgets(),
        static_order=_in_file_order(16),
    ),
    "tinyllama-1.1b": ModelShape(
        vocab_size=32000,
        context_length=4096,
        embedding_length=2048,
        block_count=22,
        feed_forward_length=5632,
        head_count=32,
        head_count_kv=4,
        head_dim=64,
        rms_epsilon=1e-5,
        rope_freq_base=10000.0,
        tied=False,
        router_hidden=16,
        budgets=default_budgets(),
        static_order=_in_file_order(22),
    ),
    "small-32k": _SMALL,
    "small-32k-window": replace(_SMALL, sliding_window=1024, sliding_window_pattern=(1, 1, 0) * 2),
    "llama-3-8b": ModelShape(
        vocab_size=128256,
        context_length=8192,
        embedding_length=4096,
        block_count=32,
        feed_forward_length=14336,
        head_count=32,
        head_count_kv=8,
        head_dim=128,
        rms_epsilon=1e-5,
        rope_freq_base=500000.0,
        tied=False,
        router_hidden=16,
        budgets=default_budgets(),
        static_order=_in_file_order(32),
    ),
}

_WEIGHT_STD = 0.02
_NOISE_BYTES = (1 << 22) - 3  # odd, so that neighbouring tiles never repeat in step
_CODE_STD = np.sqrt(4.0**2 / 12)  # of uniform 8-bit codes, in units of the base step s
_INT8_STD = np.sqrt((255**2 - 1) / 12)  # of uniform integers -127..127
_SCORE_GAP = 1.5  # how much less, in standard deviations, each further slice is wanted
_SCORE_SAMPLES = 4096


class SyntheticSource:
    """Random data for every tensor of a shape; the same seed gives the same bytes. Memory: one tensor and 4 MB."""

    def __init__(self, shape: ModelShape, seed: int = 0) -> None:
        for name in (*LINEARS, "token_embd"):
            rows, columns = shape.linear(name)
            if rows % TILE_ROWS or columns % GROUP_SIZE:
                sizes = f"multiples of {TILE_ROWS} and {GROUP_SIZE}"
                raise ExportError(f"{name}: expected rows and columns that are {sizes}, found {rows} and {columns}")
        self._shape = shape
        self._seed = seed
        self._noise = np.random.default_rng(seed).integers(-128, 128, _NOISE_BYTES, np.int8)

    def read(self, tensor: PlannedTensor) -> np.ndarray:
        """The data of `tensor`."""
        if tensor.module.startswith("router_"):
            return self._router(tensor)
        generator = self._generator(tensor.name)
        if tensor.slice_index is not None:
            start = int(generator.integers(_NOISE_BYTES))
            return np.resize(np.roll(self._noise, -start), tensor.shape)
        if tensor.part == SUFFIX_SCALE_OFFSET:
            tiles, groups = tensor.shape[:2]
            spread = generator.uniform(0.75, 1.25, (tiles, groups, TILE_ROWS)).astype(np.float32)
            scales = (spread * (_WEIGHT_STD / _CODE_STD)).astype(np.float16)
            return np.stack([scales, 2 * scales], axis=2)  # zero point 2: the codes are centred on weight 0
        if tensor.module in (TENSOR_ROPE, TENSOR_ROPE_LOCAL):
            exponents = np.arange(tensor.shape[0], dtype=np.float64) / tensor.shape[0]
            return (self._shape.rope_freq_base**-exponents).astype(np.float32)
        if tensor.module.endswith(SUFFIX_BIAS):
            return generator.normal(0.0, _WEIGHT_STD, tensor.shape).astype(np.float32)
        return np.ones(tensor.shape, np.float32)

    def _generator(self, name: str) -> np.random.Generator:
        return np.random.default_rng([self._seed, crc32(name.encode())])

    def _router(self, tensor: PlannedTensor) -> np.ndarray:
        """One part of a router whose score is close to N(0, 1) for slice 2 and _SCORE_GAP less for each next slice.

        For inputs without structure the hidden sums are normal; thresholds are quantiles of scores sampled so.
        """
        assert tensor.block is not None
        point, hidden = tensor.module.removeprefix("router_"), self._shape.router_hidden
        generator = self._generator(router_tensor(tensor.block, point, ""))
        columns = self._shape.router_columns(point)
        if tensor.part == "hidden":
            return generator.integers(-127, 128, (hidden, columns), np.int8)
        if tensor.part == "hidden_scale":
            return np.full(hidden, 1 / (_INT8_STD * np.sqrt(columns)), np.float32)
        if tensor.part == "hidden_bias":
            return np.zeros(hidden, np.float32)

        linears, gates = self._shape.router_linears(point), SLICE_COUNT - 1
        weights = generator.standard_normal((linears, hidden))
        units = np.maximum(generator.standard_normal((_SCORE_SAMPLES, hidden)), 0)
        weights /= (units @ weights.T).std(axis=0)[:, None]
        gaps = _SCORE_GAP * np.arange(gates)
        biases = -(units @ weights.T).mean(axis=0)[:, None] - gaps  # [linears, gates]
        if tensor.part == "head":
            head = np.zeros(tensor.shape, np.float32)
            head[:, :, :hidden] = weights[:, None, :]
            return head
        if tensor.part == "head_bias":
            return biases.astype(np.float32)
        # All gates share one cut: the share of scores above it is the share of residual slices that are read.
        scores = (units @ weights.T)[:, :, None] + biases
        cuts = np.quantile(scores, 1 - (np.asarray(self._shape.budgets) - 2) / (2 * gates), axis=(0, 2)).T
        cuts[:, 0] += 1
        cuts[:, -1] -= 1
        return np.repeat(cuts[:, None, :], gates, axis=1).astype(np.float32)


def synthetic_vocabulary() -> Vocabulary:
    """A tokenizer of the 256 bytes and a begin-of-text token, no end token: a measured run has the length asked for."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|begin_of_text|>")])
    return Vocabulary(tokenizer.to_str(), bos_token=len(alphabet), add_bos=True)
