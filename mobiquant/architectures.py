"""The supported architectures, one row each, and what a config.json says of a model's forward pass (no torch here).

A row says how a `model_type` differs from plain Llama. `parse_config` turns a configuration into a `ModelSpec`, which
is all that calibration, reference and export know of a model; what would change the arithmetic beyond it is refused by
its key. Configurations are read as transformers reads them, keys that are left out included
(tests/test_architectures.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

# Rotary types of the main table, by transformers' names. A local table may have those alone whose frequencies are all
# that there is to them.
ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn")
_LOCAL_ROPE_KINDS = ("default", "linear", "llama3")
# Which rotary table a block uses, as the file has it in mobiquant.rope.pattern.
NO_ROPE, MAIN_ROPE, LOCAL_ROPE = 0, 1, 2

_SLIDING, _FULL = "sliding_attention", "full_attention"
_ORIGINAL = "original_max_position_embeddings"


class UnsupportedModelError(ValueError):
    """The model is not of a kind that the file format and the runtime can hold; the message says what and why."""


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


@dataclass(frozen=True)
class Architecture:
    """How a model_type differs from plain Llama.

    name: in the file; classes: transformers' module and class prefix; defaults: what a key that is left out means, as
    far as it is not Llama's; windows, ropes: per block, from the configuration and the number of blocks; required: keys
    that must have one value, because another one would change the arithmetic; partial_rotary: whether that factor is
    looked at.
    """

    name: str
    classes: tuple[str, str]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    windows: Callable[[_Reader, int], tuple[int, ...]] = lambda _, blocks: (0,) * blocks
    ropes: Callable[[_Reader, int], tuple[int, ...]] = lambda _, blocks: (MAIN_ROPE,) * blocks
    required: Mapping[str, Any] = field(default_factory=dict)
    qkv_bias: bool | None = None  # None: as attention_bias says, which then holds for the output projection too
    qk_norm: bool = False
    rope_kinds: tuple[str, ...] = ROPE_KINDS
    partial_rotary: bool = False
    fused: bool = False
    gemma: bool = False  # post norms, norms by 1 + w, scaled embedding, GELU, query_pre_attn_scalar


class _Reader:
    """A configuration with the defaults of its row; every reading checks the type and names the key."""

    def __init__(self, content: Mapping[str, Any], defaults: Mapping[str, Any], where: Path | str):
        self._content = {**defaults, **content}
        self._where = where

    def of(self, content: Mapping[str, Any]) -> _Reader:
        """Of an object inside this one."""
        return _Reader(content, {}, self._where)

    def error(self, key: str, expected: str, found: object) -> UnsupportedModelError:
        return UnsupportedModelError(f"{self._where}: {key}: expected {expected}, found {found!r}")

    def get(self, key: str) -> Any:
        return self._content.get(key)

    def integer(self, key: str, default: int | None = None, least: int = 1) -> int:
        value = self.get(key) if self.get(key) is not None else default
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(key, "a number of type int", value)
        if value < least:
            raise self.error(key, f"at least {least}", value)
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key) if self.get(key) is not None else default
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.error(key, "a number of type float", value)
        return float(value)

    def expect(self, key: str, value: Any) -> None:
        """The key, when it is there at all, must have this value."""
        found = self.get(key)
        if found is not None and found != value:
            raise self.error(key, repr(value), found)

    def layer_types(self, blocks: int) -> list[str] | None:
        """None when the configuration does not say."""
        kinds = self.get("layer_types")
        if kinds is None:
            return None
        if not isinstance(kinds, list) or len(kinds) != blocks:
            raise self.error("layer_types", f"a list of {blocks}", kinds)
        for kind in kinds:
            if kind not in (_SLIDING, _FULL):
                raise self.error("layer_types", f"{_SLIDING} or {_FULL}", kind)
        return kinds


def _window_everywhere(reader: _Reader, blocks: int) -> tuple[int, ...]:
    """Mistral, Phi-3: one window for every block, or none; what layer_types says is not looked at."""
    kinds = reader.layer_types(blocks)
    window = 0 if reader.get("sliding_window") is None else reader.integer("sliding_window")
    if kinds is not None and set(kinds) != {_SLIDING if window else _FULL}:
        raise reader.error("layer_types", "all layers of one kind, as sliding_window says", kinds)
    return (window,) * blocks


def _window_by_layer(default: Callable[[_Reader, int, int], bool]) -> Callable[[_Reader, int], tuple[int, ...]]:
    """default: whether a block is windowed when layer_types is left out, from its number and the number of blocks."""

    def windows(reader: _Reader, blocks: int) -> tuple[int, ...]:
        kinds = reader.layer_types(blocks)
        windowed = [default(reader, i, blocks) for i in range(blocks)]
        if kinds is not None:
            windowed = [kind == _SLIDING for kind in kinds]
        if not any(windowed):
            return (0,) * blocks
        window = reader.integer("sliding_window")
        return tuple(window if here else 0 for here in windowed)

    return windows


def _qwen_windowed(reader: _Reader, block: int, _: int) -> bool:
    used = reader.get("use_sliding_window") and reader.get("sliding_window") is not None
    return bool(used) and block >= reader.integer("max_window_layers", least=0)


def _qwen_windows(reader: _Reader, blocks: int) -> tuple[int, ...]:
    """transformers forgets the window unless use_sliding_window is set, so layer_types must not ask for it then."""
    kinds = reader.layer_types(blocks)
    if kinds is not None and _SLIDING in kinds and not reader.get("use_sliding_window"):
        raise reader.error("layer_types", f"{_FULL} alone without use_sliding_window", _SLIDING)
    return _window_by_layer(_qwen_windowed)(reader, blocks)


def _smollm3_ropes(reader: _Reader, blocks: int) -> tuple[int, ...]:
    """no_rope_layers holds 1 for a block that IS rotated."""
    rotated = reader.get("no_rope_layers")
    if rotated is None:
        interval = reader.integer("no_rope_layer_interval")
        rotated = [int((i + 1) % interval != 0) for i in range(blocks)]
    if not isinstance(rotated, list) or len(rotated) < blocks or not all(value in (0, 1) for value in rotated):
        raise reader.error("no_rope_layers", f"a list of {blocks} numbers 0 or 1", rotated)
    return tuple(MAIN_ROPE if value else NO_ROPE for value in rotated[:blocks])


def _smollm3_windowed(reader: _Reader, block: int, blocks: int) -> bool:
    used = reader.get("use_sliding_window") and reader.get("sliding_window") is not None
    return bool(used) and _smollm3_ropes(reader, blocks)[block] == NO_ROPE


def _gemma3_windowed(reader: _Reader, block: int, _: int) -> bool:
    return bool((block + 1) % reader.integer("sliding_window_pattern"))


_gemma3_windows = _window_by_layer(_gemma3_windowed)


def _gemma3_ropes(reader: _Reader, blocks: int) -> tuple[int, ...]:
    return tuple(LOCAL_ROPE if window else MAIN_ROPE for window in _gemma3_windows(reader, blocks))


_QWEN_DEFAULTS = {
    "num_key_value_heads": 32,
    "bos_token_id": None,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_GEMMA_DEFAULTS = {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
    "bos_token_id": 2,
}

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("llama", ("llama", "Llama"), required={"mlp_bias": False}),
    "mistral": Architecture(
        "mistral",
        ("mistral", "Mistral"),
        defaults={"num_key_value_heads": 8, "sliding_window": 4096},
        windows=_window_everywhere,
        qkv_bias=False,
    ),
    "qwen2": Architecture("qwen2", ("qwen2", "Qwen2"), defaults=_QWEN_DEFAULTS, windows=_qwen_windows, qkv_bias=True),
    "qwen3": Architecture(
        "qwen3", ("qwen3", "Qwen3"), defaults={"head_dim": 128, **_QWEN_DEFAULTS}, windows=_qwen_windows, qk_norm=True
    ),
    "phi3": Architecture(
        "phi3",
        ("phi3", "Phi3"),
        windows=_window_everywhere,
        qkv_bias=False,
        rope_kinds=("default",),  # transformers takes every other one for longrope
        partial_rotary=True,
        fused=True,
    ),
    "smollm3": Architecture(
        "smollm3",
        ("smollm3", "SmolLM3"),
        defaults={
            "num_key_value_heads": 4,
            "rope_theta": 2_000_000.0,
            "no_rope_layer_interval": 4,
            "use_sliding_window": False,
            "tie_word_embeddings": True,
            "bos_token_id": 128000,
        },
        windows=_window_by_layer(_smollm3_windowed),
        ropes=_smollm3_ropes,
        required={"mlp_bias": False},
    ),
    "gemma2": Architecture(
        "gemma2",
        ("gemma2", "Gemma2"),
        defaults={**_GEMMA_DEFAULTS, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        windows=_window_by_layer(lambda _, block, __: block % 2 == 0),
        required={"use_bidirectional_attention": False},
        gemma=True,
    ),
    "gemma3_text": Architecture(
        "gemma3",
        ("gemma3", "Gemma3"),
        defaults={**_GEMMA_DEFAULTS, "sliding_window_pattern": 6, "rope_theta": 1_000_000.0},
        windows=_gemma3_windows,
        ropes=_gemma3_ropes,
        # transformers has a key for the cap of the scores and does not look at it.
        required={"use_bidirectional_attention": False, "attn_logit_softcapping": None},
        qk_norm=True,
        gemma=True,
    ),
}

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
    reader = _Reader(content, {**_LLAMA_DEFAULTS, **row.defaults}, where)
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
    rope_theta, rotary_dim, scaling = _rope(reader, row, head_dim, positions)
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


def _cap(reader: _Reader, key: str) -> float:
    """0 when there is none; float32, as the file has it."""
    if reader.get(key) is None:
        return 0.0
    value = reader.number(key)
    if value <= 0:
        raise reader.error(key, "a number above 0", value)
    return float(np.float32(value))


def _rope(reader: _Reader, row: Architecture, head_dim: int, positions: int) -> tuple[float, int, RopeScaling]:
    """(base, rotated dimensions, scaling) of the main table. Refuses kinds of scaling that the format does not know.

    Old configurations have rope_theta and rope_scaling, newer ones both in rope_parameters, Gemma 3's by kind of layer.
    """
    given = reader.get("rope_parameters")
    by_layer = isinstance(given, dict) and (_FULL in given or _SLIDING in given)
    main, local = (given.get(_FULL), given.get(_SLIDING)) if by_layer else (given, None)
    base, factor = reader.number("rope_theta"), reader.get("partial_rotary_factor")
    scaling = NO_SCALING
    for table, kinds in (
        (main, row.rope_kinds),
        (local, _LOCAL_ROPE_KINDS),
        (reader.get("rope_scaling"), row.rope_kinds),
    ):
        if table is None:
            continue
        if not isinstance(table, dict):
            raise reader.error("rope_parameters", "an object", table)
        kind = table.get("rope_type", table.get("type", "default"))
        if kind not in kinds:
            raise reader.error("rope_type", f"one of {', '.join(kinds)}", kind)
        if table is main:
            base = reader.of(table).number("rope_theta", default=base)
        if table is not local and kind != "default":
            scaling = _scaling(reader, reader.of(table), kind, positions)
        factor = table.get("partial_rotary_factor", factor)
    factor = 1.0 if factor is None else factor
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor <= 1:
        raise reader.error("partial_rotary_factor", "a number above 0, at most 1", factor)
    if factor != 1 and not row.partial_rotary:
        raise reader.error("partial_rotary_factor", "1.0 (the whole head is rotated)", factor)
    rotary_dim = int(head_dim * factor)
    least = 4 if scaling.kind == "dynamic" else 2
    if rotary_dim % 2 or rotary_dim < least:
        raise reader.error("head_dim", f"an even number of rotated dimensions, at least {least}", rotary_dim)
    return base, rotary_dim, scaling


def _scaling(reader: _Reader, table: _Reader, kind: str, positions: int) -> RopeScaling:
    """What the frequencies do not tell, as transformers takes it from a table of rope parameters."""
    if kind in ("linear", "llama3"):
        return RopeScaling(kind)
    if kind == "dynamic":  # transformers stretches from max_position_embeddings on, whatever else the table says
        factor = table.number("factor")
        if factor < 1:
            raise table.error("factor", "at least 1", factor)
        return RopeScaling(kind, float(np.float32(factor)), positions)
    original = reader.integer(_ORIGINAL) if reader.get(_ORIGINAL) else table.integer(_ORIGINAL, default=positions)
    factor = table.number("factor", default=positions / original)
    attention = table.number("attention_factor", default=_yarn_attention(table, factor))
    if attention <= 0:
        raise table.error("attention_factor", "a number above 0", attention)
    return RopeScaling(kind, factor, original, float(np.float32(attention)))


def _yarn_attention(table: _Reader, factor: float) -> float:
    """YaRN's temperature as a factor of cosines and sines, from the two scales of its logarithm when both are there."""

    def growth(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    scale, scale_all = (table.number(key, default=0.0) for key in ("mscale", "mscale_all_dim"))
    return growth(scale) / growth(scale_all) if scale and scale_all else growth(1.0)
