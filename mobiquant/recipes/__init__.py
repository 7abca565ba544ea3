"""Calibration recipes: how a model is turned into slices and routers. The block loop (mobiquant.calibrate) is common.

A recipe is a function from `BlockTask` to `CalibratedBlock`, by the name that `--recipe` takes in `recipes`. One that
can use the whole model at once chooses the slices before the loop over blocks and tunes the routers after it, in
functions of a `ModelTask`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from mobiquant.config import CalibrationSettings, QuantizationConfig
from mobiquant.data import CalibrationWindows
from mobiquant.hidden import HiddenStates
from mobiquant.router import Router
from mobiquant.slices import SlicedWeight
from mobiquant.source import Source


@dataclass(frozen=True)
class ModelTask:
    """What a recipe may look at outside the loop over blocks.

    windows: from a number to that many training windows; folder: for files named recipe-*.safetensors, to go on after
    an interruption. They are removed when the calibration is done.
    """

    source: Source
    windows: Callable[[int], CalibrationWindows]
    settings: CalibrationSettings
    device: torch.device
    folder: Path


@dataclass(frozen=True)
class BlockTask:
    """All that a recipe may look at for one block. Tensors [windows, ...] lie on the CPU, hidden states maybe on disk.

    block: in full precision, on the device, frozen; inputs: [windows, seq_len, width], from the sliced blocks before,
    each window at its own depth, behind those of training others; depths: int [windows], 1..4, of training; targets:
    [windows, seq_len, width], the full-precision block's output on full-precision inputs; positions: cosines and sines
    for the block's call; token_cost [7, windows, seq_len] and row_cost [7][rows]: sensitivity of the model to errors of
    each linear's output (mobiquant.sensitivity); slices: the block's, by name in LINEARS, when the recipe chose them
    before the loop; advance: to be called once per training step with the name of the stage.
    """

    block: nn.Module
    inputs: HiddenStates
    depths: Tensor
    targets: HiddenStates
    positions: tuple[Tensor, Tensor]
    token_cost: Tensor
    row_cost: list[Tensor]
    slices: dict[str, SlicedWeight] | None
    quantization: QuantizationConfig
    settings: CalibrationSettings
    generator: torch.Generator
    device: torch.device
    advance: Callable[[str], None]


@dataclass(frozen=True)
class CalibratedBlock:
    """slices: by name in LINEARS; routers: by name in ROUTER_POINTS, their thresholds not yet set."""

    slices: dict[str, SlicedWeight]
    routers: dict[str, Router]


@dataclass(frozen=True)
class Recipe:
    """run: calibrates one block; steps: how often it calls `advance`, by whether the slices were chosen before; slices:
    chooses the slices of every block before the first `run`, or leaves that to it; routers: from a function that loads
    calibrated blocks, their routers trained further, or None to keep them. These two find their work again when
    called after an interruption. balanced: whether all work is done on balanced channels (mobiquant.balance).
    """

    run: Callable[[BlockTask], CalibratedBlock]
    steps: Callable[[CalibrationSettings, bool], int]
    slices: Callable[[ModelTask], list[dict[str, SlicedWeight]] | None] = lambda _: None
    routers: Callable[[ModelTask, Callable[[int], CalibratedBlock]], list[dict[str, Router]] | None] = lambda *_: None
    balanced: bool = False


def recipes() -> dict[str, Recipe]:
    """The recipes by name. A function, because the recipes import the types above."""
    from mobiquant.recipes import best, paper

    return {
        "best": Recipe(best.calibrate_block, best.step_count, best.choose_slices, best.tune_routers, balanced=True),
        "paper": Recipe(paper.calibrate_block, paper.step_count),
    }
