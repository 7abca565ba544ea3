"""A full-precision model whose block linears can be exchanged for other float weights, and what that costs each token.

Shared by the benchmarks that look at weights alone: nothing here quantises activations.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from mobiquant.checkpoint import LINEARS, block_name


class DenseModel:
    """A Hugging Face folder in float32 on `device`, one window at a time. It starts with its own weights."""

    def __init__(self, path: Path, device: str):
        self._model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval().to(device)
        self._device = device
        blocks = range(self._model.config.num_hidden_layers)
        names = [block_name(index, name) for index in blocks for name in LINEARS]
        self.linears: dict[str, nn.Linear] = {name: self._model.get_submodule(name) for name in names}
        self.originals: dict[str, Tensor] = {name: linear.weight.detach() for name, linear in self.linears.items()}

    @property
    def context(self) -> int:
        return self._model.config.max_position_embeddings

    @property
    def bos(self) -> int:
        return self._model.config.bos_token_id

    def set_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Exchange the weights of every routed linear, float32 [rows, columns] by module name, on any device."""
        for name, linear in self.linears.items():
            linear.weight = nn.Parameter(weights[name].to(self._device), requires_grad=False)

    @torch.no_grad()
    def hidden(self, tokens: np.ndarray) -> Tensor:
        """What the output head reads, after the last norm: float32 [n, width] for tokens int [n]."""
        ids = torch.from_numpy(tokens.astype(np.int64)).to(self._device)[None]
        return self._model.model(ids, use_cache=False).last_hidden_state[0]

    @torch.no_grad()
    def log_probs(self, hidden: Tensor) -> Tensor:
        """float64 [n, vocab]: in float32 the divergence of an 8-bit model would be mostly rounding."""
        return self._model.lm_head(hidden.to(self._device)).double().log_softmax(-1)


def token_divergence(expected: Tensor, found: Tensor) -> Tensor:
    """KL divergence of every token's prediction `found` from `expected`, log probabilities [n, vocab]: nats, [n]."""
    return (expected.exp() * (expected - found)).sum(-1)
