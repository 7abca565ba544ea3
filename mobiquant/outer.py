"""How deep the embedding and the output head are read by default: as little as costs under one per cent of perplexity.

Both are measured alone, with the blocks in full precision, on held-out windows. Memory holds one block or the head
twice, logits of a few tokens, and the hidden states of five streams (the exact embedding and four depths), which may
lie on disk.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from mobiquant.activations import quantize_activations
from mobiquant.hidden import HiddenStates, hidden_states
from mobiquant.linear import SliceEmbedding
from mobiquant.packing import SLICE_COUNT
from mobiquant.sensitivity import position_embeddings
from mobiquant.slices import SlicedWeight, unslice_weight
from mobiquant.source import Source

MAX_COST = 0.01
_DEPTHS = range(1, SLICE_COUNT + 1)
_WINDOWS = 8  # enough: all pairs of depths see the same tokens, so only the difference between them matters
_LOGIT_TOKENS = 256


@dataclass(frozen=True)
class OuterCosts:
    """By embedding depth and head depth, float64 [4, 4]. perplexity: its growth over full precision, relative;
    divergence: mean KL divergence from full precision, nats a token."""

    perplexity: np.ndarray
    divergence: np.ndarray

    def choose(self) -> tuple[int, int]:
        """(embedding depth, head depth), the least below MAX_COST, or the full depths.

        The head's is decided first: every token reads all of the head, but one row of the embedding, which is therefore
        never shallower. On a text that the model knows badly an error may even lower the perplexity, so the divergence,
        which is what the perplexity would grow by on the model's own text, has to be as small.
        """
        cost = np.maximum(self.perplexity, self.divergence)
        pairs = ((embedding, head) for head in _DEPTHS for embedding in _DEPTHS if embedding >= head)
        good = (pair for pair in pairs if cost[pair[0] - 1, pair[1] - 1] < MAX_COST)
        return next(good, (SLICE_COUNT, SLICE_COUNT))


@torch.no_grad()
def measure_outer(
    source: Source,
    embedding: SlicedWeight,
    head: SlicedWeight,
    windows: np.ndarray,
    batch: int,
    device: torch.device,
    folder: Path | None = None,
) -> OuterCosts:
    """Costs on the first of `windows`, int64 [windows, seq_len]. batch: windows computed together.

    embedding, head: the two as sliced, on the CPU; the same object when tied. folder: where hidden states lie, in
    memory without one.
    """
    ids = torch.from_numpy(windows[:_WINDOWS])
    count, seq_len = ids.shape
    streams = hidden_states(((len(_DEPTHS) + 1) * count, seq_len, source.config.hidden_size), device, folder)
    streams.write(torch.arange(count), source.embed(ids))
    for depth in _DEPTHS:
        table = SliceEmbedding(embedding, depth, source.config.embedding_scale)
        streams.write(depth * count + torch.arange(count), table(ids))
    positions = position_embeddings(source, seq_len, device)
    for index in tqdm(range(source.block_count), desc="embedding and head", unit="block"):
        block = source.block(index, device)
        for part in torch.arange(streams.shape[0]).split(batch):
            streams.write(part, block(streams.read(part, device), position_embeddings=positions))
        del block
    norm, full = source.final_norm().to(device), source.head().to(device)
    sums = np.stack(
        [_compare(source, streams, ids, norm, full, unslice_weight(head, depth).to(device)) for depth in _DEPTHS],
        axis=1,
    )
    nll, divergence = np.moveaxis(sums / (ids.shape[0] * (ids.shape[1] - 1)), 2, 0)
    return OuterCosts(np.expm1(nll), divergence)


def _compare(
    source: Source, streams: HiddenStates, ids: Tensor, norm: nn.Module, full: Tensor, head: Tensor
) -> np.ndarray:
    """float64 [4, 2], sums over tokens for the streams after the first, with `head` float32 [vocab, width]: what they
    add to the negative log likelihood of the first stream with the head `full`, and their divergence from it."""
    sums = np.zeros((len(_DEPTHS), 2))
    for window, targets in enumerate(ids):
        states = streams.read(torch.arange(window, streams.shape[0], len(ids)), head.device)
        for start in range(0, len(targets) - 1, _LOGIT_TOKENS):
            following = targets[start + 1 : start + 1 + _LOGIT_TOKENS, None].to(head.device)
            exact, *others = (norm(stream[start : start + len(following)]) for stream in states)
            expected = source.capped(exact @ full.T).log_softmax(-1)
            for place, x in enumerate(others):
                found = source.capped(quantize_activations(x).dequantized() @ head.T).log_softmax(-1)
                missed = expected.gather(1, following) - found.gather(1, following)
                apart = functional.kl_div(found, expected, reduction="sum", log_target=True)
                sums[place] += missed.double().sum().item(), apart.double().item()
    return sums
