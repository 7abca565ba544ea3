"""A calibrated checkpoint as a transformers model. Importing this file registers the quantizer:

    import mobiquant.transformers
    model = AutoModelForCausalLM.from_pretrained(DIR)
    model.set_avg_bits(3.0)

Owns the registration, which modules stand where, and the methods that choose the precision. What the modules compute is
in mobiquant.linear and mobiquant.exact: the runtime's bits, so generate() gives the runtime's tokens, slowly.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from mobiquant.architectures import ModelSpec, parse_config
from mobiquant.block import rotary_tables
from mobiquant.checkpoint import LINEARS, ROUTER_POINTS, STATIC_ORDER
from mobiquant.config import QUANT_METHOD, QuantizationConfig
from mobiquant.correction import RunningCorrection
from mobiquant.exact import ExactBlock, ExactHead, ExactNorm, ExactRotary
from mobiquant.linear import Precision, SliceEmbedding, SliceLinear
from mobiquant.models import empty_block, install_slices, linear_shapes
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


class _Followed:
    """The sequence in a cache: what its tokens from `origin` on read since `asked` bits were asked for."""

    def __init__(self, asked: float, origin: int) -> None:
        self.asked, self.origin = asked, origin
        self.depths: list[np.ndarray] = []  # uint8 [tokens, blocks, 7] each


class SlicedModel:
    """What a loaded model can do beside transformers' own; stands before transformers' class among the bases."""

    precision: Precision
    config: PreTrainedConfig

    def install_precision(self, precision: Precision, spec: ModelSpec) -> None:
        """Take what the linears share. It is at full depth."""
        self.precision = precision
        self._asked_bits = precision.average_bits
        self._followed: weakref.WeakKeyDictionary[Cache, _Followed] = weakref.WeakKeyDictionary()
        self._depths: list[np.ndarray] = []
        self._sizes = np.array([rows * columns for rows, columns in linear_shapes(spec).values()])

    def set_bits(self, bits: int) -> None:
        """One precision, 2, 4, 6 or 8 bits, for every token from now on. Raises ValueError."""
        depths = {SLICE_BITS * depth: depth for depth in range(1, SLICE_COUNT + 1)}
        if bits not in depths:
            raise ValueError(f"bits: expected one of {', '.join(map(str, depths))}, found {bits}")
        self.precision.depth = depths[bits]

    def set_avg_bits(self, bits: float) -> None:
        """Average bits per routed weight, 2 to 8, tokens routed one by one from now on. Raises ValueError.

        A sequence that is alone in its batch and not padded keeps to the average by the runtime's running correction;
        others are routed by the calibration's thresholds alone.
        """
        lowest, highest = SLICE_BITS, SLICE_BITS * SLICE_COUNT
        if not lowest <= bits <= highest:
            raise ValueError(f"average bits: expected a number from {lowest} to {highest}, found {bits}")
        self.precision.depth, self._asked_bits = None, float(bits)

    @property
    def depths(self) -> np.ndarray:
        """Slices that the tokens of the last pass read: uint8 [tokens, blocks, 7], in the order of LINEARS."""
        return np.concatenate(self._depths)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As of transformers' class; a routed sequence that can be followed runs in the correction's stretches."""
        self._depths = []
        run = super().forward  # type: ignore[misc]
        alone = input_ids is not None and len(input_ids) == 1 and kwargs.get("labels") is None
        padded = attention_mask is not None and not bool(attention_mask.all())
        if self.precision.depth is not None or padded or not alone:
            self.precision.average_bits = self._asked_bits
            output = run(
                input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                logits_to_keep=logits_to_keep,
                **kwargs,
            )
            self._depths.append(self._recorded())
            return output
        cache = DynamicCache(config=self.config) if past_key_values is None else past_key_values
        only_last = isinstance(logits_to_keep, int) and logits_to_keep == 1
        logits = []
        for begin, end in self._stretches(cache, input_ids.shape[1]):
            output = run(
                input_ids[:, begin:end],
                position_ids=None if position_ids is None else position_ids[:, begin:end],
                past_key_values=cache,
                logits_to_keep=int(only_last),
                **kwargs | {"use_cache": True},
            )
            logits.append(output.logits)
        if not only_last:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            output.logits = torch.cat(logits, dim=1)[:, kept]
        return output

    def _stretches(self, cache: Cache, tokens: int) -> Iterator[tuple[int, int]]:
        """(begin, end) of the tokens to run next, with the precision set for them; notes what they read."""
        position = cache.get_seq_length()
        followed = self._followed.get(cache)
        known = followed is not None and followed.asked == self._asked_bits
        if not known or followed.origin + sum(map(len, followed.depths)) != position:
            followed = self._followed[cache] = _Followed(self._asked_bits, position)
        begin = 0
        while begin < tokens:
            read = np.concatenate(followed.depths) if followed.depths else np.empty((0, 0, len(LINEARS)), np.uint8)
            correction = RunningCorrection(followed.asked)
            while correction.end is not None and correction.end <= len(read):
                correction.finish_stretch(self._average(read[: correction.end]))
            left = tokens - begin
            end = begin + (left if correction.end is None else min(left, correction.end - len(read)))
            self.precision.average_bits = correction.bits
            yield begin, end
            begin = end
            self._depths.append(self._recorded())
            followed.depths.append(self._depths[-1])

    def _average(self, depths: np.ndarray) -> float:
        """Average bits per routed weight of depths [tokens, blocks, 7], in the runtime's operations."""
        read = SLICE_BITS * (depths.sum(axis=(0, 1), dtype=np.int64) @ self._sizes)
        return float(read) / (float(self._sizes.sum() * depths.shape[1]) * len(depths))

    def _recorded(self) -> np.ndarray:
        recorded, blocks = self.precision.recorded, range(self.config.num_hidden_layers)
        stacked = [torch.stack([recorded[block, i] for i in range(len(LINEARS))], 1) for block in blocks]
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
        self._spec = config = parse_config(model.config.to_dict(), Path(model.name_or_path or "the model"))
        width, vocabulary = config.hidden_size, config.vocab_size
        precision = Precision(self.quantization_config.quantization.router.budgets)
        with torch.device("meta"):
            for index in range(config.num_hidden_layers):
                block = empty_block(config, index)
                slices = {name: _empty_slices(*shape) for name, shape in linear_shapes(config).items()}
                install_slices(block, index, slices, self._empty_routers(linear_shapes(config)), precision)
                model.model.layers[index] = block
            model.model.embed_tokens = SliceEmbedding(_empty_slices(vocabulary, width), SLICE_COUNT)
            model.model.rotary_emb = ExactRotary(config.rotary_dim, rotary_tables(config), config.rope_scaling)
            tied = config.tie_word_embeddings
            model.lm_head = nn.Identity() if tied else SliceLinear(_empty_slices(vocabulary, width))
        ignored = model._keys_to_ignore_on_load_unexpected or ()
        model._keys_to_ignore_on_load_unexpected = {*ignored, f"^{STATIC_ORDER}$"}  # static budgets are the runtime's
        model._tied_weights_keys = {}
        model.all_tied_weights_keys = {}
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        """The same modules made anew from what was read, with what they derive from it, and the exact ones around."""
        config, quantization = self._spec, self.quantization_config.quantization
        precision = Precision(quantization.router.budgets)
        for index, block in enumerate(model.model.layers):
            slices = {name: _slices_of(block.get_submodule(name)) for name in LINEARS}
            routers = {}
            for point in ROUTER_POINTS:
                stored = block.get_submodule(f"router_{point}")
                routers[point] = Router(**{part: getattr(stored, part) for part in Router.PARTS})
            install_slices(block, index, slices, routers, precision)
            model.model.layers[index] = ExactBlock(block)
        model.model.norm = ExactNorm(model.model.norm.weight, config.rms_norm_eps)
        embedding = _slices_of(model.model.embed_tokens)
        head = embedding if isinstance(model.lm_head, nn.Identity) else _slices_of(model.lm_head)
        model.model.embed_tokens = SliceEmbedding(embedding, quantization.embedding_depth, config.embedding_scale)
        model.lm_head = ExactHead(SliceLinear(head, quantization.output_depth), config.output_softcap)
        model.config.final_logit_softcapping = None  # the head does it, in the runtime's arithmetic
        model.requires_grad_(False)
        # A class of the model's own name, so that what transformers derives from the name stays right.
        model.__class__ = type(type(model).__name__, (SlicedModel, type(model)), {"__module__": __name__})
        model.install_precision(precision, config)
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
