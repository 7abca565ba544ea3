"""The best recipe, by measurement: slices distilled from the whole model, then routers fitted block by block.

The slices are chosen before the loop over blocks (mobiquant.recipes.distill). What is left for a block is to measure
what every slice is worth to every token, and to fit the routers to it.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from mobiquant.checkpoint import LINEARS, ROUTER_POINTS
from mobiquant.config import CalibrationSettings
from mobiquant.recipes import BlockTask, CalibratedBlock
from mobiquant.recipes.gains import fit_router, measure_gains
from mobiquant.router import Router, TrainableRouter
from mobiquant.slices import SlicedWeight, unslice_weight


def step_count(_: CalibrationSettings) -> int:
    """One step per router."""
    return len(ROUTER_POINTS)


def calibrate_block(task: BlockTask) -> CalibratedBlock:
    """Fit the routers to the slices of `task`; its block is changed in place."""
    assert task.slices is not None
    layers = {name: _FrozenLinear(task.block.get_submodule(name).weight, task.slices[name]) for name in LINEARS}
    for name, layer in layers.items():
        task.block.set_submodule(name, layer)

    def run(windows: Tensor, depth: int) -> None:
        for layer in layers.values():
            layer.depth = depth
        task.block(task.inputs[windows].to(task.device), position_embeddings=task.positions)

    examples = measure_gains(task, lambda name, depth: layers[name].weights[depth], run)
    routers: dict[str, Router] = {}
    for point, names in ROUTER_POINTS.items():
        columns = layers[names[0]].weights[0].shape[1]
        router = TrainableRouter(columns, len(names), task.quantization.router.hidden_size, task.generator)
        fit_router(router.to(task.device), examples[point], task.settings.router_lr, task.generator)
        routers[point] = router.freeze(len(task.quantization.router.budgets))
        task.advance("routers")
    return CalibratedBlock(task.slices, routers)


class _FrozenLinear(nn.Module):
    """A linear at one depth. weights: float32 [rows, columns] at depths 1 to 4, after the original ones at depth 0."""

    def __init__(self, weight: Tensor, sliced: SlicedWeight):
        super().__init__()
        self.depth = 1
        self.weights = [weight, *(unslice_weight(sliced, depth).to(weight.device) for depth in (1, 2, 3, 4))]

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weights[self.depth])
