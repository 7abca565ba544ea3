"""The whole model on the device, its routed linears replaced: its predictions, against those of the original model."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from mobiquant.architectures import UnsupportedModelError
from mobiquant.checkpoint import LINEARS, block_name
from mobiquant.config import CalibrationSettings
from mobiquant.models import hidden_bytes, linear_shapes
from mobiquant.recipes import ModelTask
from mobiquant.sensitivity import position_embeddings
from mobiquant.source import Source

# float32: a weight, its position, gradient and moments, and what the rounding makes of them.
_BYTES_PER_WEIGHT = 40
# Logits of both models, their logarithms and the gradients.
_BYTES_PER_LOGIT = 32


class WholeModel:
    """layers: by name, what `replace(name, weight)` made of every routed linear; each has a flag `original`."""

    def __init__(self, task: ModelTask, replace: Callable[[str, Tensor], nn.Module]):
        source, device = task.source, task.device
        self._source = source
        self.layers: dict[str, nn.Module] = {}
        self._blocks: list[nn.Module] = []
        for index in range(source.block_count):
            block = source.block(index, device)
            for name in LINEARS:
                try:
                    layer = replace(block_name(index, name), block.get_submodule(name).weight)
                except ValueError as error:
                    raise UnsupportedModelError(f"tensor {block_name(index, name)}.weight: {error}") from error
                self.layers[block_name(index, name)] = layer
                block.set_submodule(name, layer)
            self._blocks.append(block)
        self._embedding = source.embedding().to(device) * source.config.embedding_scale
        self._norm, self._head = source.final_norm().to(device), source.head().to(device)
        self._positions = position_embeddings(source, task.settings.seq_len, device)

    def divergence(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Mean KL divergence of the predictions from the original model's, nats a token; ids: int64 [n, seq_len].

        dtype: of the blocks' products on a GPU.
        """
        with torch.no_grad():
            expected = self._log_probs(ids, dtype, original=True)
        found = self._log_probs(ids, dtype, original=False)
        return functional.kl_div(found, expected, reduction="sum", log_target=True) / ids.numel()

    @torch.no_grad()
    def run(self, ids: Tensor) -> None:
        """A forward pass, in bfloat16 on a GPU, for what it leaves in the layers."""
        self._log_probs(ids, torch.bfloat16, original=False)

    def _log_probs(self, ids: Tensor, dtype: torch.dtype, original: bool) -> Tensor:
        for layer in self.layers.values():
            layer.original = original
        hidden = functional.embedding(ids, self._embedding)
        with torch.autocast(ids.device.type, dtype, enabled=ids.is_cuda):
            for block in self._blocks:
                hidden = block(hidden, position_embeddings=self._positions)
        # In float32: a rounded logit would be an error of its own, of the size of the deepest slices'.
        return self._source.capped(functional.linear(self._norm(hidden), self._head)).log_softmax(-1)


def fits(source: Source, settings: CalibrationSettings, device: torch.device) -> bool:
    """Whether the device can train a slice of the whole model at once."""
    config, tokens = source.config, settings.distill_batch * settings.seq_len
    weights = source.block_count * sum(rows * columns for rows, columns in linear_shapes(config).values())
    needed = weights * _BYTES_PER_WEIGHT
    needed += tokens * (config.vocab_size * _BYTES_PER_LOGIT + source.block_count * hidden_bytes(config))
    if device.type == "cuda":
        return needed < torch.cuda.get_device_properties(device).total_memory
    return needed < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
