"""What calibration, reference and export know of a model: its sizes and the flags of its forward pass."""

from __future__ import annotations

from dataclasses import dataclass

# Which rotary table a block uses, as the file has it in mobiquant.rope.pattern.
NO_ROPE, MAIN_ROPE, LOCAL_ROPE = 0, 1, 2


@dataclass(frozen=True)
class RopeScaling:
    """How the rotation of the main table is stretched beyond its frequencies (docs/format.md, Rotation).

    kind: of ROPE_KINDS; the frequencies already tell all of them but dynamic. factor, original: of that one and of
    yarn, how far the context is stretched, and from which length. attention: cosines and sines are multiplied by it.
    """

    kind: str = "default"
    factor: float = 1.0
    original: int = 0
    attention: float = 1.0


NO_SCALING = RopeScaling()


@dataclass(frozen=True)
class ModelSpec:
    """One model's sizes and the flags of its forward pass (docs/format.md, The forward pass). The sizes have the names
    of config.json.

    context_length: positions that the model can be used with; more than max_position_embeddings where the rotation is
    stretched beyond them; ropes: per block NO_ROPE, MAIN_ROPE or LOCAL_ROPE; rotary_dim: leading dimensions of a head
    that are rotated; windows: per block the positions that a token sees, its own counted, 0 for all; post_norms: a norm
    of what attention and feed-forward add; norm_offset: 1 where a norm multiplies by 1 + w; fused: q, k, v are one
    tensor of the model and gate and up another.
    """

    model_type: str
    base_architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    bos_token_id: int | None
    context_length: int
    rope_theta: float
    rope_scaling: RopeScaling
    rotary_dim: int
    ropes: tuple[int, ...]
    windows: tuple[int, ...]
    activation: str
    attention_scale: float
    attention_softcap: float
    output_softcap: float
    embedding_scale: float
    qkv_bias: bool
    output_bias: bool
    qk_norm: bool
    post_norms: bool
    norm_offset: int
    fused: bool

    @property
    def ffn_norm(self) -> str:
        """The norm before the feed-forward, by its name in the model; without post_norms that name means another."""
        return "pre_feedforward_layernorm" if self.post_norms else "post_attention_layernorm"

    def block_vectors(self) -> dict[str, int]:
        """Names and lengths of a block's vectors in a checkpoint, besides those of its linears and routers."""
        width, dim = self.hidden_size, self.head_dim
        queries, keys = self.num_attention_heads * dim, self.num_key_value_heads * dim
        vectors = {"input_layernorm.weight": width, "post_attention_layernorm.weight": width}
        if self.post_norms:
            vectors |= {"pre_feedforward_layernorm.weight": width, "post_feedforward_layernorm.weight": width}
        if self.qk_norm:
            vectors |= {"self_attn.q_norm.weight": dim, "self_attn.k_norm.weight": dim}
        if self.qkv_bias:
            vectors |= {"self_attn.q_bias": queries, "self_attn.k_bias": keys, "self_attn.v_bias": keys}
        if self.output_bias:
            vectors["self_attn.o_bias"] = width
        return vectors

    def source_rows(self, name: str) -> tuple[str, slice]:
        """Where the model keeps a tensor of a block: its name there, and the rows that are meant."""
        if name.endswith("_bias"):
            return name.removesuffix("_bias") + "_proj.bias", slice(None)
        if not self.fused:
            return name, slice(None)
        queries, keys = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        inner = self.intermediate_size
        qkv, gate_up = "self_attn.qkv_proj.weight", "mlp.gate_up_proj.weight"
        return {
            "self_attn.q_proj.weight": (qkv, slice(0, queries)),
            "self_attn.k_proj.weight": (qkv, slice(queries, queries + keys)),
            "self_attn.v_proj.weight": (qkv, slice(queries + keys, queries + 2 * keys)),
            "mlp.gate_proj.weight": (gate_up, slice(0, inner)),
            "mlp.up_proj.weight": (gate_up, slice(inner, 2 * inner)),
        }.get(name, (name, slice(None)))
