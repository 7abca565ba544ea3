"""The paper's recipe: learned clipping of the base, then slices and routers together (arXiv 2602.20191, section 3).

Stage 1 learns the clipping of the base slice alone. Then the routers are fitted to measured gains. Stage 2 learns
clipping and routers jointly: steps at a window's own depth alternate with routed steps at a sampled target of average
bits. The loss is the logarithm of the relative error, so that every depth weighs the same: clipping helps the base by a
few per cent, and can make 8 bits ten times worse.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mobiquant.checkpoint import LINEARS, ROUTER_POINTS
from mobiquant.config import CalibrationSettings
from mobiquant.packing import SLICE_BITS, SLICE_COUNT
from mobiquant.recipes import BlockTask, CalibratedBlock
from mobiquant.recipes.gains import Examples, fit_router, measure_gains, set_level
from mobiquant.router import TrainableRouter, spending_cut, straight_through_gates
from mobiquant.slices import decode_straight_through, join_groups, scale_offset, slice_weight, split_groups

# sigmoid(5) = 0.993: nearly the whole range, with a gradient left.
_INITIAL_CLIP = 5.0
_TEMPERATURE = 1.0
# The routers arrive fitted; at the full step size the gates' noisy gradient undoes that.
_ROUTER_TUNING = 0.1


def step_count(settings: CalibrationSettings, _: bool) -> int:
    """Training steps per block: two stages, every epoch all windows, in batches of one depth."""
    counts = [len(range(depth, settings.samples, SLICE_COUNT)) for depth in range(SLICE_COUNT)]
    return 2 * settings.epochs * sum(-(-count // settings.batch) for count in counts)


@dataclass
class _Mode:
    """What the layers of the block in training compute: one depth, or, when `cut` is set, gates of the routers.

    bits_read: average bits of every linear of the last routed call, with a gradient.
    """

    depth: int = 1
    cut: float | None = None
    bits_read: dict[str, Tensor] = field(default_factory=dict)


class _ClippedLinear(nn.Module):
    """A linear whose sliced weights are computed from learned clipping at every call."""

    def __init__(self, name: str, weight: Tensor, mode: _Mode, router: TrainableRouter, head: int):
        super().__init__()
        self.name = name
        self.weight = weight
        self.groups = split_groups(weight)
        self.gamma = nn.Parameter(torch.full((*self.groups.shape[:2], 1), _INITIAL_CLIP, device=weight.device))
        self.beta = nn.Parameter(torch.full_like(self.gamma, _INITIAL_CLIP))
        self._mode = mode
        # A tuple keeps the router out of this module's children.
        self._routing = (router, head)

    def weight_at(self, depth: int) -> Tensor:
        """float32 [rows, columns]."""
        scale, offset = scale_offset(self.groups, self.gamma, self.beta)
        return join_groups(decode_straight_through(self.groups, scale, offset, depth), self.weight.shape[1])

    def forward(self, x: Tensor) -> Tensor:
        mode = self._mode
        if mode.cut is None:
            return x @ self.weight_at(mode.depth).T
        router, head = self._routing
        gates = straight_through_gates(router(x.flatten(0, -2))[:, head], mode.cut, _TEMPERATURE)
        mode.bits_read[self.name] = SLICE_BITS * (1 + gates.sum(-1).mean())
        weights = [self.weight_at(depth) for depth in range(1, SLICE_COUNT + 1)]
        result = x @ weights[0].T
        for gate, low, high in zip(gates.unbind(-1), weights, weights[1:], strict=False):
            result = result + gate.view(*x.shape[:-1], 1) * (x @ (high - low).T)
        return result


class _BlockTraining:
    """One block with its layers replaced by trainable ones, and the losses of both stages."""

    def __init__(self, task: BlockTask):
        self.task = task
        self.mode = _Mode()
        self.routers: dict[str, TrainableRouter] = {}
        self.layers: dict[str, _ClippedLinear] = {}
        for point, names in ROUTER_POINTS.items():
            weights = {name: task.block.get_submodule(name).weight for name in names}
            columns, hidden_size = weights[names[0]].shape[1], task.quantization.router.hidden_size
            router = TrainableRouter(columns, len(names), hidden_size, task.generator).to(task.device)
            self.routers[point] = router
            for head, name in enumerate(names):
                self.layers[name] = _ClippedLinear(name, weights[name], self.mode, router, head)
                task.block.set_submodule(name, self.layers[name])

    def clipping(self) -> list[nn.Parameter]:
        return [parameter for layer in self.layers.values() for parameter in (layer.gamma, layer.beta)]

    def routing(self) -> list[nn.Parameter]:
        return [parameter for router in self.routers.values() for parameter in router.parameters()]

    def error_at(self, windows: Tensor, depth: int) -> Tensor:
        """Logarithm of the block's mean relative error, one depth for all tokens."""
        self.mode.depth, self.mode.cut = depth, None
        return self._log_error(windows)

    def routed_error(self, windows: Tensor, bits: float, examples: dict[str, Examples]) -> Tensor:
        """The same with routed depths near `bits` on average, plus lambda·(average bits - target)²."""
        with torch.no_grad():
            scores = [self.routers[point](examples[point].inputs).unbind(1) for point in ROUTER_POINTS]
        sizes = [self.layers[name].weight.numel() for name in LINEARS]
        self.mode.cut = spending_cut([linear for linears in scores for linear in linears], sizes, bits)
        error = self._log_error(windows)
        spent = sum(self.mode.bits_read[name] * size for name, size in zip(LINEARS, sizes, strict=True)) / sum(sizes)
        return error + self.task.settings.lambda_bits * (spent - bits) ** 2

    @torch.no_grad()
    def examples(self) -> dict[str, Examples]:
        """Measured gains with the clipping as it is now."""

        def weight_at(name: str, depth: int) -> Tensor:
            return self.layers[name].weight_at(depth) if depth else self.layers[name].weight

        return measure_gains(self.task, weight_at, self.error_at)

    def _log_error(self, windows: Tensor) -> Tensor:
        """Squared error of a token relative to its target, so that a few huge tokens do not decide; mean, logarithm."""
        task = self.task
        target = task.targets.read(windows, task.device)
        output = task.block(task.inputs.read(windows, task.device), position_embeddings=task.positions)
        relative = (output - target).square().sum(-1) / target.square().sum(-1).clamp_min(1e-12)
        return relative.mean().log()


