"""Routers of the whole model, trained together on what their gates cost and gain in the model's own predictions.

A step draws a price per bit read, reads every slice whose score is above it, and lowers divergence + price · bits. So a
score learns to be the price up to which its slice is worth reading, in the company of all others: gains measured one
linear at a time overlook that errors add up differently at 2 bits, where they are large, than at 6.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from mobiquant.checkpoint import LINEARS, ROUTER_POINTS, block_name
from mobiquant.packing import SLICE_BITS, SLICE_COUNT
from mobiquant.recipes import CalibratedBlock, ModelTask
from mobiquant.recipes.distill import DIVERGENCE_FLOOR
from mobiquant.recipes.own_text import training_windows
from mobiquant.recipes.progress import load_frozen, load_trained, save_progress
from mobiquant.recipes.whole import WholeModel
from mobiquant.router import Router, TrainableRouter, spending_cut, straight_through_gates
from mobiquant.slices import SlicedWeight, unslice_weight

_FILE = "recipe-routers.safetensors"
_SAVE_EVERY = 200
# Steps and windows per step, as shares of those that train the base.
_STEP_SHARE = 0.6
_BATCH_SHARE = 0.5
_RATE = 2e-2
_WARMUP = 0.05
_TEMPERATURE = 0.5
# Average bits that prices are drawn for; low budgets, where the routers matter most, come more often.
_LOWEST_BITS, _HIGHEST_BITS = 2.15, 6.5
_LOW_BITS_POWER = 1.5
_CUT_POINTS = 24
_CUT_WINDOWS = 4


def route_steps(task: ModelTask) -> int:
    """Training steps of the routers."""
    return max(1, round(task.settings.distill_steps * _STEP_SHARE))


def train_routers(task: ModelTask, blocks: Sequence[CalibratedBlock]) -> list[dict[str, Router]]:
    """The routers of `blocks`, trained further, by name in ROUTER_POINTS; goes on where an earlier run stopped."""
    model = _RoutedModel(task, blocks)
    steps, path = route_steps(task), task.folder / _FILE
    batch = max(1, round(task.settings.distill_batch * _BATCH_SHARE))
    windows = torch.from_numpy(training_windows(task, max(steps * batch, _CUT_WINDOWS)))
    cuts = model.cuts(windows[:_CUT_WINDOWS].to(task.device))
    optimizer = torch.optim.AdamW(model.trained.values(), betas=(0.9, 0.98), weight_decay=0.0)
    done = 0
    if path.is_file():
        (done,), _ = load_frozen(path)
        load_trained(path, model.trained, optimizer, done)
    with tqdm(total=steps, initial=done, desc="routers", unit="step", smoothing=0.05) as bar:
        for step in range(done, steps):
            rate = _RATE * min(1.0, (step + 1) / (_WARMUP * steps)) * (1 - step / steps)
            optimizer.param_groups[0]["lr"] = rate
            cut = _drawn_cut(cuts, task.settings.seed * 1_000_003 + step)
            loss = model.loss(windows[step * batch : (step + 1) * batch].to(task.device), cut)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.trained.values(), 1.0)
            optimizer.step()
            bar.update()
            if (step + 1) % _SAVE_EVERY == 0 or step + 1 == steps:
                save_progress(path, (step + 1,), {}, model.trained, optimizer)
    return model.routers()


@dataclass
class _Pricing:
    """What the gates of a forward pass are cut at, and what they read.

    cut: in the unit of scores; None: `depth` for all tokens. spent: bits above the base, float32 [n, seq_len]; scores:
    of every linear, when they are recorded.
    """

    cut: float | None = None
    depth: int = 1
    spent: Tensor | float = 0.0
    scores: list[Tensor] | None = None


class _SharedRouter(nn.Module):
    """One router, run once for the linears that read the same input. weights: how many each of them has."""

    def __init__(self, router: TrainableRouter, weights: list[int], pricing: _Pricing):
        super().__init__()
        self.router = router
        self._bits = SLICE_BITS * torch.tensor(weights, dtype=torch.float32, device=router.head.device)
        self._pricing = pricing
        self._input: Tensor | None = None
        self._scores: Tensor | None = None
        self._gates: Tensor | None = None

    def scores(self, x: Tensor) -> Tensor:
        """float32 [n, seq_len, L, 3]."""
        self._read(x)
        return self._scores

    def gates(self, x: Tensor) -> Tensor:
        """At the pricing's cut, float32 [n, seq_len, L, 4], the first of them 1; counts what they read."""
        self._read(x)
        if self._gates is None:
            gates = straight_through_gates(self._scores, self._pricing.cut, _TEMPERATURE)
            self._pricing.spent = self._pricing.spent + gates.sum(-1) @ self._bits
            self._gates = functional.pad(gates, (1, 0), value=1.0)
        return self._gates

    def forget(self) -> None:
        """Let go of the last pass and its graph."""
        self._input = self._scores = self._gates = None

    def _read(self, x: Tensor) -> None:
        if self._input is not x:
            with torch.autocast(x.device.type, enabled=False):
                self._scores = self.router(x.float().flatten(0, -2)).unflatten(0, x.shape[:-1])
            self._input, self._gates = x, None


