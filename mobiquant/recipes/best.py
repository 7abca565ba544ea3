"""The best recipe, by measurement: slices trained one after another, then routers fitted to what each slice is worth.

Where the whole model fits on the device, its slices are trained against its own predictions before the loop over blocks
(mobiquant.recipes.distill), and after the loop its routers too (mobiquant.recipes.route). Where it does not, the slices
of a block are trained in the loop, against the output of the full-precision block.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from mobiquant.checkpoint import LINEARS, ROUTER_POINTS
from mobiquant.config import CalibrationSettings
from mobiquant.hidden import HiddenStates
from mobiquant.packing import SLICE_COUNT
from mobiquant.recipes import BlockTask, CalibratedBlock, ModelTask
from mobiquant.recipes.distill import distill, slice_steps
from mobiquant.recipes.gains import fit_router, measure_gains, set_level
from mobiquant.recipes.route import train_routers
from mobiquant.recipes.trained_slice import SliceTraining
from mobiquant.recipes.whole import fits
from mobiquant.router import Router, TrainableRouter
from mobiquant.slices import SlicedWeight, unslice_weight

# What a block takes of the steps and of the windows per step that a whole model takes.
_STEP_SHARE = 0.5
_BATCH_SHARE = 0.25
# How much of a token's own gain, against its linear's mean, a score keeps: gains measured one by one spread more than
# what a slice is worth beside all others, where large errors no longer add up.
_TOKEN_SHARE = 0.5
# The first slices' own error is well above bfloat16's rounding.
_COARSE_SLICES = 2
# Relative error below which a better slice is no gain.
_ERROR_FLOOR = 1e-6


def choose_slices(task: ModelTask) -> list[dict[str, SlicedWeight]] | None:
    """The slices of every block by name in LINEARS, or None when the device cannot hold the whole model."""
    return distill(task) if fits(task.source, task.settings, task.device) else None


def tune_routers(task: ModelTask, block: Callable[[int], CalibratedBlock]) -> list[dict[str, Router]] | None:
    """The routers of all blocks, trained further in the whole model; None when the device cannot hold it."""
    if not fits(task.source, task.settings, task.device):
        return None
    return train_routers(task, [block(index) for index in range(task.source.block_count)])


def step_count(settings: CalibrationSettings, slices_chosen: bool) -> int:
    """One step per router, and those of the slices when they are trained in the block."""
    return len(ROUTER_POINTS) + (0 if slices_chosen else sum(_block_steps(settings)))


def calibrate_block(task: BlockTask) -> CalibratedBlock:
    """Train the slices, unless `task` brings them, and fit routers to them; the task's block is changed in place."""
    slices = task.slices or _train_slices(task)
    layers = {name: _FrozenLinear(task.block.get_submodule(name).weight, slices[name]) for name in LINEARS}
    for name, layer in layers.items():
        task.block.set_submodule(name, layer)

    def run(windows: Tensor, depth: int) -> None:
        for layer in layers.values():
            layer.read(depth)
        task.block(task.inputs.read(windows, task.device), position_embeddings=task.positions)

    examples = measure_gains(task, lambda name, depth: layers[name].weight_at(depth), run)
    routers: dict[str, Router] = {}
    for point, names in ROUTER_POINTS.items():
        columns = layers[names[0]].weight_at(0).shape[1]
        router = TrainableRouter(columns, len(names), task.quantization.router.hidden_size, task.generator)
        fit_router(router.to(task.device), examples[point], task.settings.router_lr, task.generator)
        with torch.no_grad():
            router.head *= _TOKEN_SHARE
        set_level(router, examples[point])
        routers[point] = router.freeze(len(task.quantization.router.budgets))
        task.advance("routers")
    return CalibratedBlock(slices, routers)


class _FrozenLinear(nn.Module):
    """A linear at one depth at a time: the weights of all would be four more blocks."""

    def __init__(self, weight: Tensor, sliced: SlicedWeight):
        super().__init__()
        self._original, self._sliced = weight.detach(), sliced.to(weight.device)
        self._depth, self._weight = 0, self._original

    def weight_at(self, depth: int) -> Tensor:
        """float32 [rows, columns] at depth 1 to 4, the original weight at depth 0."""
        return unslice_weight(self._sliced, depth) if depth else self._original

    def read(self, depth: int) -> None:
        """Compute at this depth from now on."""
        if depth != self._depth:
            self._depth, self._weight = depth, self.weight_at(depth)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self._weight)


def _kept(states: HiddenStates, windows: Tensor, device: torch.device) -> Callable[[Tensor], Tensor]:
    """From places in `windows` to their states on the device; where that is a GPU, all of them are copied there now."""
    if device.type == "cpu":
        return lambda places: states.read(windows[places], device)
    there = states.read(windows, device)
    return lambda places: there[places.to(device)]


def _block_steps(settings: CalibrationSettings) -> list[int]:
    return [max(1, round(count * _STEP_SHARE)) for count in slice_steps(settings)]


def _train_slices(task: BlockTask) -> dict[str, SlicedWeight]:
    """Slice after slice on the windows that came here at its depth; the block is left as it was."""
    originals = {name: task.block.get_submodule(name) for name in LINEARS}
    training = SliceTraining()
    for name, linear in originals.items():
        layer = training.add(name, linear.weight)
        layer.original = False
        task.block.set_submodule(name, layer)
    batch = max(1, round(task.settings.distill_batch * _BATCH_SHARE))
    for number, count in enumerate(_block_steps(task.settings), start=1):
        training.begin(number)
        if number == 1:  # the training holds the weights now: they need not be there twice
            for name, linear in originals.items():
                linear.weight = nn.Parameter(training.layers[name].weight, requires_grad=False)
        stage = f"slice {number}/{SLICE_COUNT}"
        loss = _block_loss(task, number, batch)
        training.train(training.optimizer(), range(count), loss, lambda _, stage=stage: task.advance(stage))
    for name, linear in originals.items():
        task.block.set_submodule(name, linear)
    return {name: training.sliced(name) for name in originals}


def _block_loss(task: BlockTask, number: int, batch: int) -> Callable[[int], Tensor]:
    """What a step of slice `number` lowers, on `batch` of the windows that came here at its depth."""
    own = torch.nonzero(task.depths == number).flatten()
    inputs, targets = (_kept(states, own, task.device) for states in (task.inputs, task.targets))
    coarse = task.device.type == "cuda" and number <= _COARSE_SLICES

    def loss(_: int) -> Tensor:
        chosen = torch.randint(len(own), (batch,), generator=task.generator)
        with torch.autocast(task.device.type, torch.bfloat16, enabled=coarse):
            output = task.block(inputs(chosen), position_embeddings=task.positions)
        target = targets(chosen)
        # Per token: a few have outputs a thousand times larger than the others.
        error = (output - target).square().sum(-1) / target.square().sum(-1).clamp_min(1e-12)
        return (error.mean() + _ERROR_FLOOR).log()

    return loss
