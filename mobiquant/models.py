"""The supported architectures: which Hugging Face configurations the format can hold, and how a block is built."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding

from mobiquant.checkpoint import (
    BLOCK_NORMS,
    LINEARS,
    ROUTER_POINTS,
    block_name,
)
from mobiquant.linear import Precision, RoutedLinear
from mobiquant.packing import groups_of
from mobiquant.router import RESIDUALS, Router
from mobiquant.slices import SlicedWeight

ReadTensor = Callable[[str, type[np.generic], tuple[int, ...]], np.ndarray]


class UnsupportedModelError(ValueError):
    """The model is not of a kind that the file format and the runtime can hold; the message says what and why."""


@dataclass(frozen=True)
class Architecture:
    """The transformers classes behind one `model_type`."""

    config: type[PreTrainedConfig]
    causal_lm: type[nn.Module]
    block: type[nn.Module]
    rotary: type[nn.Module]
    norm: type[nn.Module]


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(LlamaConfig, LlamaForCausalLM, LlamaDecoderLayer, LlamaRotaryEmbedding, LlamaRMSNorm),
}

# Rotary types whose frequencies are fixed by the configuration alone, with no scaling of the attention.
_STATIC_ROPE = ("default", "linear", "llama3")


def parse_config(content: dict[str, object], where: Path | str) -> PreTrainedConfig:
    """The transformers configuration of config.json. Raises UnsupportedModelError when the format cannot hold it."""
    model_type = str(content.get("model_type"))
    if model_type not in ARCHITECTURES:
        supported = ", ".join(ARCHITECTURES)
        raise UnsupportedModelError(f"{where}: model_type: expected one of {supported}, found {model_type}")
    # quantization_config is ours: transformers would look for a quantizer of that name.
    settings = {key: value for key, value in content.items() if key != "quantization_config"}
    try:
        config = ARCHITECTURES[model_type].config(**settings)
    except (StrictDataclassError, ValueError, TypeError, KeyError) as error:
        raise UnsupportedModelError(f"{where}: expected a valid {model_type} configuration: {error}") from error
    rope = (config.rope_parameters or {}).get("rope_type", "default")
    checks = [
        ("attention_bias", config.attention_bias, "False (the format has no bias)", not config.attention_bias),
        ("mlp_bias", config.mlp_bias, "False (the format has no bias)", not config.mlp_bias),
        ("hidden_act", config.hidden_act, "silu", config.hidden_act == "silu"),
        ("rope_type", rope, f"one of {', '.join(_STATIC_ROPE)} (fixed frequencies)", rope in _STATIC_ROPE),
        (
            "num_key_value_heads",
            config.num_key_value_heads,
            f"a divisor of num_attention_heads {config.num_attention_heads}",
            config.num_attention_heads % config.num_key_value_heads == 0,
        ),
        (
            "partial_rotary_factor",
            (config.rope_parameters or {}).get("partial_rotary_factor", 1.0),
            "1.0 (the whole head is rotated)",
            (config.rope_parameters or {}).get("partial_rotary_factor", 1.0) == 1.0,
        ),
    ]
    for key, found, expected, good in checks:
        if not good:
            raise UnsupportedModelError(f"{where}: {key}: expected {expected}, found {found}")
    return config


def linear_shapes(config: PreTrainedConfig) -> dict[str, tuple[int, int]]:
    """(rows, columns) of every routed linear of a block, in the order of LINEARS."""
    width, feed_forward = config.hidden_size, config.intermediate_size
    heads, heads_kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    shapes = [
        (heads, width),
        (heads_kv, width),
        (heads_kv, width),
        (width, heads),
        (feed_forward, width),
        (feed_forward, width),
        (width, feed_forward),
    ]
    return dict(zip(LINEARS, shapes, strict=True))


def hidden_bytes(config: PreTrainedConfig) -> int:
    """About what one token's hidden states in a block take until the backward pass: 12 widths and 6 feed-forwards, and
    some temporaries."""
    return 80 * (2 * config.hidden_size + config.intermediate_size)


def empty_block(config: PreTrainedConfig, index: int) -> nn.Module:
    """Block `index` without storage (meta device), as transformers defines it."""
    with torch.device("meta"):
        return ARCHITECTURES[config.model_type].block(config, index)


def install_slices(
    block: nn.Module, index: int, slices: dict[str, SlicedWeight], routers: dict[str, Router], precision: Precision
) -> None:
    """Replace a block's linears by routed slices and add its routers, in place.

    slices: by name in LINEARS; routers: by name in ROUTER_POINTS. The block's `state_dict` then has the names of the
    checkpoint, without the prefix `model.layers.N.`.
    """
    for point, names in ROUTER_POINTS.items():
        block.add_module(f"router_{point}", routers[point])
        for head, name in enumerate(names):
            place = (index, LINEARS.index(name))
            block.set_submodule(name, RoutedLinear(slices[name], routers[point], head, precision, place))


def load_block(
    read: ReadTensor, config: PreTrainedConfig, index: int, hidden_size: int, precision: Precision
) -> nn.Module:
    """Block `index` of a checkpoint. read: (name, dtype, shape) -> array, raising when the tensor has another form."""
    block = empty_block(config, index)
    shapes = linear_shapes(config)
    slices = {name: load_slices(read, block_name(index, name), *shapes[name]) for name in LINEARS}
    routers = {}
    for point, names in ROUTER_POINTS.items():
        prefix = block_name(index, f"router_{point}.")
        columns, linears = shapes[names[0]][1], len(names)
        forms = {
            "hidden": (np.int8, (hidden_size, columns)),
            "hidden_scale": (np.float32, (hidden_size,)),
            "hidden_bias": (np.float32, (hidden_size,)),
            "head": (np.float32, (linears, RESIDUALS, hidden_size + 1)),
            "head_bias": (np.float32, (linears, RESIDUALS)),
            "threshold": (np.float32, (linears, RESIDUALS, len(precision.budgets))),
        }
        routers[point] = Router(**{part: _torch(read(prefix + part, *form)) for part, form in forms.items()})
    install_slices(block, index, slices, routers, precision)
    for name in BLOCK_NORMS:
        norm = _torch(read(block_name(index, name), np.float32, (config.hidden_size,)))
        block.get_submodule(name.removesuffix(".weight")).weight = nn.Parameter(norm, requires_grad=False)
    return block.eval()


def load_slices(read: ReadTensor, name: str, rows: int, columns: int) -> SlicedWeight:
    """A sliced matrix of a checkpoint by its module's name."""
    groups = groups_of(columns)
    return SlicedWeight(
        codes=_torch(read(f"{name}.codes", np.uint8, (rows, columns))),
        scales=_torch(read(f"{name}.scales", np.float16, (rows, groups))),
        offsets=_torch(read(f"{name}.offsets", np.float16, (rows, groups))),
    )


def _torch(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array)
