"""Training that can be stopped: the state of an optimizer and its parameters in one file, and back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from mobiquant.checkpoint import read_tensors, write_tensors

_MOMENTS = ("exp_avg", "exp_avg_sq")


def save_progress(
    path: Path,
    progress: tuple[int, ...],
    frozen: Mapping[str, Tensor],
    trained: Mapping[str, nn.Parameter],
    optimizer: torch.optim.AdamW | None,
) -> None:
    """Write `progress` (numbers of the caller's choice), `frozen` tensors, and, with the optimizer, what it trains."""
    tensors = {"progress": np.array(progress)} | {f"frozen.{name}": value for name, value in frozen.items()}
    if optimizer is not None:
        for name, parameter in trained.items():
            tensors[f"trained.{name}"] = parameter.detach()
            tensors |= {f"{part}.{name}": optimizer.state[parameter][part] for part in _MOMENTS}
    write_tensors(path, {name: np.asarray(torch.as_tensor(value).cpu()) for name, value in tensors.items()})


def load_frozen(path: Path) -> tuple[tuple[int, ...], dict[str, Tensor]]:
    """The progress and the frozen tensors of `save_progress`."""
    tensors = read_tensors(path)
    frozen = {name: torch.from_numpy(value) for name, value in tensors.items() if name.startswith("frozen.")}
    return tuple(tensors["progress"].tolist()), {name.removeprefix("frozen."): value for name, value in frozen.items()}


@torch.no_grad()
def load_trained(
    path: Path, trained: Mapping[str, nn.Parameter], optimizer: torch.optim.AdamW, steps_taken: int
) -> None:
    """Put parameters and the optimizer's state back as they were saved after `steps_taken` steps."""
    tensors, fused = read_tensors(path), bool(optimizer.defaults["fused"])
    for name, parameter in trained.items():
        parameter.copy_(torch.from_numpy(tensors[f"trained.{name}"]))
        moments = {part: torch.from_numpy(tensors[f"{part}.{name}"]).to(parameter.device) for part in _MOMENTS}
        step = torch.tensor(float(steps_taken), device=parameter.device if fused else "cpu")
        optimizer.state[parameter] = {"step": step, **moments}
