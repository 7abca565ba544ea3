"""The modules of a Llama block with the runtime's arithmetic, in the places and with the calls of transformers.

With slices in the linears and these around them, a transformers model gives the runtime's bits (mobiquant.arithmetic);
only how a model is put together and generates stays transformers' own.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedConfig

from mobiquant.arithmetic import causal_attention, rms_norm, rotate, silu_times


class ExactNorm(nn.Module):
    """RMS norm of a residual stream. weight float32 [width]."""

    def __init__(self, weight: nn.Parameter, epsilon: float):
        super().__init__()
        self.weight = weight
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.epsilon)


class ExactRotary(nn.Module):
    """Cosine and sine of positions int [batch, tokens]: two float32 [batch, tokens, head_dim / 2], for ExactAttention.

    Buffer inv_freq float32 [head_dim / 2], read from the checkpoint.
    """

    def __init__(self, head_dim: int):
        super().__init__()
        self.register_buffer("inv_freq", torch.empty(head_dim // 2, dtype=torch.float32))

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = (position_ids[..., None].float() * self.inv_freq).double()
        return angles.cos().float(), angles.sin().float()


class ExactAttention(nn.Module):
    """Causal attention over float16 keys and values. The linears are those of the module that it replaces."""

    def __init__(self, replaced: nn.Module, config: PreTrainedConfig, index: int):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = replaced.q_proj, replaced.k_proj, replaced.v_proj
        self.o_proj = replaced.o_proj
        self._head_dim = config.head_dim
        self._index = index
        self._scale = float(np.float32(1.0) / np.sqrt(np.float32(config.head_dim)))

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """hidden_states: float32 [batch, tokens, width]. attention_mask: None, or bool [batch, 1, tokens, positions]
        with padding on the left alone."""
        query, key, value = (
            linear(hidden_states).unflatten(-1, (-1, self._head_dim)).transpose(1, 2)
            for linear in (self.q_proj, self.k_proj, self.v_proj)
        )
        cosine, sine = (table.unsqueeze(1) for table in position_embeddings)
        query, key = rotate(query, cosine, sine), rotate(key, cosine, sine)
        key, value = key.half().float(), value.half().float()
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self._index)
        shared = query.shape[1] // key.shape[1]
        key, value = (cached.repeat_interleave(shared, dim=1) for cached in (key, value))
        attended = torch.zeros_like(query)
        for row, padding in enumerate(_padding(attention_mask, len(query))):
            first = max(0, padding - (key.shape[2] - query.shape[2]))  # padding among the queries, left as zeros
            attended[row, :, first:] = causal_attention(
                query[row, :, first:], key[row, :, padding:], value[row, :, padding:], self._scale
            )
        return self.o_proj(attended.transpose(1, 2).flatten(2)), None


class ExactMlp(nn.Module):
    """silu(gate) · up, then down. The linears are those of the module that it replaces."""

    def __init__(self, replaced: nn.Module):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = replaced.gate_proj, replaced.up_proj, replaced.down_proj

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(silu_times(self.gate_proj(x), self.up_proj(x)))


def _padding(mask: Tensor | None, batch: int) -> list[int]:
    """Positions before the first that the last token of each row sees. Raises ValueError for another kind of mask."""
    if mask is None:
        return [0] * batch
    seen = mask[:, 0, -1] if mask.dtype == torch.bool else mask[:, 0, -1] == 0
    counts = seen.sum(-1)
    padding = seen.shape[-1] - counts
    if not all(row[skipped:].all() for row, skipped in zip(seen, padding.tolist(), strict=True)):
        raise ValueError("attention_mask: expected padding on the left alone (padding_side='left'), found another")
    return padding.expand(batch).tolist() if len(padding) == 1 else padding.tolist()
