"""The forward pass of a block with the runtime's arithmetic, and modules that have the places and calls of
transformers.

With slices in the linears and these around them, a transformers model gives the runtime's bits (mobiquant.arithmetic);
only how a model is put together and generates stays transformers' own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Cache

from mobiquant.architectures import NO_ROPE, RopeScaling
from mobiquant.arithmetic import (
    ATTENTION_CHUNK,
    causal_attention,
    gelu_times,
    rms_norm,
    rope_at,
    rotate,
    silu_times,
    soft_cap,
)
from mobiquant.block import DecoderBlock

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class ExactNorm(nn.Module):
    """RMS norm of a residual stream. weight float32 [width]."""

    def __init__(self, weight: nn.Parameter, epsilon: float):
        super().__init__()
        self.weight = weight
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.epsilon)


class ExactRotary(nn.Module):
    """Cosine and sine of positions int [batch, tokens]: two float32 [batch, tokens, rotated / 2], for ExactBlock.

    Buffers inv_freq and, with two tables, inv_freq_local, float32 [rotated / 2], read from the checkpoint.
    """

    def __init__(self, rotary_dim: int, tables: int, scaling: RopeScaling):
        super().__init__()
        self._scaling = scaling
        for name in ("inv_freq", "inv_freq_local")[:tables]:
            self.register_buffer(name, torch.empty(rotary_dim // 2, dtype=torch.float32))

    def forward(self, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> tuple[Tensor, Tensor]:
        """layer_type: which kind of block asks, where the tables differ."""
        if layer_type == "sliding_attention":
            return rope_at(self.inv_freq_local, position_ids)
        return rope_at(self.inv_freq, position_ids, self._scaling)


def run_block(
    block: DecoderBlock, x: Tensor, position_embeddings: tuple[Tensor, Tensor] | None, attend: Attend
) -> Tensor:
    """One decoder block, with the runtime's arithmetic, on the residual stream x, float32 [..., tokens, width].

    position_embeddings: cosines and sines of the block's rotary table, [tokens, rotated / 2] with the dimensions that x
    has before and one for the heads; attend: from queries, keys and values [..., heads, tokens, head_dim] of the tokens
    to what the heads saw of them and of all before.
    """
    spec, attention, mlp = block.spec, block.self_attn, block.mlp

    def norm(name: str, y: Tensor) -> Tensor:
        return rms_norm(y, block.get_parameter(f"{name}.weight"), spec.rms_norm_eps)

    def biased(part: str, y: Tensor) -> Tensor:
        bias = getattr(attention, f"{part}_bias", None)
        return y if bias is None else y + bias

    def heads(part: str) -> Tensor:
        linear = attention.get_submodule(f"{part}_proj")
        return biased(part, linear(normed)).unflatten(-1, (-1, spec.head_dim)).transpose(-3, -2)

    def turned(part: str) -> Tensor:
        result = heads(part)
        if spec.qk_norm:
            result = norm(f"self_attn.{part}_norm", result)
        return result if spec.ropes[block.index] == NO_ROPE else rotate(result, *position_embeddings)

    normed = norm("input_layernorm", x)
    seen = attend(turned("q"), turned("k"), heads("v")).transpose(-3, -2).flatten(-2)
    branch = biased("o", attention.o_proj(seen))
    x = x + (norm("post_attention_layernorm", branch) if spec.post_norms else branch)
    normed = norm(spec.ffn_norm, x)
    activate = gelu_times if spec.activation == "gelu_tanh" else silu_times
    branch = mlp.down_proj(activate(mlp.gate_proj(normed), mlp.up_proj(normed)))
    return x + (norm("post_feedforward_layernorm", branch) if spec.post_norms else branch)


class ExactBlock(nn.Module):
    """A decoder block as transformers calls it: causal attention over float16 keys and values."""

    def __init__(self, block: DecoderBlock):
        super().__init__()
        self.block = block

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        past_key_values: Cache | None = None,
        position_ids: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """hidden_states: float32 [batch, tokens, width]. attention_mask: None, or [batch, 1, tokens, positions], bool
        or 0 where seen, with padding on the left alone. position_ids: [batch or 1, tokens]; a cache that keeps a window
        alone is told by them.
        """
        spec, index = self.block.spec, self.block.index
        window = spec.windows[index]

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            key, value = key.half().float(), value.half().float()
            if past_key_values is not None:
                key, value = past_key_values.update(key, value, index)
            shared = query.shape[1] // key.shape[1]
            key, value = (cached.repeat_interleave(shared, dim=1) for cached in (key, value))
            attended = torch.zeros_like(query)
            for row, padding in enumerate(_padding(attention_mask, len(query))):
                first = max(0, padding - (key.shape[2] - query.shape[2]))  # padding among the queries, left as zeros
                own = [query[row, :, first:], key[row, :, padding:], value[row, :, padding:]]
                if window and position_ids is not None:  # chunks begin where they begin in the whole text
                    gone = int(position_ids[row % len(position_ids), -1]) + 1 - own[1].shape[1]
                    own[1:] = (functional.pad(part, (0, 0, gone % ATTENTION_CHUNK, 0)) for part in own[1:])
                capped = spec.attention_softcap
                attended[row, :, first:] = causal_attention(*own, spec.attention_scale, capped, window)
            return attended

        cosine, sine = (table.unsqueeze(1) for table in position_embeddings)
        return run_block(self.block, hidden_states, (cosine, sine), attend)


class ExactHead(nn.Module):
    """The output head, its logits capped."""

    def __init__(self, linear: nn.Module, cap: float):
        super().__init__()
        self.linear = linear
        self.cap = cap

    def forward(self, x: Tensor) -> Tensor:
        logits = self.linear(x)
        return soft_cap(logits, self.cap) if self.cap else logits


def _padding(mask: Tensor | None, batch: int) -> list[int]:
    """Positions before the first that any token of each row sees. Raises ValueError for another kind of mask."""
    if mask is None:
        return [0] * batch
    seen = (mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] == 0).any(1)
    counts = seen.sum(-1)
    padding = seen.shape[-1] - counts
    if not all(row[skipped:].all() for row, skipped in zip(seen, padding.tolist(), strict=True)):
        raise ValueError("attention_mask: expected padding on the left alone (padding_side='left'), found another")
    return padding.expand(batch).tolist() if len(padding) == 1 else padding.tolist()
