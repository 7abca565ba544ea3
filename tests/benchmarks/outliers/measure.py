"""What every precision does to every token: errors of each linear, their expected cost, the model's own divergence, and
what the routers give.

Errors and divergences at a depth are those of the weights alone, on the inputs that the full-precision model has there:
what differs between two depths is then the precision and nothing else. As a control the same is measured for another
rounding of the same weights to the same number of bits. Routed figures are the reference model's.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from mobiquant.checkpoint import LINEARS, block_name, open_checkpoint
from mobiquant.models import linear_shapes, load_slices
from mobiquant.packing import SLICE_BITS, SLICE_COUNT
from mobiquant.reference import open_reference
from mobiquant.sensitivity import Sensitivity, measure_sensitivity
from mobiquant.slices import SlicedWeight, unslice_weight
from mobiquant.source import Source

from ..baselines.rtn import round_to_nearest
from ..dense import DenseModel, token_divergence

BUDGETS = (2.5, 3.0, 4.0)
DEPTHS = tuple(range(1, SLICE_COUNT + 1))
# Labels are drawn from the model's prediction: the mean of several draws says more of a single token.
_DRAWS = 4


@dataclass(frozen=True)
class Measured:
    """T tokens, L linears in model order (LINEARS, block by block). Arrays are float32 but for the integers.

    tokens: int [T]; linears: module names; weights: int [L], weights of each linear; output: [L, T], ‖W·x‖²;
    error: [L, 4, T], ‖(W_D - W)·x‖²; cost: [L, 4, T], nats of divergence to expect from it (mobiquant.sensitivity);
    divergence: [4, T], nats, all linears at one depth; control_error, control_divergence: the same with weights rounded
    to the nearest of 2^(2D) levels; depths: uint8 [budgets, T, L]; routed: [budgets, T], nats.
    """

    tokens: np.ndarray
    linears: list[str]
    weights: np.ndarray
    output: np.ndarray
    error: np.ndarray
    control_error: np.ndarray
    cost: np.ndarray
    divergence: np.ndarray
    control_divergence: np.ndarray
    depths: np.ndarray
    routed: np.ndarray


def measure(checkpoint: Path, source: Source, windows: np.ndarray, device: str) -> Measured:
    """Everything, over `windows` int [n, seq_len], begin-of-text first; T = n·seq_len. source: what was calibrated."""
    model = DenseModel(source.path, device)
    slices = _open_slices(checkpoint, source, device)
    exact = [model.hidden(tokens) for tokens in tqdm(windows, desc="full precision", unit="window")]
    errors = _linear_errors(model, slices, _sensitivity(source, windows, device), windows)

    def divergence(label: str, weights: dict[str, Tensor]) -> np.ndarray:
        model.set_weights(weights)
        progress = zip(tqdm(windows, desc=label, unit="window"), exact, strict=True)
        kls = [token_divergence(model.log_probs(x), model.log_probs(model.hidden(tokens))) for tokens, x in progress]
        return torch.cat(kls).float().cpu().numpy()

    at_depth, control = [], []
    for depth in DEPTHS:
        bits = SLICE_BITS * depth
        read = {name: unslice_weight(sliced, depth) for name, sliced in slices.items()}
        at_depth.append(divergence(f"{bits} bits", read))
        nearest = {name: round_to_nearest(weight, bits) for name, weight in model.originals.items()}
        control.append(divergence(f"{bits} bits, control", nearest))
    depths, routed = _routed(checkpoint, model, exact, windows, device)
    return Measured(
        tokens=windows.flatten(),
        linears=list(slices),
        weights=np.array([sliced.codes.numel() for sliced in slices.values()]),
        **errors,
        divergence=np.stack(at_depth),
        control_divergence=np.stack(control),
        depths=depths,
        routed=routed,
    )


def _open_slices(path: Path, source: Source, device: str) -> dict[str, SlicedWeight]:
    """The slices of every linear of the checkpoint, by module name."""
    read = open_checkpoint(path).tensor
    result = {}
    for index in range(source.block_count):
        for name, shape in linear_shapes(source.config).items():
            stored = load_slices(read, block_name(index, name), *shape)
            parts = (stored.codes, stored.scales, stored.offsets)
            result[block_name(index, name)] = SlicedWeight(*(part.to(device) for part in parts))
    return result


def _sensitivity(source: Source, windows: np.ndarray, device: str) -> Sensitivity:
    draws = [
        measure_sensitivity(source, windows.astype(np.int64), 1, seed, torch.device(device)) for seed in range(_DRAWS)
    ]
    rows = [
        [torch.stack(linear).mean(0) for linear in zip(*linears, strict=True)]
        for linears in zip(*(draw.rows for draw in draws), strict=True)
    ]
    return Sensitivity(torch.stack([draw.tokens for draw in draws]).mean(0), rows)


@torch.no_grad()
def _linear_errors(
    model: DenseModel, slices: dict[str, SlicedWeight], sensitivity: Sensitivity, windows: np.ndarray
) -> dict[str, np.ndarray]:
    """output, error, control_error and cost of `Measured`."""
    probes = []
    for place, (name, sliced) in enumerate(slices.items()):
        block, index = divmod(place, len(LINEARS))
        probes.append(_Probe(model.linears[name], sliced, sensitivity.rows[block][index]))
    for tokens in tqdm(windows, desc="errors of linears", unit="window"):
        model.hidden(tokens)
    result = {
        key: torch.stack([torch.cat(probe.found[key], -1) for probe in probes])
        for key in ("output", "error", "control_error", "cost")
    }
    result["cost"] *= 0.5 * sensitivity.tokens.reshape(len(probes), 1, -1)
    for probe in probes:
        probe.hook.remove()
    return {key: values.numpy() for key, values in result.items()}


class _Probe:
    """Watches one linear at work. found: per window [n] or [4, n], the parts of `Measured`, the cost without the factor
    of the token."""

    def __init__(self, linear: nn.Linear, sliced: SlicedWeight, row_cost: Tensor):
        weight = linear.weight
        self._wrong = [unslice_weight(sliced, depth) - weight for depth in DEPTHS]
        self._control = [round_to_nearest(weight, SLICE_BITS * depth) - weight for depth in DEPTHS]
        self._row_cost = row_cost.to(weight.device)
        self.found: dict[str, list[Tensor]] = defaultdict(list)
        self.hook = linear.register_forward_hook(self._record)

    def _record(self, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x = inputs[0][0]
        squares = torch.stack([(x @ wrong.T).square() for wrong in self._wrong])
        control = torch.stack([(x @ wrong.T).square().sum(-1) for wrong in self._control])
        found = {
            "output": output[0].square().sum(-1),
            "error": squares.sum(-1),
            "control_error": control,
            "cost": squares @ self._row_cost,
        }
        for key, values in found.items():
            self.found[key].append(values.cpu())


def _routed(
    checkpoint: Path, model: DenseModel, exact: list[Tensor], windows: np.ndarray, device: str
) -> tuple[np.ndarray, np.ndarray]:
    """(depths, routed) of `Measured`."""
    reference = open_reference(checkpoint, device, exact=False)
    depths, routed = [], []
    for bits in BUDGETS:
        reference.set_average_bits(bits)
        given, kls = [], []
        for tokens, hidden in zip(tqdm(windows, desc=f"routed, {bits} bits", unit="window"), exact, strict=True):
            found = torch.from_numpy(reference.logits(tokens)).to(device).double().log_softmax(-1)
            kls.append(token_divergence(model.log_probs(hidden), found))
            given.append(reference.depths.reshape(len(tokens), -1))
        depths.append(np.concatenate(given))
        routed.append(torch.cat(kls).float().cpu().numpy())
    return np.stack(depths), np.stack(routed)
