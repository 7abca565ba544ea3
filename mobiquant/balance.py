"""Balanced channels: activations more even for int8 and 2-bit groups, and a block's function unchanged.

What a linear reads is divided by a factor per channel where it is made (a norm's weight, the rows of the values or of
`up`), and the linear's columns are multiplied by it, as AWQ (arXiv 2306.00978) and SmoothQuant (arXiv 2211.10438) do.
A group of 128 shares one step of int8, so even channels lose less; and columns that meet large activations get the
larger share of a group's levels. Owns the factors, how they are measured and where they go; nothing later knows them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from mobiquant.block import DecoderBlock
from mobiquant.checkpoint import ROUTER_POINTS, read_tensors, write_tensors
from mobiquant.hidden import hidden_states
from mobiquant.sensitivity import position_embeddings
from mobiquant.source import Source

# 0 leaves activations as they are, 1 makes them even and leaves all the unevenness to the weights. What int8 costs is
# least at 0.7, the trained slices' own error at 0.25.
_EXPONENT = 0.3
# Channels that are nearly silent count as this share of the root mean square over all channels.
_QUIETEST = 1e-2
_PASS_TOKENS = 32768


@dataclass(frozen=True)
class Balance:
    """Factors of one block, float32: attention [width], value [kv heads * head_dim], ffn [width], inner
    [intermediate]. Each has the geometric mean 1."""

    attention: Tensor
    value: Tensor
    ffn: Tensor
    inner: Tensor

    @torch.no_grad()
    def apply(self, block: DecoderBlock) -> None:
        """Scale the block's weights in place."""
        attention, mlp, spec = block.self_attn, block.mlp, block.spec
        device = mlp.down_proj.weight.device
        width, value, ffn, inner = (
            factors.to(device) for factors in (self.attention, self.value, self.ffn, self.inner)
        )
        shared = spec.num_attention_heads // spec.num_key_value_heads
        output = value.unflatten(0, (-1, spec.head_dim)).repeat_interleave(shared, dim=0).flatten()
        block.input_layernorm.weight.div_(width)
        for name in ("q_proj", "k_proj", "v_proj"):
            attention.get_submodule(name).weight.mul_(width)
        attention.v_proj.weight.div_(value[:, None])
        if hasattr(attention, "v_bias"):
            attention.v_bias.div_(value)
        attention.o_proj.weight.mul_(output)
        block.get_submodule(spec.ffn_norm).weight.div_(ffn)
        for linear in (mlp.gate_proj, mlp.up_proj):
            linear.weight.mul_(ffn)
        mlp.up_proj.weight.div_(inner[:, None])
        mlp.down_proj.weight.mul_(inner)


def balanced(source: Source, balances: list[Balance]) -> Source:
    """The same model with balanced blocks."""
    return source.adjusted(lambda index, block: balances[index].apply(block))


def save_balances(path: Path, balances: list[Balance]) -> None:
    """For a run that goes on."""
    factors = {
        f"{index}.{name}": value for index, balance in enumerate(balances) for name, value in vars(balance).items()
    }
    write_tensors(path, {name: value.numpy() for name, value in factors.items()})


def load_balances(path: Path) -> list[Balance]:
    """Inverse of `save_balances`."""
    tensors = {name: torch.from_numpy(value) for name, value in read_tensors(path).items()}
    names = [field.name for field in fields(Balance)]
    return [Balance(*(tensors[f"{index}.{name}"] for name in names)) for index in range(len(tensors) // len(names))]


@torch.no_grad()
def measure_balance(
    source: Source, windows: np.ndarray, batch: int, device: torch.device, folder: Path | None = None
) -> list[Balance]:
    """Factors of every block from one pass of the full-precision model over the first of `windows`, int64 [n, seq_len].

    batch: windows that pass a block together; folder: where hidden states lie, in memory without one.
    """
    count = min(len(windows), max(1, _PASS_TOKENS // windows.shape[1]))
    ids, batches = torch.from_numpy(windows[:count]), torch.arange(count).split(batch)
    hidden = hidden_states((count, windows.shape[1], source.config.hidden_size), device, folder)
    positions = position_embeddings(source, windows.shape[1], device)
    for chosen in batches:
        hidden.write(chosen, source.embed(ids[chosen]))
    balances = []
    for index in tqdm(range(source.block_count), desc="balance", unit="block"):
        block = source.block(index, device)
        squares = {point: torch.zeros((), device=device) for point in ROUTER_POINTS}
        hooks = [
            block.get_submodule(names[0]).register_forward_pre_hook(
                # Bound now: `squares` is another dictionary in the next block.
                lambda _, args, sums=squares, point=point: sums.update({point: sums[point] + _sums(args[0])})
            )
            for point, names in ROUTER_POINTS.items()
        ]
        for chosen in batches:
            hidden.write(chosen, block(hidden.read(chosen, device), position_embeddings=positions))
        for hook in hooks:
            hook.remove()
        spec = source.config
        heads = squares["attn_out"].unflatten(0, (spec.num_key_value_heads, -1, spec.head_dim))
        squares["attn_out"] = heads.mean(1).flatten()
        balances.append(Balance(*(_factors(squares[point]) for point in ROUTER_POINTS)))
        del block
    return balances


def _sums(x: Tensor) -> Tensor:
    """Squares of [windows, tokens, channels], summed per channel."""
    return x.square().sum((0, 1))


def _factors(squares: Tensor) -> Tensor:
    """From sums of squares per channel."""
    mean = squares.mean().clamp_min(torch.finfo(torch.float32).tiny)
    logarithm = (squares / mean).clamp_min(_QUIETEST**2).log() * (_EXPONENT / 2)
    return (logarithm - logarithm.mean()).exp().cpu()