def calibrate_block(task: BlockTask) -> CalibratedBlock:
    """Run both stages on one block; the block of `task` is changed in place."""
    settings = task.settings
    training = _BlockTraining(task)

    optimizer = torch.optim.AdamW(training.clipping(), lr=settings.clip_lr, weight_decay=0.0)
    for windows in _batches(task, optimizer, "base slice"):
        _step(optimizer, training.error_at(windows, 1))

    examples = training.examples()
    for point, router in training.routers.items():
        fit_router(router, examples[point], settings.router_lr, task.generator)

    groups = [
        {"params": training.clipping(), "lr": settings.clip_lr},
        {"params": training.routing(), "lr": settings.router_lr * _ROUTER_TUNING},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    for number, windows in enumerate(_batches(task, optimizer, "all slices")):
        depth = int(task.depths[windows[0]])
        if number % 2 == 0:
            _step(optimizer, training.error_at(windows, depth))
        else:
            # Near the depth of the inputs, as in use: what a block gets is as good as what it is asked for.
            middle = SLICE_BITS * depth + 2 * torch.rand((), generator=task.generator).item() - 1
            bits = min(max(middle, SLICE_BITS), SLICE_BITS * SLICE_COUNT)
            _step(optimizer, training.routed_error(windows, bits, examples))

    examples = training.examples()
    for point, router in training.routers.items():
        set_level(router, examples[point])
    return CalibratedBlock(
        {name: slice_weight(x.weight, x.gamma.detach(), x.beta.detach()) for name, x in training.layers.items()},
        {point: router.freeze(len(task.quantization.router.budgets)) for point, router in training.routers.items()},
    )


def _batches(task: BlockTask, optimizer: torch.optim.Optimizer, stage: str) -> Iterator[Tensor]:
    """Window numbers of every step, int64 [batch], all at one depth, in seeded order; the step size falls to 0."""
    settings = task.settings
    done, total = 0, step_count(settings, False) / 2
    initial = [group["lr"] for group in optimizer.param_groups]
    for _ in range(settings.epochs):
        batches = []
        for depth in task.depths.unique():
            windows = torch.nonzero(task.depths == depth).flatten()
            order = torch.randperm(len(windows), generator=task.generator)
            batches += windows[order].split(settings.batch)
        for number in torch.randperm(len(batches), generator=task.generator).tolist():
            for group, rate in zip(optimizer.param_groups, initial, strict=True):
                group["lr"] = rate * (1 - done / total)
            yield batches[number]
            done += 1
            task.advance(stage)


def _step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
