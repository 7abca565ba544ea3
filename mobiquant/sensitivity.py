"""How much an error in a linear's output, at one token, costs the whole model: a diagonal Fisher estimate.

With labels drawn from the model's own prediction and g the gradient of their negative log likelihood, a small error Δy
costs E[(g·Δy)²] / 2 nats of KL divergence. Kept per linear as the product of one factor per token and one per row.
The backward pass goes block by block, so memory holds one block and the head, and the hidden states between all blocks
of some windows, which may lie on disk.
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
from mobiquant.hidden import hidden_states
from mobiquant.source import Source

# Tokens whose hidden states between all blocks are there at once, and tokens whose logits are.
_PASS_TOKENS = 16384
_LOGIT_TOKENS = 512


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
    source: Source, windows: np.ndarray, batch: int, seed: int, device: torch.device, folder: Path | None = None
) -> Sensitivity:
    """One forward and one backward pass of the full-precision model over `windows`, int64 [windows, seq_len].

    batch: windows that pass a block together; folder: where hidden states lie, in memory without one.
    """
    blocks, (count, seq_len) = source.block_count, windows.shape
    # Every pass over the model reads all of it, so as many windows as their hidden states allow take part.
    together = max(batch, _PASS_TOKENS // seq_len)
    passes = -(-count // together)
    hidden = hidden_states(((blocks + 1) * min(together, count), seq_len, source.config.hidden_size), device, folder)
    tokens = torch.zeros(blocks, len(LINEARS), count, seq_len)
    rows: list[list[Tensor]] = [[torch.zeros(0)] * len(LINEARS) for _ in range(blocks)]
    positions = position_embeddings(source, seq_len, device)
    norm, head = source.final_norm().to(device), source.head().to(device)
    generator = torch.Generator(device).manual_seed(seed)

    def predict(x: Tensor) -> Tensor:
        return source.capped(norm(x) @ head.T)

    with tqdm(total=2 * passes * blocks, desc="sensitivity", unit="block") as bar:
        for start in range(0, count, together):
            ids = torch.from_numpy(windows[start : start + together])
            batches = torch.arange(len(ids)).split(batch)
            for chosen in batches:
                hidden.write(chosen, source.embed(ids[chosen]))
            for index in range(blocks):
                before, after = index * len(ids), (index + 1) * len(ids)
                with torch.no_grad():
                    block = source.block(index, device)
                    for chosen in batches:
                        output = block(hidden.read(before + chosen, device), position_embeddings=positions)
                        hidden.write(after + chosen, output)
                del block
                bar.update()
            # From here on a gradient by a block's output takes the place of the output.
            for chosen in (blocks * len(ids) + torch.arange(len(ids))).split(1):
                (output,) = hidden.read(chosen, device)
                hidden.write(chosen, _loss_gradient(output, predict, generator)[None])
            for index in reversed(range(blocks)):
                before, after = index * len(ids), (index + 1) * len(ids)
                block = source.block(index, device)
                for chosen in batches:
                    gradient, squares = _block_gradients(
                        block, hidden.read(before + chosen, device), hidden.read(after + chosen, device), positions
                    )
                    hidden.write(before + chosen, gradient)
                    for place, square in enumerate(squares):
                        tokens[index, place, start + chosen] = square.mean(-1).cpu()
                        total = square.sum((0, 1)).cpu()
                        first = start == 0 and chosen[0] == 0
                        rows[index][place] = total if first else rows[index][place] + total
                del block
                bar.update()
    shares = [[total / total.mean().clamp_min(1e-30) for total in linears] for linears in rows]
    return Sensitivity(tokens, shares)


def position_embeddings(source: Source, seq_len: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of positions 0 .. seq_len-1, as a block takes them."""
    frequencies = torch.stack(source.frequencies()).to(device)
    angles = torch.arange(seq_len, device=device)[:, None] * frequencies[:, None]
    cosine, sine = angles.cos(), angles.sin()
    cosine[0] *= source.config.rope_scaling.attention  # dynamic scaling begins behind any text of calibration
    sine[0] *= source.config.rope_scaling.attention
    return cosine, sine


def _loss_gradient(hidden: Tensor, predict: Callable[[Tensor], Tensor], generator: torch.Generator) -> Tensor:
    """Gradient of the summed negative log likelihood of sampled labels by the last block's output, [seq_len, width].
    predict: from that output to logits."""
    gradients = []
    for tokens in hidden.split(_LOGIT_TOKENS):
        tokens = tokens.detach().requires_grad_()
        logits = predict(tokens)
        labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator).squeeze(1)
        gradients += torch.autograd.grad(functional.cross_entropy(logits, labels, reduction="sum"), tokens)
    return torch.cat(gradients)


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
