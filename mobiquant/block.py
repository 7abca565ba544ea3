"""One decoder block in full precision, for every architecture: what calibration trains and measures.

Owns the forward pass in torch's own operations, with gradients; the runtime's arithmetic is in mobiquant.exact. Linears
have no bias of their own: the block adds it, so that a recipe may put any module in a linear's place.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from mobiquant.architectures import LOCAL_ROPE, MAIN_ROPE, NO_ROPE, ModelSpec


class Norm(nn.Module):
    """x / rms(x) · weight over the last dimension."""

    def __init__(self, width: int, epsilon: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.epsilon) * self.weight


class DecoderBlock(nn.Module):
    """Block `index` of a model. Modules have the names of ModelSpec.block_vectors and mobiquant.checkpoint.LINEARS."""

    def __init__(self, spec: ModelSpec, index: int):
        super().__init__()
        self.spec, self.index = spec, index
        width, inner, dim = spec.hidden_size, spec.intermediate_size, spec.head_dim
        queries, keys = spec.num_attention_heads * dim, spec.num_key_value_heads * dim
        self.self_attn, self.mlp = nn.Module(), nn.Module()
        for name, rows, columns in (
            ("q", queries, width),
            ("k", keys, width),
            ("v", keys, width),
            ("o", width, queries),
        ):
            self.self_attn.add_module(f"{name}_proj", nn.Linear(columns, rows, bias=False))
        for name, rows, columns in (("gate", inner, width), ("up", inner, width), ("down", width, inner)):
            self.mlp.add_module(f"{name}_proj", nn.Linear(columns, rows, bias=False))
        for name, length in spec.block_vectors().items():
            owner = self.self_attn if name.startswith("self_attn.") else self
            name = name.removeprefix("self_attn.")
            if name.endswith(".weight"):
                owner.add_module(name.removesuffix(".weight"), Norm(length, spec.rms_norm_eps))
            else:
                owner.register_parameter(name, nn.Parameter(torch.empty(length)))

    def forward(self, x: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
        """x: [windows, tokens, width]; position_embeddings: cosines and sines [tables, tokens, rotated / 2]."""
        attention, mlp = self.self_attn, self.mlp
        normed = self.input_layernorm(x)
        query, key = (self._turned(part, normed, position_embeddings) for part in ("q", "k"))
        value = self._heads(self._biased("v", attention.v_proj(normed)))
        attended = self._attend(query, key, value).transpose(1, 2).flatten(2)
        x = x + self._post("post_attention_layernorm", self._biased("o", attention.o_proj(attended)))
        normed = self.get_submodule(self.spec.ffn_norm)(x)
        gate = mlp.gate_proj(normed)
        gelu = self.spec.activation == "gelu_tanh"
        gate = functional.gelu(gate, approximate="tanh") if gelu else functional.silu(gate)
        return x + self._post("post_feedforward_layernorm", mlp.down_proj(gate * mlp.up_proj(normed)))

    def _biased(self, part: str, y: Tensor) -> Tensor:
        bias = getattr(self.self_attn, f"{part}_bias", None)
        return y if bias is None else y + bias

    def _post(self, name: str, y: Tensor) -> Tensor:
        return self.get_submodule(name)(y) if self.spec.post_norms else y

    def _heads(self, y: Tensor) -> Tensor:
        """[windows, tokens, heads · head_dim] -> [windows, heads, tokens, head_dim]."""
        return y.unflatten(-1, (-1, self.spec.head_dim)).transpose(1, 2)

    def _turned(self, part: str, normed: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
        """Queries or keys as they meet in the scores."""
        attention = self.self_attn
        heads = self._heads(self._biased(part, attention.get_submodule(f"{part}_proj")(normed)))
        if self.spec.qk_norm:
            heads = attention.get_submodule(f"{part}_norm")(heads)
        rope = self.spec.ropes[self.index]
        if rope == NO_ROPE:
            return heads
        cosine, sine = (table[rope - MAIN_ROPE] for table in position_embeddings)
        half = cosine.shape[-1]
        a, b, rest = heads.split((half, half, heads.shape[-1] - 2 * half), dim=-1)
        return torch.cat((a * cosine - b * sine, b * cosine + a * sine, rest), dim=-1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Causal attention, [windows, heads, tokens, head_dim]."""
        spec, window, tokens = self.spec, self.spec.windows[self.index], query.shape[2]
        seen = None
        if spec.attention_softcap or 0 < window < tokens:
            seen = seen_positions(tokens, tokens, window, query.device)
        return attend(query, key, value, spec.attention_scale, spec.attention_softcap, seen)


def seen_positions(tokens: int, positions: int, window: int, device: torch.device) -> Tensor:
    """Which of `positions` each of the last `tokens` of them sees: bool [tokens, positions]. window 0: all before."""
    before = positions - tokens
    seen = torch.ones(tokens, positions, dtype=torch.bool, device=device).tril(before)
    return seen.triu(before - window + 1) if window else seen


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float, seen: Tensor | None) -> Tensor:
    """Softmax attention: query [..., heads, tokens, head_dim], key and value of as many heads or of a divisor of them.

    seen: as from seen_positions; None: all up to the token's own.
    """
    if not softcap:
        options = {"is_causal": seen is None, "scale": scale, "enable_gqa": query.shape[-3] != key.shape[-3]}
        return functional.scaled_dot_product_attention(query, key, value, seen, **options)
    key, value = (part.repeat_interleave(query.shape[-3] // part.shape[-3], dim=-3) for part in (key, value))
    scores = soft_capped(query @ key.transpose(-1, -2) * scale, softcap).masked_fill(~seen, -torch.inf)
    return scores.softmax(-1) @ value


def soft_capped(x: Tensor, cap: float) -> Tensor:
    """cap · tanh(x / cap); x itself when cap is 0."""
    return cap * torch.tanh(x / cap) if cap else x


def rotary_tables(spec: ModelSpec) -> int:
    """How many sets of rotary frequencies the model has."""
    return 2 if LOCAL_ROPE in spec.ropes else 1
