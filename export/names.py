"""Hugging Face module paths of a Llama checkpoint, by the file's own names (export/keys.py)."""

from __future__ import annotations

from export.keys import (
    TENSOR_ATTN_NORM,
    TENSOR_EMBEDDING,
    TENSOR_FFN_NORM,
    TENSOR_OUTPUT,
    TENSOR_OUTPUT_NORM,
    TENSOR_ROPE,
)

_BLOCK_MODULES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    TENSOR_ATTN_NORM: "input_layernorm.weight",
    TENSOR_FFN_NORM: "post_attention_layernorm.weight",
}
_OUTER_MODULES = {
    TENSOR_EMBEDDING: "model.embed_tokens",
    TENSOR_OUTPUT: "lm_head",
    TENSOR_OUTPUT_NORM: "model.norm.weight",
    TENSOR_ROPE: "model.rotary_emb.inv_freq",
}


def checkpoint_name(module: str, block: int | None) -> str:
    """Path in the checkpoint: ("attn_q", 3) -> `model.layers.3.self_attn.q_proj`; routers keep their name."""
    if block is None:
        return _OUTER_MODULES[module]
    return f"model.layers.{block}.{_BLOCK_MODULES.get(module, module)}"
