"""A calibrated checkpoint as a transformers model. Importing this file registers the quantizer:

    import mobiquant.transformers
    model = AutoModelForCausalLM.from_pretrained(DIR)
    model.set_avg_bits(3.0)

Owns the registration, which modules stand where, and the methods that choose the precision. What the modules compute is
in mobiquant.linear and mobiquant.exact: the runtime's bits, so generate() gives the runtime's tokens, slowly.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from mobiquant.checkpoint import LINEARS, ROUTER_POINTS
from mobiquant.config import QUANT_METHOD, QuantizationConfig
from mobiquant.exact import ExactAttention, ExactMlp, ExactNorm, ExactRotary
from mobiquant.linear import Precision, SliceEmbedding, SliceLinear
from mobiquant.models import install_slices, linear_shapes, parse_config
from mobiquant.packing import SLICE_BITS, SLICE_COUNT, groups_of
from mobiquant.router import RESIDUALS, Router
from mobiquant.slices import SlicedWeight


@register_quantization_config(QUANT_METHOD)
class MobiQuantConfig(QuantizationConfigMixin):
    """The `quantization_config` of a checkpoint's config.json, checked. Raises ValueError that names the key."""

    def __init__(self, **entry: Any):
        super().__init__(quant_method=QUANT_METHOD)  # type: ignore[arg-type]  (the enumeration knows its own only)
        self.quantization = QuantizationConfig.from_dict({"quant_method": QUANT_METHOD, **entry})

    def to_dict(self) -> dict[str, Any]:
        return self.quantization.to_dict()


class SlicedModel:
    """What a loaded model can do beside transformers' own."""

    precision: Precision

    def set_bits(self, bits: int) -> None:
        """One precision, 2, 4, 6 or 8 bits, for every token from now on. Raises ValueError."""
        depths = {SLICE_BITS * depth: depth for depth in range(1, SLICE_COUNT + 1)}
        if bits not in depths:
            raise ValueError(f"bits: expected one of {', '.join(map(str, depths))}, found {bits}")
        self.precision.depth = depths[bits]

    def set_avg_bits(self, bits: float) -> None:
        """Average bits per routed weight, 2 to 8, tokens routed one by one from now on. Raises ValueError."""
        if not SLICE_BITS <= bits <= SLICE_BITS * SLICE_COUNT:
            raise ValueError(
                f"average bits: expected a number from {SLICE_BITS} to {SLICE_BITS * SLICE_COUNT}, found {bits}"
            )
        self.precision.depth, self.precision.average_bits = None, float(bits)

    @property
    def depths(self) -> np.ndarray:
        """Slices that the tokens of the last pass read: uint8 [tokens, blocks, 7], in the order of LINEARS."""
        recorded = self.precision.recorded
        blocks = 1 + max(block for block, _ in recorded)
        stacked = [torch.stack([recorded[block, i] for i in range(len(LINEARS))], 1) for block in range(blocks)]
        return torch.stack(stacked, 1).cpu().numpy()


@register_quantizer(QUANT_METHOD)
class MobiQuantQuantizer(HfQuantizer):
    """Puts slices and the exact modules into a transformers model, before and after its tensors are read."""

    requires_calibration = True
    quantization_config: MobiQuantConfig

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float32  # of norms and activations; the arithmetic is defined for no other

    def is_serializable(self) -> bool:
        return False  # the checkpoint folder is the serial form

    @property
    def is_trainable(self) -> bool:
        return False

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        """Modules without storage that have the checkpoint's names, shapes and dtypes."""
        config = parse_config(model.config.to_dict(), Path(model.name_or_path or "the model"))
        width, vocabulary = config.hidden_size, config.vocab_size
        precision = Precision(self.quantization_config.quantization.router.budgets)
        with torch.device("meta"):
            for index, block in enumerate(model.model.layers):
                slices = {name: _empty_slices(*shape) for name, shape in linear_shapes(config).items()}
                install_slices(block, index, slices, self._empty_routers(linear_shapes(config)), precision)
            model.model.embed_tokens = SliceEmbedding(_empty_slices(vocabulary, width), SLICE_COUNT)
            model.model.rotary_emb = ExactRotary(config.head_dim)
            tied = config.tie_word_embeddings
            model.lm_head = nn.Identity() if tied else SliceLinear(_empty_slices(vocabulary, width))
        model._tied_weights_keys = {}
        model.all_tied_weights_keys = {}
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        """The same modules made anew from what was read, with what they derive from it, and the exact ones around."""
        config, quantization = model.config, self.quantization_config.quantization
        precision = Precision(quantization.router.budgets)
        for index, block in enumerate(model.model.layers):
            slices = {name: _slices_of(block.get_submodule(name)) for name in LINEARS}
            routers = {}
            for point in ROUTER_POINTS:
                stored = block.get_submodule(f"router_{point}")
                routers[point] = Router(**{part: getattr(stored, part) for part in Router.PARTS})
            install_slices(block, index, slices, routers, precision)
            block.self_attn = ExactAttention(block.self_attn, config, index)
            block.mlp = ExactMlp(block.mlp)
            block.input_layernorm = ExactNorm(block.input_layernorm.weight, config.rms_norm_eps)
            block.post_attention_layernorm = ExactNorm(block.post_attention_layernorm.weight, config.rms_norm_eps)
        model.model.norm = ExactNorm(model.model.norm.weight, config.rms_norm_eps)
        embedding = _slices_of(model.model.embed_tokens)
        head = embedding if isinstance(model.lm_head, nn.Identity) else _slices_of(model.lm_head)
        model.model.embed_tokens = SliceEmbedding(embedding, quantization.embedding_depth)
        model.lm_head = SliceLinear(head, quantization.output_depth)
        model.requires_grad_(False)
        # A class of the model's own name, so that what transformers derives from the name stays right.
        model.__class__ = type(type(model).__name__, (SlicedModel, type(model)), {"__module__": __name__})
        model.precision = precision
        return model

    def _empty_routers(self, shapes: dict[str, tuple[int, int]]) -> dict[str, Router]:
        router = self.quantization_config.quantization.router
        hidden, budgets = router.hidden_size, len(router.budgets)
        routers = {}
        for point, names in ROUTER_POINTS.items():
            linears, columns = len(names), shapes[names[0]][1]
            routers[point] = Router(
                hidden=torch.empty(hidden, columns, dtype=torch.int8),
                hidden_scale=torch.empty(hidden),
                hidden_bias=torch.empty(hidden),
                head=torch.empty(linears, RESIDUALS, hidden + 1),
                head_bias=torch.empty(linears, RESIDUALS),
                threshold=torch.empty(linears, RESIDUALS, budgets),
            )
        return routers


def _empty_slices(rows: int, columns: int) -> SlicedWeight:
    return SlicedWeight(
        codes=torch.empty(rows, columns, dtype=torch.uint8),
        scales=torch.empty(rows, groups_of(columns), dtype=torch.float16),
        offsets=torch.empty(rows, groups_of(columns), dtype=torch.float16),
    )


def _slices_of(module: nn.Module) -> SlicedWeight:
    return SlicedWeight(codes=module.codes, scales=module.scales, offsets=module.offsets)
