"""Calibration recipes: how one block is turned into slices and routers. The block loop (mobiquant.calibrate) is common.

A recipe is a function from `BlockTask` to `CalibratedBlock`, listed in `RECIPES` under the name that `--recipe` takes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mobiquant.config import CalibrationSettings, QuantizationConfig
from mobiquant.router import Router
from mobiquant.slices import SlicedWeight


@dataclass(frozen=True)
class BlockTask:
    """All that a recipe may look at for one block. Tensors [windows, ...] lie on the CPU.

    block: in full precision, on the device, frozen; inputs: float32 [windows, seq_len, width], from the sliced blocks
    before, each window at its own depth; depths: int [windows], 1..4; targets: float32 [windows, seq_len, width], the
    full-precision block's output on full-precision inputs; positions: cosines and sines for the block's call;
    token_cost [7, windows, seq_len] and row_cost [7][rows]: sensitivity of the model to errors of each linear's output
    (mobiquant.sensitivity); advance: to be called once per training step with the name of the stage.
    """

    block: nn.Module
    inputs: Tensor
    depths: Tensor
    targets: Tensor
    positions: tuple[Tensor, Tensor]
    token_cost: Tensor
    row_cost: list[Tensor]
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
    """run: calibrates one block; steps: how often it calls `advance`."""

    run: Callable[[BlockTask], CalibratedBlock]
    steps: Callable[[CalibrationSettings], int]


def recipes() -> dict[str, Recipe]:
    """The recipes by name. A function, because the recipes import the types above."""
    from mobiquant.recipes import paper

    return {"paper": Recipe(paper.calibrate_block, paper.step_count)}
