"""What each residual slice is worth, token by token: the measured targets that routers are fitted to.

The gain of slice e at a token is the drop of the linear's expected cost, in nats of the model's divergence, when its
depth goes from e-1 to e, divided by the bits then read. Measured in one unit for every linear of the model, so that one
cut through all scores spends the bits where they help most.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from mobiquant.activations import quantize_activations
from mobiquant.checkpoint import LINEARS, ROUTER_POINTS
from mobiquant.packing import SLICE_BITS, SLICE_COUNT
from mobiquant.recipes import BlockTask
from mobiquant.router import TrainableRouter

TOKENS_PER_WINDOW = 128
FIT_STEPS = 200
_FIT_TOKENS = 1024
_LEAST_GAIN = 1e-30


@dataclass(frozen=True)
class Examples:
    """Sampled tokens at one router: inputs float32 [tokens, columns], gains float32 [tokens, L, 3], nats per bit."""

    inputs: Tensor
    gains: Tensor


@torch.no_grad()
def measure_gains(
    task: BlockTask, weight_at: Callable[[str, int], Tensor], run: Callable[[Tensor, int], object]
) -> dict[str, Examples]:
    """Examples per router point, from TOKENS_PER_WINDOW random tokens of every window.

    weight_at(name, depth): sliced weights float32 [rows, columns], depth 0 for the original ones; run(windows, depth):
    runs the task's block on windows int64 [n] at one depth.
    """
    caught: dict[str, Tensor] = {}
    hooks = [
        task.block.get_submodule(names[0]).register_forward_pre_hook(
            lambda _, args, point=point: caught.update({point: args[0]})
        )
        for point, names in ROUTER_POINTS.items()
    ]
    count = len(task.depths)
    chosen = [torch.randperm(task.inputs.shape[1], generator=task.generator)[:TOKENS_PER_WINDOW] for _ in range(count)]
    inputs: dict[str, list[Tensor]] = {point: [torch.empty(0)] * count for point in ROUTER_POINTS}
    # Depth after depth, so that the weights of one alone are there.
    for window in torch.argsort(task.depths, stable=True).tolist():
        run(torch.tensor([window]), int(task.depths[window]))
        tokens = chosen[window].to(task.device)
        for point in ROUTER_POINTS:
            inputs[point][window] = quantize_activations(caught[point][0, tokens]).dequantized()
    for hook in hooks:
        hook.remove()
    gains: dict[str, list[Tensor]] = {point: [] for point in ROUTER_POINTS}
    for point, names in ROUTER_POINTS.items():
        for name in names:
            errors = [weight_at(name, depth) - weight_at(name, 0) for depth in range(1, SLICE_COUNT + 1)]
            place, bits = LINEARS.index(name), SLICE_BITS * errors[0].numel()
            row_cost = task.row_cost[place].to(task.device)
            per_window = []
            for window, x in enumerate(inputs[point]):
                token_cost = task.token_cost[place, window, chosen[window]].to(task.device)
                cost = [0.5 * token_cost * ((x @ error.T).square() @ row_cost) for error in errors]
                per_window.append(torch.stack([(a - b) / bits for a, b in pairwise(cost)], 1))
            gains[point].append(torch.cat(per_window))
    return {point: Examples(torch.cat(inputs[point]), torch.stack(gains[point], 1)) for point in ROUTER_POINTS}


def fit_router(router: TrainableRouter, examples: Examples, learning_rate: float, generator: torch.Generator) -> None:
    """Fit scores s to log2 of the expected gain g, by the loss g·2^-s + s·ln 2, whose minimum is that expectation.

    A plain fit to log2 g would find the mean of the logarithm and so undervalue what is rare but large.
    """
    gains = examples.gains.clamp_min(0)
    set_level(router, examples)
    unit = gains.mean(0).clamp_min(_LEAST_GAIN).log2()
    optimizer = torch.optim.AdamW(router.parameters(), lr=learning_rate, weight_decay=0.0)
    for step in range(FIT_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * (1 - step / FIT_STEPS)
        chosen = torch.randint(len(gains), (_FIT_TOKENS,), generator=generator).to(gains.device)
        scores = router(examples.inputs[chosen]) - unit
        relative = gains[chosen] * torch.exp2(-unit)
        loss = (relative * torch.exp2(-scores) + scores * math.log(2)).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(router.parameters(), 1.0)
        optimizer.step()
    set_level(router, examples)


@torch.no_grad()
def set_level(router: TrainableRouter, examples: Examples) -> None:
    """Shift every head so that its expected gain over the examples is the measured one; the ranking of tokens stays."""
    measured = examples.gains.mean(0).clamp_min(_LEAST_GAIN).log2()
    scores = router(examples.inputs)
    predicted = torch.logsumexp(scores * math.log(2), 0) / math.log(2) - math.log2(len(scores))
    router.head_bias += measured - predicted
