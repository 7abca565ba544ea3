"""Slices of the whole model, one after another, each trained at its own depth against the model's own predictions."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from tqdm import tqdm

from mobiquant.checkpoint import LINEARS, block_name
from mobiquant.config import CalibrationSettings
from mobiquant.packing import SLICE_COUNT
from mobiquant.recipes import ModelTask
from mobiquant.recipes.own_text import training_windows
from mobiquant.recipes.progress import load_frozen, load_trained, save_progress
from mobiquant.recipes.trained_slice import Passing, SliceTraining
from mobiquant.recipes.whole import WholeModel
from mobiquant.slices import SlicedWeight

_FILE = "recipe-slices.safetensors"
_SAVE_EVERY = 200
# Per slice: steps as a share of `distill_steps`.
_STEP_SHARES = (1.0, 0.4, 0.3, 0.15)
# In this share of the base's steps up to this share of the tokens, drawn anew in every linear, passes the original
# weights: at a budget between 2 and 4 bits the base stands beside deeper slices and must not count on its own errors
# everywhere else to cancel.
_MIXED_STEPS = 0.5
_MIXED_TOKENS = 0.7
# Nats that int8 activations cost anyway; below it a better slice is no gain.
DIVERGENCE_FLOOR = 3e-4
# What products are computed in on a GPU: bfloat16 for the slices whose own error is well above its rounding, float16,
# three bits more exact, for the others.
_DTYPES = (torch.bfloat16, torch.bfloat16, torch.float16, torch.float16)
# Keeps gradients inside float16's range; AdamW's steps do not depend on it.
_LOSS_SCALE = 1024.0


def slice_steps(settings: CalibrationSettings) -> list[int]:
    """Training steps of every slice."""
    return [max(1, round(settings.distill_steps * share)) for share in _STEP_SHARES]


def distill(task: ModelTask) -> list[dict[str, SlicedWeight]]:
    """Slices of every block by name in LINEARS, on the CPU; goes on where an earlier run stopped."""
    training = SliceTraining()
    model = WholeModel(task, training.add)
    steps, path = slice_steps(task.settings), task.folder / _FILE
    first, done = 1, 0
    if path.is_file():
        (first, done), frozen = load_frozen(path)
        training.restore(frozen)
    if first <= SLICE_COUNT:
        windows = torch.from_numpy(training_windows(task, sum(steps) * task.settings.distill_batch))
        finished = sum(steps[: first - 1]) + done
        with tqdm(total=sum(steps), initial=finished, unit="step", smoothing=0.05) as bar:
            for number in range(first, SLICE_COUNT + 1):
                _distill_slice(model, training, task, number, done, windows, bar)
                done = 0
    blocks = range(task.source.block_count)
    return [{name: training.sliced(block_name(index, name)) for name in LINEARS} for index in blocks]


def _distill_slice(
    model: WholeModel, training: SliceTraining, task: ModelTask, number: int, done: int, windows: Tensor, bar: tqdm
) -> None:
    """Train slice `number` from its step `done` to its end and save it."""
    settings, path = task.settings, task.folder / _FILE
    counts, batch = slice_steps(settings), settings.distill_batch
    before, count = sum(counts[: number - 1]), counts[number - 1]
    training.begin(number)
    optimizer = training.optimizer()
    if done:
        load_trained(path, training.trained(), optimizer, done)

    def loss(step: int) -> Tensor:
        start = (before + step) * batch
        _pass_some(training.passing, task, number, step)
        divergence = model.divergence(windows[start : start + batch].to(task.device), _DTYPES[number - 1])
        value = divergence.item()
        if not math.isfinite(value):
            raise ArithmeticError(f"slice {number}, step {step}: expected a finite divergence, found {value}")
        bar.set_description(f"slice {number}/{SLICE_COUNT}, divergence {value:.4g}", refresh=False)
        return _LOSS_SCALE * (divergence.clamp_min(0) + DIVERGENCE_FLOOR).log()

    def after(step: int) -> None:
        bar.update()
        if (step + 1) % _SAVE_EVERY == 0 and step + 1 < count:
            save_progress(path, (number, step + 1), training.frozen(), training.trained(), optimizer)

    training.train(optimizer, range(done, count), loss, after)
    save_progress(path, (number + 1, 0), training.frozen(), {}, None)


def _pass_some(passing: Passing, task: ModelTask, number: int, step: int) -> None:
    """Which share of the tokens passes in this step; drawn from the step's own seed, so that a resumed run agrees."""
    seed = task.settings.seed * 1_000_003 + step
    mixed, share = torch.rand(2, generator=torch.Generator().manual_seed(seed)).tolist()
    passing.share = _MIXED_TOKENS * share if number == 1 and mixed < _MIXED_STEPS else 0.0
    passing.generator = torch.Generator(task.device).manual_seed(seed)