class _PricedLinear(nn.Module):
    """A linear with finished slices: base and steps between depths, in the precision that products are computed in."""

    def __init__(self, weight: Tensor, sliced: SlicedWeight, pricing: _Pricing):
        super().__init__()
        self.weight = weight
        self.original = True
        sliced = sliced.to(weight.device)
        depths = [unslice_weight(sliced, depth) for depth in range(1, SLICE_COUNT + 1)]
        steps = [depths[0], *(high - low for low, high in pairwise(depths))]
        # One product for all of them, [4 · rows, columns]: a step's time is that of its launches.
        self._steps = torch.cat(steps).to(torch.bfloat16 if weight.is_cuda else torch.float32)
        self._pricing = pricing
        self._routing: tuple[_SharedRouter, int] | None = None

    def route(self, shared: _SharedRouter, head: int) -> None:
        # A tuple keeps the router out of this module's children.
        self._routing = (shared, head)

    def forward(self, x: Tensor) -> Tensor:
        if self.original:
            return functional.linear(x, self.weight)
        pricing, (shared, head) = self._pricing, self._routing
        products = functional.linear(x, self._steps).unflatten(-1, (SLICE_COUNT, -1))
        if pricing.scores is not None:
            pricing.scores.append(shared.scores(x)[..., head, :].flatten(0, -2).cpu())
        with torch.autocast(x.device.type, enabled=False):  # it would make float32 copies of all products
            if pricing.cut is None:
                return products[..., : pricing.depth, :].sum(-2)
            gates = shared.gates(x)[..., head, :, None].to(products.dtype)
            return (gates * products).sum(-2)


class _RoutedModel:
    """The whole model in slices with trainable routers."""

    def __init__(self, task: ModelTask, blocks: Sequence[CalibratedBlock]):
        self._pricing = _Pricing()
        slices = {block_name(index, name): block.slices[name] for index, block in enumerate(blocks) for name in LINEARS}
        self._model = WholeModel(task, lambda name, weight: _PricedLinear(weight, slices[name], self._pricing))
        self._shared: dict[tuple[int, str], _SharedRouter] = {}
        for index, block in enumerate(blocks):
            for point, names in ROUTER_POINTS.items():
                layers = [self._model.layers[block_name(index, name)] for name in names]
                router = TrainableRouter.thaw(block.routers[point]).to(task.device)
                shared = _SharedRouter(router, [layer.weight.numel() for layer in layers], self._pricing)
                self._shared[index, point] = shared
                for head, layer in enumerate(layers):
                    layer.route(shared, head)
        self.trained = {
            f"{index}.{point}.{name}": parameter
            for (index, point), shared in self._shared.items()
            for name, parameter in shared.router.named_parameters()
        }
        self._budgets = len(next(iter(blocks[0].routers.values())).threshold[0, 0])

    def loss(self, ids: Tensor, cut: float) -> Tensor:
        """Logarithm of divergence + price · bits; ids: int64 [n, seq_len]. The price of a bit is 2^cut nats."""
        self._pricing.cut, self._pricing.spent = cut, 0.0
        divergence = self._model.divergence(ids, torch.bfloat16)
        for shared in self._shared.values():
            shared.forget()
        return (divergence.clamp_min(0) + DIVERGENCE_FLOOR + 2.0**cut * self._pricing.spent.mean()).log()

    @torch.no_grad()
    def cuts(self, ids: Tensor) -> np.ndarray:
        """Cuts that about spend evenly spaced average bits, from the scores at 4 bits; ids: int64 [n, seq_len]."""
        self._pricing.cut, self._pricing.depth, self._pricing.scores = None, 2, []
        self._model.run(ids)
        scores, self._pricing.scores = self._pricing.scores, None
        sizes = [layer.weight.numel() for layer in self._model.layers.values()]
        return np.array(
            [spending_cut(scores, sizes, bits) for bits in np.linspace(_LOWEST_BITS, _HIGHEST_BITS, _CUT_POINTS)]
        )

    def routers(self) -> list[dict[str, Router]]:
        """As stored, their thresholds not yet set."""
        count = 1 + max(index for index, _ in self._shared)
        return [
            {point: self._shared[index, point].router.freeze(self._budgets).cpu() for point in ROUTER_POINTS}
            for index in range(count)
        ]


def _drawn_cut(cuts: np.ndarray, seed: int) -> float:
    """cuts: of evenly spaced average bits. Drawn from the step's own seed, so that a resumed run agrees."""
    place = np.random.default_rng(seed).random() ** _LOW_BITS_POWER * (len(cuts) - 1)
    low = min(math.floor(place), len(cuts) - 2)
    return float(cuts[low] + (place - low) * (cuts[low + 1] - cuts[low]))
