"""How much an error in a linear's output, at one token, costs the whole model: a diagonal Fisher estimate.

With labels drawn from the model's own prediction and g the gradient of their negative log likelihood, a small error Δy
costs E[(g·Δy)²] / 2 nats of KL divergence. Kept per linear as the product of one factor per token and one per row.
The backward pass goes block by block, so memory holds one block.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from mobiquant.checkpoint import LINEARS, read_tensors, write_tensors
from mobiquant.source import Source


class Sensitivity:
    """tokens: float32 [blocks, 7, windows, seq_len], mean over rows of g²; rows: per block and linear float32 [rows],
    each row's share of it, mean 1."""

    def __init__(self, tokens: Tensor, rows: list[list[Tensor]]):
        self.tokens = tokens
        self.rows = rows

    def save(self, path: Path) -> None:
        tensors = {"tokens": self.tokens.numpy()}
        for block, linears in enumerate(self.rows):
            tensors |= {f"rows.{block}.{index}": rows.numpy() for index, rows in enumerate(linears)}
        write_tensors(path, tensors)

    @classmethod
    def load(cls, path: Path) -> Sensitivity:
        tensors = {name: torch.from_numpy(value) for name, value in read_tensors(path).items()}
        tokens = tensors["tokens"]
        return cls(tokens, [[tensors[f"rows.{b}.{i}"] for i in range(tokens.shape[1])] for b in range(len(tokens))])


def measure_sensitivity(
    source: Source, embedding: Tensor, windows: np.ndarray, batch: int, seed: int, device: torch.device
) -> Sensitivity:
    """One forward and one backward pass of the full-precision model over `windows`, int64 [windows, seq_len].

    embedding: float32 [vocab, width].
    """
    blocks, (count, seq_len) = source.block_count, windows.shape
    tokens = torch.zeros(blocks, len(LINEARS), count, seq_len)
    rows: list[list[Tensor]] = [[torch.zeros(0)] * len(LINEARS) for _ in range(blocks)]
    positions = position_embeddings(source, seq_len, device)
    norm, head = source.final_norm().to(device), source.head().to(device)
    generator = torch.Generator(device).manual_seed(seed)
    for start in tqdm(range(0, count, batch), desc="sensitivity", unit="batch"):
        ids = torch.from_numpy(windows[start : start + batch])
        hidden = [source.embed(ids, embedding)]
        for index in range(blocks):
            with torch.no_grad():
                block = source.block(index).to(device)
                hidden.append(block(hidden[-1].to(device), position_embeddings=positions).cpu())
        gradient = _loss_gradient(hidden.pop().to(device), lambda x: source.capped(norm(x) @ head.T), generator)
        for index in reversed(range(blocks)):
            block = source.block(index).to(device)
            gradient, squares = _block_gradients(block, hidden.pop().to(device), gradient, positions)
            for place, square in enumerate(squares):
                tokens[index, place, start : start + batch] = square.mean(-1).cpu()
                total = square.sum((0, 1)).cpu()
                rows[index][place] = total if start == 0 else rows[index][place] + total
    shares = [[total / total.mean().clamp_min(1e-30) for total in linears] for linears in rows]
    return Sensitivity(tokens, shares)


def position_embeddings(source: Source, seq_len: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of positions 0 .. seq_len-1, as a block takes them."""
    frequencies = torch.stack(source.frequencies()).to(device)
    angles = torch.arange(seq_len, device=device)[:, None] * frequencies[:, None]
    return angles.cos(), angles.sin()


def _loss_gradient(hidden: Tensor, predict: Callable[[Tensor], Tensor], generator: torch.Generator) -> Tensor:
    """Gradient of the summed negative log likelihood of sampled labels by the last block's output. predict: logits."""
    hidden = hidden.requires_grad_()
    logits = predict(hidden).flatten(0, 1)
    labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator).squeeze(1)
    (gradient,) = torch.autograd.grad(functional.cross_entropy(logits, labels, reduction="sum"), hidden)
    return gradient


def _block_gradients(
    block: nn.Module, hidden: Tensor, gradient: Tensor, positions: tuple[Tensor, Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Gradient by the block's input, and the squared gradients by the outputs of its linears, in order of LINEARS."""
    outputs: dict[str, Tensor] = {}
    hooks = [
        block.get_submodule(name).register_forward_hook(lambda _, __, output, name=name: outputs.update({name: output}))
        for name in LINEARS
    ]
    result = block(hidden.requires_grad_(), position_embeddings=positions)
    for hook in hooks:
        hook.remove()
    gradients = torch.autograd.grad(result, [hidden, *(outputs[name] for name in LINEARS)], gradient)
    return gradients[0], [gradient.square() for gradient in gradients[1:]]
