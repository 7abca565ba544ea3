"""The supported architectures, and a checkpoint opened as the torch reference model.

Owns: which Hugging Face configurations the format can hold, how a block is built from one, and `ReferenceModel`, the
model that the C runtime is compared with. Everything is float32; keys and values are rounded to float16 as in the
runtime's KV cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig, LlamaForCausalLM, PreTrainedConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding

from mobiquant.checkpoint import (
    BLOCK_NORMS,
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    LINEARS,
    ROTARY_FREQUENCIES,
    ROUTER_POINTS,
    block_name,
    open_checkpoint,
)
from mobiquant.linear import Precision, RoutedLinear, SliceEmbedding, SliceLinear
from mobiquant.packing import SLICE_BITS, SLICE_COUNT, groups_of
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
_REFERENCE_ATTENTION = "mobiquant_reference"


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
    slices = {name: _load_slices(read, block_name(index, name), *shapes[name]) for name in LINEARS}
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


class ReferenceModel(nn.Module):
    """A calibrated checkpoint in torch, float32: token ids [batch, tokens] -> logits [batch, tokens, vocab].

    Starts at full depth. No KV cache: every call sees whole sequences.
    """

    def __init__(self, model: nn.Module, precision: Precision, default_output_depth: int):
        super().__init__()
        self.model = model
        self.config = model.config
        self._precision = precision
        self._default_output_depth = default_output_depth
        self._weights = torch.tensor([rows * columns for rows, columns in linear_shapes(model.config).values()])

    def set_depth(self, depth: int) -> None:
        """One depth, 1..4, for every token and routed linear."""
        if depth not in range(1, SLICE_COUNT + 1):
            raise ValueError(f"depth: expected 1..{SLICE_COUNT}, found {depth}")
        self._precision.depth = depth

    def set_average_bits(self, bits: float) -> None:
        """Routed: average bits per routed weight, 2..8."""
        if not SLICE_BITS <= bits <= SLICE_BITS * SLICE_COUNT:
            raise ValueError(f"average bits: expected {SLICE_BITS}..{SLICE_BITS * SLICE_COUNT}, found {bits}")
        self._precision.depth, self._precision.average_bits = None, float(bits)

    def set_output_depth(self, depth: int) -> None:
        """Depth of the output head, 1..4; 0: the checkpoint's default."""
        if depth not in range(SLICE_COUNT + 1):
            raise ValueError(f"output depth: expected 0..{SLICE_COUNT}, found {depth}")
        self.model.lm_head.depth = depth or self._default_output_depth

    @property
    def depths(self) -> Tensor:
        """Depths read by the last call: uint8 [batch·tokens, blocks, 7], linears in the order of LINEARS."""
        recorded = self._precision.recorded
        blocks = range(self.config.num_hidden_layers)
        return torch.stack([torch.stack([recorded[b, i] for i in range(len(LINEARS))], 1) for b in blocks], 1)

    @property
    def bits_read(self) -> float:
        """Average bits per routed weight of the last call."""
        per_token = (self.depths.cpu() * self._weights).sum((1, 2)) * SLICE_BITS
        return float(per_token.double().mean() / (self._weights.sum() * self.config.num_hidden_layers))

    @torch.no_grad()
    def forward(self, token_ids: Tensor) -> Tensor:
        return self.model(input_ids=token_ids, use_cache=False).logits


def open_reference(path: Path | str, device: str = "cpu") -> ReferenceModel:
    """Open a checkpoint folder as the reference model. Raises CheckpointError or UnsupportedModelError."""
    checkpoint = open_checkpoint(path)
    config = parse_config(checkpoint.config, checkpoint.path)
    config._attn_implementation = _REFERENCE_ATTENTION
    config.dtype = torch.float32
    quantization = checkpoint.quantization
    precision = Precision(quantization.router.budgets)
    with torch.device("meta"):
        model = ARCHITECTURES[config.model_type].causal_lm(config)
    read = checkpoint.tensor
    for index in range(config.num_hidden_layers):
        model.model.layers[index] = load_block(read, config, index, quantization.router.hidden_size, precision)
    table = _load_slices(read, EMBEDDING, config.vocab_size, config.hidden_size)
    model.model.embed_tokens = SliceEmbedding(table, quantization.embedding_depth)
    if not config.tie_word_embeddings:
        table = _load_slices(read, HEAD, config.vocab_size, config.hidden_size)
    model.lm_head = SliceLinear(table, quantization.output_depth)
    norm = _torch(read(FINAL_NORM, np.float32, (config.hidden_size,)))
    model.model.norm.weight = nn.Parameter(norm, requires_grad=False)
    frequencies = _torch(read(ROTARY_FREQUENCIES, np.float32, (config.head_dim // 2,)))
    model.model.rotary_emb.register_buffer("inv_freq", frequencies, persistent=False)
    model.model.rotary_emb.register_buffer("original_inv_freq", frequencies.clone(), persistent=False)
    return ReferenceModel(model.eval().to(device), precision, quantization.output_depth)


def _load_slices(read: ReadTensor, name: str, rows: int, columns: int) -> SlicedWeight:
    groups = groups_of(columns)
    return SlicedWeight(
        codes=_torch(read(f"{name}.codes", np.uint8, (rows, columns))),
        scales=_torch(read(f"{name}.scales", np.float16, (rows, groups))),
        offsets=_torch(read(f"{name}.offsets", np.float16, (rows, groups))),
    )


def _torch(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array)


def _reference_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, scaling: float, **_: object
) -> tuple[Tensor, None]:
    """Causal attention, float32, on keys (after RoPE) and values rounded to float16.

    query: [batch, heads, tokens, head_dim]; key, value: [batch, kv heads, tokens, head_dim].
    """
    groups = query.shape[1] // key.shape[1]
    key, value = (x.to(torch.float16).float().repeat_interleave(groups, dim=1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    weights = torch.softmax(scores.masked_fill(future, -torch.inf), dim=-1)
    return (weights @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register(_REFERENCE_ATTENTION, _reference_attention)
# The function above is causal by itself: no mask is made.
AttentionMaskInterface.register(_REFERENCE_ATTENTION, lambda *_, **__: None)
