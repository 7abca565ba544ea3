"""Names in a checkpoint, by the file's own names (export/keys.py)."""

from __future__ import annotations

from export.keys import (
    TENSOR_ATTN_NORM,
    TENSOR_ATTN_POST_NORM,
    TENSOR_EMBEDDING,
    TENSOR_FFN_NORM,
    TENSOR_FFN_POST_NORM,
    TENSOR_K_NORM,
    TENSOR_OUTPUT,
    TENSOR_OUTPUT_NORM,
    TENSOR_Q_NORM,
    TENSOR_ROPE,
    TENSOR_ROPE_LOCAL,
)

_BLOCK_MODULES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_q.bias": "self_attn.q_bias",
    "attn_k.bias": "self_attn.k_bias",
    "attn_v.bias": "self_attn.v_bias",
    "attn_output.bias": "self_attn.o_bias",
    TENSOR_Q_NORM: "self_attn.q_norm.weight",
    TENSOR_K_NORM: "self_attn.k_norm.weight",
    TENSOR_ATTN_NORM: "input_layernorm.weight",
    TENSOR_FFN_NORM: "post_attention_layernorm.weight",
}
# With norms of what a block adds, one name means another norm.
_POST_NORM_MODULES = {
    TENSOR_ATTN_POST_NORM: "post_attention_layernorm.weight",
    TENSOR_FFN_NORM: "pre_feedforward_layernorm.weight",
    TENSOR_FFN_POST_NORM: "post_feedforward_layernorm.weight",
}
_OUTER_MODULES = {
    TENSOR_EMBEDDING: "model.embed_tokens",
    TENSOR_OUTPUT: "lm_head",
    TENSOR_OUTPUT_NORM: "model.norm.weight",
    TENSOR_ROPE: "model.rotary_emb.inv_freq",
    TENSOR_ROPE_LOCAL: "model.rotary_emb.inv_freq_local",
}


def checkpoint_name(module: str, block: int | None, post_norms: bool) -> str:
    """Path in the checkpoint: ("attn_q", 3) -> `model.layers.3.self_attn.q_proj`; routers keep their name."""
    if block is None:
        return _OUTER_MODULES[module]
    modules = _BLOCK_MODULES | _POST_NORM_MODULES if post_norms else _BLOCK_MODULES
    return f"model.layers.{block}.{modules.get(module, module)}"
