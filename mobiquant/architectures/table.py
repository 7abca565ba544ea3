"""The supported architectures, one row each: how a `model_type` differs from plain Llama."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mobiquant.architectures.reader import FULL, SLIDING, ConfigReader
from mobiquant.architectures.rope import ROPE_KINDS
from mobiquant.architectures.spec import LOCAL_ROPE, MAIN_ROPE, NO_ROPE


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
    windows: Callable[[ConfigReader, int], tuple[int, ...]] = lambda _, blocks: (0,) * blocks
    ropes: Callable[[ConfigReader, int], tuple[int, ...]] = lambda _, blocks: (MAIN_ROPE,) * blocks
    required: Mapping[str, Any] = field(default_factory=dict)
    qkv_bias: bool | None = None  # None: as attention_bias says, which then holds for the output projection too
    qk_norm: bool = False
    rope_kinds: tuple[str, ...] = ROPE_KINDS
    partial_rotary: bool = False
    fused: bool = False
    gemma: bool = False  # post norms, norms by 1 + w, scaled embedding, GELU, query_pre_attn_scalar


def _window_everywhere(reader: ConfigReader, blocks: int) -> tuple[int, ...]:
    """Mistral, Phi-3: one window for every block, or none; what layer_types says is not looked at."""
    kinds = reader.layer_types(blocks)
    window = 0 if reader.get("sliding_window") is None else reader.integer("sliding_window")
    if kinds is not None and set(kinds) != {SLIDING if window else FULL}:
        raise reader.error("layer_types", "all layers of one kind, as sliding_window says", kinds)
    return (window,) * blocks


def _window_by_layer(
    default: Callable[[ConfigReader, int, int], bool],
) -> Callable[[ConfigReader, int], tuple[int, ...]]:
    """default: whether a block is windowed without layer_types, from its number and the number of blocks."""

    def windows(reader: ConfigReader, blocks: int) -> tuple[int, ...]:
        kinds = reader.layer_types(blocks)
        windowed = [default(reader, i, blocks) for i in range(blocks)]
        if kinds is not None:
            windowed = [kind == SLIDING for kind in kinds]
        if not any(windowed):
            return (0,) * blocks
        window = reader.integer("sliding_window")
        return tuple(window if here else 0 for here in windowed)

    return windows


def _qwen_windowed(reader: ConfigReader, block: int, _: int) -> bool:
    used = reader.get("use_sliding_window") and reader.get("sliding_window") is not None
    return bool(used) and block >= reader.integer("max_window_layers", least=0)


def _qwen_windows(reader: ConfigReader, blocks: int) -> tuple[int, ...]:
    """transformers forgets the window unless use_sliding_window is set, so layer_types must not ask for it then."""
    kinds = reader.layer_types(blocks)
    if kinds is not None and SLIDING in kinds and not reader.get("use_sliding_window"):
        raise reader.error("layer_types", f"{FULL} alone without use_sliding_window", SLIDING)
    return _window_by_layer(_qwen_windowed)(reader, blocks)


def _smollm3_ropes(reader: ConfigReader, blocks: int) -> tuple[int, ...]:
    """no_rope_layers holds 1 for a block that IS rotated."""
    rotated = reader.get("no_rope_layers")
    if rotated is None:
        interval = reader.integer("no_rope_layer_interval")
        rotated = [int((i + 1) % interval != 0) for i in range(blocks)]
    if not isinstance(rotated, list) or len(rotated) < blocks or not all(value in (0, 1) for value in rotated):
        raise reader.error("no_rope_layers", f"a list of {blocks} numbers 0 or 1", rotated)
    return tuple(MAIN_ROPE if value else NO_ROPE for value in rotated[:blocks])


def _smollm3_windowed(reader: ConfigReader, block: int, blocks: int) -> bool:
    used = reader.get("use_sliding_window") and reader.get("sliding_window") is not None
    return bool(used) and _smollm3_ropes(reader, blocks)[block] == NO_ROPE


def _gemma3_windowed(reader: ConfigReader, block: int, _: int) -> bool:
    return bool((block + 1) % reader.integer("sliding_window_pattern"))


_gemma3_windows = _window_by_layer(_gemma3_windowed)


def _gemma3_ropes(reader: ConfigReader, blocks: int) -> tuple[int, ...]:
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
