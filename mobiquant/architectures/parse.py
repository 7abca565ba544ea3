"""From a config.json to a ModelSpec.

What would change the arithmetic beyond a ModelSpec is refused by its key. Configurations are read as transformers reads
them, keys that are left out included (tests/test_architectures.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mobiquant.architectures.reader import ConfigReader, UnsupportedModelError
from mobiquant.architectures.rope import read_rope
from mobiquant.architectures.spec import ModelSpec
from mobiquant.architectures.table import ARCHITECTURES

_LLAMA_DEFAULTS = {"bos_token_id": 1, "rope_theta": 10000.0, "tie_word_embeddings": False, "hidden_act": "silu"}
_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
# A model with these has experts, whatever its model_type says.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def parse_config(content: Mapping[str, Any], where: Path | str) -> ModelSpec:
    """The model that config.json describes. Raises UnsupportedModelError when the format cannot hold it."""
    model_type = content.get("model_type")
    if model_type not in ARCHITECTURES:
        supported = ", ".join(ARCHITECTURES)
        raise UnsupportedModelError(f"{where}: model_type: expected one of {supported}, found {model_type}")
    row = ARCHITECTURES[model_type]
    reader = ConfigReader(content, {**_LLAMA_DEFAULTS, **row.defaults}, where)
    for key, value in row.required.items():
        reader.expect(key, value)
    for key in _EXPERTS:
        reader.expect(key, 0)
    blocks, width, heads = (reader.integer(key) for key in ("num_hidden_layers", "hidden_size", "num_attention_heads"))
    heads_kv = reader.integer("num_key_value_heads", default=heads)
    if heads % heads_kv:
        raise reader.error("num_key_value_heads", f"a divisor of num_attention_heads {heads}", heads_kv)
    head_dim = reader.integer("head_dim", default=max(width // heads, 1))
    positions = reader.integer("max_position_embeddings")
    rope_theta, rotary_dim, scaling = read_rope(reader, row.rope_kinds, row.partial_rotary, head_dim, positions)
    stretched = int(scaling.factor * scaling.original) if scaling.kind in ("dynamic", "yarn") else 0
    activation_key = "hidden_activation" if row.gemma else "hidden_act"
    activation = "gelu_pytorch_tanh" if row.gemma else "silu"
    if reader.get(activation_key) != activation:
        raise reader.error(activation_key, repr(activation), reader.get(activation_key))
    attention_bias = bool(reader.get("attention_bias"))
    scored = reader.number("query_pre_attn_scalar") if row.gemma else head_dim
    if scored <= 0:
        raise reader.error("query_pre_attn_scalar", "a number above 0", scored)
    return ModelSpec(
        model_type=model_type,
        base_architecture=row.name,
        vocab_size=reader.integer("vocab_size"),
        hidden_size=width,
        intermediate_size=reader.integer("intermediate_size"),
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=heads_kv,
        head_dim=head_dim,
        max_position_embeddings=positions,
        rms_norm_eps=reader.number("rms_norm_eps"),
        tie_word_embeddings=bool(reader.get("tie_word_embeddings")),
        bos_token_id=reader.get("bos_token_id"),
        context_length=max(positions, stretched),
        rope_theta=rope_theta,
        rope_scaling=scaling,
        rotary_dim=rotary_dim,
        ropes=row.ropes(reader, blocks),
        windows=row.windows(reader, blocks),
        activation=_ACTIVATIONS[activation],
        attention_scale=float(np.float32(1.0) / np.sqrt(np.float32(scored))),
        attention_softcap=_cap(reader, "attn_logit_softcapping") if row.gemma else 0.0,
        output_softcap=_cap(reader, "final_logit_softcapping") if row.gemma else 0.0,
        embedding_scale=float(np.float32(math.sqrt(width))) if row.gemma else 1.0,
        qkv_bias=attention_bias if row.qkv_bias is None else row.qkv_bias,
        output_bias=attention_bias if row.qkv_bias is None else False,
        qk_norm=row.qk_norm,
        post_norms=row.gemma,
        norm_offset=int(row.gemma),
        fused=row.fused,
    )


def _cap(reader: ConfigReader, key: str) -> float:
    """0 when there is none; float32, as the file has it."""
    if reader.get(key) is None:
        return 0.0
    value = reader.number(key)
    if value <= 0:
        raise reader.error(key, "a number above 0", value)
    return float(np.float32(value))
