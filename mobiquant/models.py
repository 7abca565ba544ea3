"""Blocks and matrices of a checkpoint, and the parts of transformers that a model's configuration stands for."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig

from mobiquant.architectures import ARCHITECTURES, ModelSpec, UnsupportedModelError
from mobiquant.block import DecoderBlock, rotary_tables
from mobiquant.checkpoint import LINEARS, ROUTER_POINTS, block_name
from mobiquant.linear import Precision, RoutedLinear
from mobiquant.packing import groups_of
from mobiquant.router import RESIDUALS, Router
from mobiquant.slices import SlicedWeight

ReadTensor = Callable[[str, type[np.generic], tuple[int, ...]], np.ndarray]


def transformers_config(content: dict[str, Any], where: Path | str) -> PreTrainedConfig:
    """The configuration as transformers takes it. Raises UnsupportedModelError when it finds it invalid."""
    # quantization_config is ours: transformers would look for a quantizer of that name.
    settings = {key: value for key, value in content.items() if key not in ("quantization_config", "model_type")}
    try:
        return AutoConfig.for_model(content["model_type"], **settings)
    except (StrictDataclassError, ValueError, TypeError, KeyError) as error:
        kind = content["model_type"]
        raise UnsupportedModelError(f"{where}: expected a valid {kind} configuration: {error}") from error


def rotary_frequencies(spec: ModelSpec, config: PreTrainedConfig) -> list[Tensor]:
    """Of every rotary table of the model, float32 [rotated / 2], by transformers' own formulas."""
    package, prefix = ARCHITECTURES[spec.model_type].classes
    module = import_module(f"transformers.models.{package}.modeling_{package}")
    rotary = getattr(module, f"{prefix}RotaryEmbedding")(config)
    if hasattr(rotary, "inv_freq"):
        return [rotary.inv_freq]
    by_layer = (getattr(rotary, f"{kind}_attention_inv_freq", None) for kind in ("full", "sliding"))
    tables = [table for table in by_layer if table is not None]
    # Where every block uses the local table, it stands in for the main one too, which the file always has.
    return [tables[0], tables[-1]][: rotary_tables(spec)]


def linear_shapes(config: ModelSpec) -> dict[str, tuple[int, int]]:
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


def hidden_bytes(config: ModelSpec) -> int:
    """About what one token's hidden states in a block take until the backward pass: 12 widths and 6 feed-forwards, and
    some temporaries."""
    return 80 * (2 * config.hidden_size + config.intermediate_size)


def empty_block(config: ModelSpec, index: int) -> DecoderBlock:
    """Block `index` without storage (meta device)."""
    with torch.device("meta"):
        return DecoderBlock(config, index)


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


def load_block(read: ReadTensor, config: ModelSpec, index: int, hidden_size: int, precision: Precision) -> DecoderBlock:
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
    vectors = {
        name: _torch(read(block_name(index, name), np.float32, (length,)))
        for name, length in config.block_vectors().items()
    }
    block.load_state_dict(vectors, strict=False, assign=True)  # the rest is in place
    return block.requires_grad_(False).eval()


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
