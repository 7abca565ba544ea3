"""The reference model: a calibrated checkpoint run in torch with the runtime's arithmetic, bit for bit.

This is the second, independent statement of what docs/format.md says; tests compare the C runtime with it. A call sees
one whole sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedConfig

from mobiquant.arithmetic import causal_attention, rms_norm, rope_tables, rotate, round_to_int8, silu_times
from mobiquant.checkpoint import EMBEDDING, FINAL_NORM, HEAD, LINEARS, ROTARY_FREQUENCIES, STATIC_ORDER, open_checkpoint
from mobiquant.correction import RunningCorrection
from mobiquant.linear import Precision, SliceEmbedding, SliceLinear
from mobiquant.models import linear_shapes, load_block, load_slices, parse_config
from mobiquant.packing import SLICE_BITS, SLICE_COUNT
from mobiquant.static import RAISES, static_depths
from mobiquant.windows import sliding_windows


class ReferenceModel:
    """tokens -> logits at any depth or average bits; starts at full depth.

    exact: products and attention in the runtime's order of sums, so that the logits are the runtime's. Without it
    torch's own are used: many times faster, and as good, but equal to rounding only.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        precision: Precision,
        embedding: SliceEmbedding,
        blocks: Sequence[nn.Module],
        norm: Tensor,
        head: SliceLinear,
        inverse_frequencies: Tensor,
        static_order: np.ndarray | None,
        exact: bool,
        cache_type: str,
    ) -> None:
        self.config = config
        self._precision = precision
        self._embedding = embedding
        self._blocks = blocks
        self._norm = norm
        self._head = head
        self._default_output_depth = head.depth
        self._inverse_frequencies = inverse_frequencies
        self._static_order = static_order
        self._exact = exact
        self._cache_type = cache_type
        self._average_bits = float(SLICE_BITS * SLICE_COUNT)
        self._depths: list[np.ndarray] = []
        self._windows = sliding_windows(config.to_dict(), len(blocks))
        self._scale = float(np.float32(1.0) / np.sqrt(np.float32(config.head_dim)))
        self._sizes = np.array([rows * columns for rows, columns in linear_shapes(config).values()])

    def set_depth(self, depth: int) -> None:
        """One depth, 1..4, for every token and routed linear."""
        if depth not in range(1, SLICE_COUNT + 1):
            raise ValueError(f"depth: expected 1..{SLICE_COUNT}, found {depth}")
        self._precision.depth = depth

    def set_average_bits(self, bits: float) -> None:
        """Routed: average bits per routed weight, 2..8, held by the running correction."""
        _check_bits("average bits", bits)
        self._precision.depth, self._average_bits = None, float(bits)

    def set_static_bits(self, bits: float) -> None:
        """One depth per linear, 2..8 bits on average. Raises ValueError when the checkpoint has no static order."""
        _check_bits("static bits", bits)
        if self._static_order is None:
            raise ValueError(f"static bits: expected tensor {STATIC_ORDER} in the checkpoint, found nothing")
        depths = static_depths(self._static_order, np.tile(self._sizes, len(self._blocks)), bits)
        places = ((block, linear) for block in range(len(self._blocks)) for linear in range(len(LINEARS)))
        self._precision.depth = dict(zip(places, depths.tolist(), strict=True))

    def set_output_depth(self, depth: int) -> None:
        """Depth of the output head, 1..4; 0: the checkpoint's default."""
        if depth not in range(SLICE_COUNT + 1):
            raise ValueError(f"output depth: expected 0..{SLICE_COUNT}, found {depth}")
        self._head.depth = depth or self._default_output_depth

    @property
    def depths(self) -> np.ndarray:
        """Depths read by the last call: uint8 [tokens, blocks, 7], linears in the order of LINEARS."""
        return np.concatenate(self._depths)

    @property
    def bits_read(self) -> float:
        """Average bits per routed weight of the last call."""
        depths = self.depths
        read = SLICE_BITS * (depths.sum(axis=(0, 1), dtype=np.int64) @ self._sizes)
        return float(read) / (float(self._sizes.sum() * len(self._blocks)) * len(depths))

    @torch.no_grad()
    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """float32 [n, vocab] for tokens int [n]."""
        embedded = self._embedding(torch.from_numpy(tokens.astype(np.int64)).to(self._norm.device))
        caches = [_Cache(self._cache_type) for _ in self._blocks]
        outputs: list[Tensor] = []
        self._depths = []
        for begin, end in self._stretches(len(tokens)):
            x = embedded[begin:end]
            cosine, sine = (table[begin:end] for table in rope_tables(self._inverse_frequencies, end))
            for block, cache, window in zip(self._blocks, caches, self._windows, strict=True):
                x = self._run_block(block, x, cosine, sine, cache, window)
            outputs.append(x)
            self._depths.append(self._recorded())
        return self._head(rms_norm(torch.cat(outputs), self._norm, self.config.rms_norm_eps)).cpu().numpy()

    def _stretches(self, tokens: int) -> Iterator[tuple[int, int]]:
        """(begin, end) of the tokens to run next, with the precision set for them; reads what they took afterwards."""
        if self._precision.depth is not None:
            yield 0, tokens
            return
        correction, begin = RunningCorrection(self._average_bits), 0
        while begin < tokens:
            end = tokens if correction.end is None else min(tokens, correction.end)
            self._precision.average_bits = correction.bits
            yield begin, end
            begin = end
            if begin == correction.end:
                correction.finish_stretch(self.bits_read)

    def _recorded(self) -> np.ndarray:
        """Depths of the tokens that ran last, as in `depths`."""
        recorded, blocks = self._precision.recorded, range(len(self._blocks))
        stacked = torch.stack([torch.stack([recorded[b, i] for i in range(len(LINEARS))], 1) for b in blocks], 1)
        return stacked.cpu().numpy()

    def _run_block(
        self, block: nn.Module, x: Tensor, cosine: Tensor, sine: Tensor, cache: _Cache, window: int
    ) -> Tensor:
        """One decoder block on the residual stream x, float32 [tokens, width], after the tokens in `cache`."""
        attention, mlp = block.self_attn, block.mlp
        normed = rms_norm(x, block.input_layernorm.weight, self.config.rms_norm_eps)
        query, key, value = (
            linear(normed).unflatten(-1, (-1, self.config.head_dim)).transpose(0, 1)
            for linear in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        query, key = rotate(query, cosine, sine), rotate(key, cosine, sine)
        shared = query.shape[0] // key.shape[0]
        key, value = (cached.repeat_interleave(shared, dim=0) for cached in cache.extend(key, value))
        x = x + attention.o_proj(self._attend(query, key, value, window).transpose(0, 1).flatten(1))
        normed = rms_norm(x, block.post_attention_layernorm.weight, self.config.rms_norm_eps)
        return x + mlp.down_proj(silu_times(mlp.gate_proj(normed), mlp.up_proj(normed)))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, window: int) -> Tensor:
        if self._exact:
            return causal_attention(query, key, value, self._scale, window)
        before = key.shape[1] - query.shape[1]
        seen = torch.ones(query.shape[1], key.shape[1], dtype=torch.bool, device=query.device).tril(before)
        seen = seen.triu(before - window + 1) if window else seen
        batch = (part.unsqueeze(0) for part in (query, key, value))
        return functional.scaled_dot_product_attention(*batch, attn_mask=seen, scale=self._scale).squeeze(0)


