"""The reference model: a calibrated checkpoint run in torch with the runtime's arithmetic, bit for bit.

This is the second, independent statement of what docs/format.md says; tests compare the C runtime with it. No KV cache:
a call sees one whole sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedConfig

from mobiquant.arithmetic import causal_attention, rms_norm, rope_tables, rotate, silu_times
from mobiquant.checkpoint import EMBEDDING, FINAL_NORM, HEAD, LINEARS, ROTARY_FREQUENCIES, STATIC_ORDER, open_checkpoint
from mobiquant.linear import Precision, SliceEmbedding, SliceLinear
from mobiquant.models import linear_shapes, load_block, load_slices, parse_config
from mobiquant.packing import SLICE_BITS, SLICE_COUNT
from mobiquant.static import RAISES, static_depths


class ReferenceModel:
    """tokens -> logits at any depth or average bits; starts at full depth.

    exact: attention in the runtime's order of sums, so that the logits are the runtime's. Without it torch's own
    attention is used: many times faster on long windows, and as good, but equal to rounding only.
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
        self._scale = float(np.float32(1.0) / np.sqrt(np.float32(config.head_dim)))
        self._sizes = np.array([rows * columns for rows, columns in linear_shapes(config).values()])

    def set_depth(self, depth: int) -> None:
        """One depth, 1..4, for every token and routed linear."""
        if depth not in range(1, SLICE_COUNT + 1):
            raise ValueError(f"depth: expected 1..{SLICE_COUNT}, found {depth}")
        self._precision.depth = depth

    def set_average_bits(self, bits: float) -> None:
        """Routed: average bits per routed weight, 2..8."""
        _check_bits("average bits", bits)
        self._precision.depth, self._precision.average_bits = None, float(bits)

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
        recorded = self._precision.recorded
        blocks = range(len(self._blocks))
        stacked = torch.stack([torch.stack([recorded[b, i] for i in range(len(LINEARS))], 1) for b in blocks], 1)
        return stacked.cpu().numpy()

    @property
    def bits_read(self) -> float:
        """Average bits per routed weight of the last call."""
        return float(SLICE_BITS * (self.depths.mean(axis=(0, 1)) @ self._sizes) / self._sizes.sum())

    @torch.no_grad()
    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """float32 [n, vocab] for tokens int [n]."""
        x = self._embedding(torch.from_numpy(tokens.astype(np.int64)).to(self._norm.device))
        tables = rope_tables(self._inverse_frequencies, len(tokens))
        for block in self._blocks:
            x = self._run_block(block, x, *tables)
        return self._head(rms_norm(x, self._norm, self.config.rms_norm_eps)).cpu().numpy()

    def _run_block(self, block: nn.Module, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """One decoder block on the residual stream x, float32 [tokens, width]."""
        attention, mlp = block.self_attn, block.mlp
        normed = rms_norm(x, block.input_layernorm.weight, self.config.rms_norm_eps)
        query, key, value = (
            linear(normed).unflatten(-1, (-1, self.config.head_dim)).transpose(0, 1)
            for linear in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        query, key = rotate(query, cosine, sine), rotate(key, cosine, sine)
        # The runtime's KV cache is float16.
        shared = query.shape[0] // key.shape[0]
        key, value = (cached.half().float().repeat_interleave(shared, dim=0) for cached in (key, value))
        x = x + attention.o_proj(self._attend(query, key, value).transpose(0, 1).flatten(1))
        normed = rms_norm(x, block.post_attention_layernorm.weight, self.config.rms_norm_eps)
        return x + mlp.down_proj(silu_times(mlp.gate_proj(normed), mlp.up_proj(normed)))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if self._exact:
            return causal_attention(query, key, value, self._scale)
        batch = (part.unsqueeze(0) for part in (query, key, value))
        return functional.scaled_dot_product_attention(*batch, is_causal=True, scale=self._scale).squeeze(0)


def _check_bits(name: str, bits: float) -> None:
    if not SLICE_BITS <= bits <= SLICE_BITS * SLICE_COUNT:
        raise ValueError(f"{name}: expected {SLICE_BITS}..{SLICE_BITS * SLICE_COUNT}, found {bits}")


def open_reference(path: Path | str, device: str = "cpu", *, exact: bool = True) -> ReferenceModel:
    """Open a checkpoint folder. Raises CheckpointError or UnsupportedModelError."""
    checkpoint = open_checkpoint(path)
    config = parse_config(checkpoint.config, checkpoint.path)
    quantization, read = checkpoint.quantization, checkpoint.tensor
    precision = Precision(quantization.router.budgets)
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
    )
