"""The cuts through all scores that spend each budget, measured by routing held-out text, block by block.

Scores depend on what the blocks before have read, so the cut for a budget cannot be found from scores at fixed depths:
the text runs once per candidate cut, routed by it, and budgets are read off between the candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from mobiquant.activations import quantize_activations
from mobiquant.checkpoint import ROUTER_POINTS
from mobiquant.hidden import hidden_states
from mobiquant.linear import Precision
from mobiquant.packing import SLICE_BITS
from mobiquant.router import Router, spending_cut

_CANDIDATES = 18
# Candidates lie between the cuts that would spend these bits if every block before ran at _FIRST_DEPTH.
_LEAST_BITS, _MOST_BITS = 2.01, 7.99
_FIRST_DEPTH = 2
# The ends of a table must be safely outside in float32, whatever the scores' size.
_MARGIN = 1e-3


class RouterScores:
    """Records the scores of a block's routers while it runs."""

    def __init__(self, block: nn.Module):
        self._block = block
        self._scores: dict[str, list[Tensor]] = {point: [] for point in ROUTER_POINTS}
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> RouterScores:
        for point, names in ROUTER_POINTS.items():
            router = self._block.get_submodule(f"router_{point}")

            def record(_: nn.Module, args: tuple[Tensor], point: str = point, router: Router = router) -> None:
                x = quantize_activations(args[0].flatten(0, -2))
                self._scores[point].append(router.scores(x, exact=False).cpu())

            self._hooks.append(self._block.get_submodule(names[0]).register_forward_pre_hook(record))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def per_linear(self) -> list[Tensor]:
        """float32 [tokens, 3] for every linear, in the order of LINEARS."""
        return [scores for point in ROUTER_POINTS for scores in torch.cat(self._scores[point]).unbind(1)]


@torch.no_grad()
def budget_cuts(
    blocks: Sequence[Callable[[], nn.Module]],
    run: Callable[[nn.Module, Tensor], Tensor],
    hidden: Tensor,
    precision: Precision,
    sizes: Sequence[int],
    batch: int,
    device: torch.device,
    folder: Path | None = None,
) -> np.ndarray:
    """The cut for every entry of `precision.budgets`, float32, descending.

    blocks: load the calibrated blocks, which share `precision`, one at a time; run(block, hidden): its output; hidden:
    float32 [windows, seq_len, width], embedded held-out text, taken `batch` windows at a time; sizes: weights of a
    block's linears, in the order of LINEARS; folder: where hidden states between blocks lie, in memory without one.
    """
    count = len(hidden)
    streams = hidden_states((_CANDIDATES * count, *hidden.shape[1:]), device, folder)
    batches = torch.arange(count).split(batch)
    scores: list[Tensor] = []
    bits = np.zeros(_CANDIDATES)
    with tqdm(total=2 * len(blocks), desc="thresholds", unit="block") as bar:
        precision.depth = _FIRST_DEPTH
        streams.write(torch.arange(count), hidden)
        for load in blocks:
            block = load()
            with RouterScores(block) as recorded, precision.keeping():
                for windows in batches:
                    streams.write(windows, run(block, streams.read(windows, device)))
            scores += recorded.per_linear()
            del block
            bar.update()
        weights = list(sizes) * len(blocks)
        highest, lowest = (spending_cut(scores, weights, bound) for bound in (_LEAST_BITS, _MOST_BITS))
        candidates = np.linspace(highest, lowest, _CANDIDATES, dtype=np.float32)
        precision.depth, precision.average_bits = None, sum(precision.budgets[:2]) / 2
        precision.recorded.clear()
        for place in range(_CANDIDATES):
            streams.write(place * count + torch.arange(count), hidden)
        del hidden
        for load in blocks:
            block = load()
            routers = [block.get_submodule(f"router_{point}") for point in ROUTER_POINTS]
            with precision.keeping():
                for place, cut in enumerate(candidates):
                    for router in routers:
                        router.threshold.fill_(float(cut))
                    for windows in batches:
                        own = place * count + windows
                        streams.write(own, run(block, streams.read(own, device)))
                        bits[place] += len(windows) / (count * len(blocks)) * _bits_read(precision, sizes)
            del block, routers
            bar.update()
    cuts = np.interp(precision.budgets, np.maximum.accumulate(bits), candidates)
    above, below = max(float(linear.max()) for linear in scores), min(float(linear.min()) for linear in scores)
    margin = _MARGIN * max(1.0, abs(above), abs(below))
    cuts[0], cuts[-1] = above + margin, below - margin
    return np.minimum.accumulate(cuts).astype(np.float32)


def _bits_read(precision: Precision, sizes: Sequence[int]) -> float:
    """Average bits per weight that the block that ran last has read; forgets its depths."""
    depths = dict(precision.recorded)
    precision.recorded.clear()
    assert len(depths) == len(sizes)
    read = sum(depth.double().mean().item() * sizes[linear] for (_, linear), depth in depths.items())
    return SLICE_BITS * read / sum(sizes)