class _Cache:
    """Keys and values of one block so far, rounded as in the runtime, float32 [kv heads, positions, head_dim]."""

    def __init__(self, cache_type: str) -> None:
        self._rounded = round_to_int8 if cache_type == "q8_0" else lambda part: part.half().float()
        self._parts: tuple[Tensor, ...] = ()

    def extend(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """Append keys and values of new tokens, float32; returns all of them."""
        new = tuple(self._rounded(part) for part in parts)
        self._parts = tuple(torch.cat(pair, 1) for pair in zip(self._parts, new, strict=True)) if self._parts else new
        return self._parts


def _check_bits(name: str, bits: float) -> None:
    if not SLICE_BITS <= bits <= SLICE_BITS * SLICE_COUNT:
        raise ValueError(f"{name}: expected {SLICE_BITS}..{SLICE_BITS * SLICE_COUNT}, found {bits}")


def open_reference(
    path: Path | str, device: str = "cpu", *, exact: bool = True, cache_type: str = "f16"
) -> ReferenceModel:
    """Open a checkpoint folder. cache_type: "f16" or "q8_0". Raises CheckpointError or UnsupportedModelError."""
    checkpoint = open_checkpoint(path)
    config = parse_config(checkpoint.config, checkpoint.path)
    quantization, read = checkpoint.quantization, checkpoint.tensor
    precision = Precision(quantization.router.budgets, exact=exact)
    blocks = [
        load_block(read, config, index, quantization.router.hidden_size, precision).to(device)
        for index in range(config.num_hidden_layers)
    ]
    embedding = load_slices(read, EMBEDDING, config.vocab_size, config.hidden_size)
    tied = config.tie_word_embeddings
    output = embedding if tied else load_slices(read, HEAD, config.vocab_size, config.hidden_size)
    norm = torch.from_numpy(read(FINAL_NORM, np.float32, (config.hidden_size,)))
    frequencies = torch.from_numpy(read(ROTARY_FREQUENCIES, np.float32, (config.head_dim // 2,)))
    order = None
    if checkpoint.has(STATIC_ORDER):
        order = read(STATIC_ORDER, np.int32, (RAISES * len(LINEARS) * config.num_hidden_layers,))
    return ReferenceModel(
        config,
        precision,
        SliceEmbedding(embedding, quantization.embedding_depth).to(device),
        blocks,
        norm.to(device),
        SliceLinear(output, quantization.output_depth).to(device),
        frequencies.to(device),
        order,
        exact,
        cache_type,
    )
