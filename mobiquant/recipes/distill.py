"""Slices of the whole model, one after another, each trained at its own depth against the model's own predictions."""

from __future__ import annotations

import torch
from torch import Tensor
from tqdm import tqdm

from mobiquant.checkpoint import LINEARS, block_name
from mobiquant.config import CalibrationSettings
from mobiquant.packing import SLICE_COUNT
from mobiquant.recipes import ModelTask
from mobiquant.recipes.own_text import training_windows
from mobiquant.recipes.progress import load_frozen, load_trained, save_progress
from mobiquant.recipes.trained_slice import Passing, TrainedSlice, slice_optimizer, train_slice
from mobiquant.recipes.whole import WholeModel, tensor_cores
from mobiquant.slices import SlicedWeight

_FILE = "recipe-slices.safetensors"
_SAVE_EVERY = 200
# Per slice: steps as a share of `distill_steps`.
_STEP_SHARES = (1.0, 0.3, 0.15, 0.1)
# In this share of the base's steps up to this share of the tokens, drawn anew in every linear, passes the original
# weights: at a budget between 2 and 4 bits the base stands beside deeper slices and must not count on its own errors
# everywhere else to cancel.
_MIXED_STEPS = 0.5
_MIXED_TOKENS = 0.7
# Nats that int8 activations cost anyway; below it a better slice is no gain.
DIVERGENCE_FLOOR = 3e-4
# bfloat16 is exact enough for the slices whose own error is well above its rounding.
_BFLOAT16_SLICES = 2


def slice_steps(settings: CalibrationSettings) -> list[int]:
    """Training steps of every slice."""
    return [max(1, round(settings.distill_steps * share)) for share in _STEP_SHARES]


def distill(task: ModelTask) -> list[dict[str, SlicedWeight]]:
    """Slices of every block by name in LINEARS, on the CPU; goes on where an earlier run stopped."""
    passing = Passing()
    model = WholeModel(task, lambda _, weight: TrainedSlice(weight, passing))
    steps, path = slice_steps(task.settings), task.folder / _FILE
    (first, done), frozen = load_frozen(path) if path.is_file() else ((1, 0), {})
    _restore(model, frozen)
    if first <= SLICE_COUNT:
        windows = torch.from_numpy(training_windows(task, sum(steps) * task.settings.distill_batch))
        finished = sum(steps[: first - 1]) + done
        with tqdm(total=sum(steps), initial=finished, unit="step", smoothing=0.05) as bar, tensor_cores():
            for number in range(first, SLICE_COUNT + 1):
                _distill_slice(model, passing, task, number, done, windows, bar)
                done = 0
    layers = model.layers
    return [
        {name: layers[block_name(index, name)].sliced() for name in LINEARS} for index in range(task.source.block_count)
    ]


def _distill_slice(
    model: WholeModel, passing: Passing, task: ModelTask, number: int, done: int, windows: Tensor, bar: tqdm
) -> None:
    """Train slice `number` from its step `done` to its end and save it."""
    settings, path = task.settings, task.folder / _FILE
    counts, batch = slice_steps(settings), settings.distill_batch
    before, count = sum(counts[: number - 1]), counts[number - 1]
    for layer in model.layers.values():
        layer.begin(number)
    optimizer = slice_optimizer(model.layers)
    trained = {
        f"{name}.{part}": value for name, layer in model.layers.items() for part, value in layer.trained().items()
    }
    if done:
        load_trained(path, trained, optimizer, done)

    def loss(step: int) -> Tensor:
        start = (before + step) * batch
        _pass_some(passing, task, number, step)
        divergence = model.divergence(windows[start : start + batch].to(task.device), number <= _BFLOAT16_SLICES)
        bar.set_description(f"slice {number}/{SLICE_COUNT}, divergence {divergence.item():.4g}", refresh=False)
        return (divergence.clamp_min(0) + DIVERGENCE_FLOOR).log()

    def after(step: int) -> None:
        bar.update()
        if (step + 1) % _SAVE_EVERY == 0 and step + 1 < count:
            save_progress(path, (number, step + 1), _frozen(model), trained, optimizer)

    train_slice(model.layers, optimizer, range(done, count), loss, after)
    save_progress(path, (number + 1, 0), _frozen(model), {}, None)


def _pass_some(passing: Passing, task: ModelTask, number: int, step: int) -> None:
    """Which share of the tokens passes in this step; drawn from the step's own seed, so that a resumed run agrees."""
    seed = task.settings.seed * 1_000_003 + step
    mixed, share = torch.rand(2, generator=torch.Generator().manual_seed(seed)).tolist()
    passing.share = _MIXED_TOKENS * share if number == 1 and mixed < _MIXED_STEPS else 0.0
    passing.generator = torch.Generator(task.device).manual_seed(seed)


def _frozen(model: WholeModel) -> dict[str, Tensor]:
    parts = ("codes", "scale", "offset")
    return {f"{name}.{part}": getattr(layer, part) for name, layer in model.layers.items() for part in parts}


def _restore(model: WholeModel, frozen: dict[str, Tensor]) -> None:
    for name, value in frozen.items():
        layer, part = name.rsplit(".", 1)
        setattr(model.layers[layer], part, value.to(model.layers[layer].weight.device))
