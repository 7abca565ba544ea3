"""Slice after slice: the codes of the whole model, each slice trained at its own depth against the model's own logits.

Scales and offsets are those of the unclipped range. A code is the cell that a real position falls into; the position of
every weight starts where the original weight lies and is trained through the rounding (straight-through) to lower the
divergence from full precision. A slice that is done is frozen, and the next one starts from the original weights again,
moved to the nearest end of the cell that they were given. So the deeper slices undo what the base had to move, and the
depths do not compete: training them together costs full depth a hundred times its error (mobiquant.recipes.best).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from mobiquant.checkpoint import LINEARS, block_name, read_tensors, write_tensors
from mobiquant.config import CalibrationSettings
from mobiquant.models import linear_shapes
from mobiquant.packing import SLICE_COUNT
from mobiquant.recipes import ModelTask
from mobiquant.sensitivity import position_embeddings
from mobiquant.slices import LEVELS, SlicedWeight, join_groups, split_groups, storable_groups
from mobiquant.source import Source

# Per slice: steps as a share of `distill_steps`, and AdamW's largest step, in cells of that depth.
_STEP_SHARES = (1.0, 0.3, 0.15, 0.1)
_RATES = (6e-3, 1e-2, 2e-2, 5e-2)
# The base's positions are drawn back to the original weights, so that even a steady gradient moves none of them further
# than this many cells: what lies outside its cell is missing at every depth. Residuals are held by the cell before.
_REACH = 0.6
# Share of a slice's steps in which the rate rises; then it falls to 0.
_WARMUP = 0.1
# Nats that int8 activations cost anyway; below it a better slice is no gain.
_FLOOR = 3e-4
# bfloat16 is exact enough for the slices whose own error is well above its rounding.
_BFLOAT16_SLICES = 2
_SAVE_EVERY = 200
_BYTES_PER_WEIGHT = 32


def slice_steps(settings: CalibrationSettings) -> list[int]:
    """Training steps of every slice."""
    return [max(1, round(settings.distill_steps * share)) for share in _STEP_SHARES]


def distill(task: ModelTask) -> list[dict[str, SlicedWeight]]:
    """Slices of every block by name in LINEARS, on the CPU; goes on from `task.state`, which is left finished.

    Raises ValueError when a CUDA device has too little memory for the model.
    """
    model = _Model(task)
    steps = slice_steps(task.settings)
    first, done = model.load(task.state) if task.state.is_file() else (1, 0)
    if first <= SLICE_COUNT:
        windows = torch.from_numpy(task.windows(sum(steps) * task.settings.distill_batch))
        with tqdm(total=sum(steps), initial=sum(steps[: first - 1]) + done, unit="step", smoothing=0.05) as bar:
            for number in range(first, SLICE_COUNT + 1):
                _train_slice(model, number, done, windows, bar)
                done = 0
    return model.sliced()


class _DistilledLinear(nn.Module):
    """A linear that computes with the slice in training, or with its original weight when `original` is set.

    Positions and codes are [rows, groups, 128]. A position is (w + offset) / scale · 4^(slice-1), so that its floor is
    the code of the slices up to that one.
    """

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = weight
        self.original = True
        self.slice = 0
        groups, self.scale, self.offset = storable_groups(weight)
        self.codes = torch.zeros_like(groups, dtype=torch.uint8)
        self.position = nn.Parameter(torch.empty(0))

    def begin(self, number: int) -> None:
        """Start to train slice `number`, with the slices before it frozen."""
        self.slice = number
        self.position = nn.Parameter(self.start())

    @torch.no_grad()
    def start(self) -> Tensor:
        """Where the original weights lie, inside the cells that the finished slices chose."""
        position = (split_groups(self.weight) + self.offset) / self.scale * float(LEVELS) ** (self.slice - 1)
        low = self.codes * float(LEVELS)
        return position.clamp(low, low + LEVELS)

    def rounded(self) -> Tensor:
        """Codes of the slices up to the one in training, float32."""
        low = self.codes * float(LEVELS)
        return self.position.floor().clamp(low, low + (LEVELS - 1))

    @torch.no_grad()
    def freeze(self) -> None:
        self.codes = self.rounded().to(torch.uint8)
        self.position = nn.Parameter(torch.empty(0))

    def forward(self, x: Tensor) -> Tensor:
        if self.original:
            return functional.linear(x, self.weight)
        cell = self.position + (self.rounded() + 0.5 - self.position).detach()
        groups = self.scale * float(LEVELS) ** (1 - self.slice) * cell - self.offset
        return functional.linear(x, join_groups(groups, self.weight.shape[1]))


class _Model:
    """The whole model on the device, its routed linears replaced by `_DistilledLinear`; logits of both."""

    def __init__(self, task: ModelTask):
        source, device = task.source, task.device
        _check_memory(source, device)
        self.task = task
        self.layers: dict[str, _DistilledLinear] = {}
        self._blocks: list[nn.Module] = []
        for index in range(source.block_count):
            block = source.block(index).to(device)
            for name in LINEARS:
                layer = _DistilledLinear(block.get_submodule(name).weight)
                self.layers[block_name(index, name)] = layer
                block.set_submodule(name, layer)
            self._blocks.append(block)
        self._embedding = task.embedding.to(device)
        self._norm, self._head = source.final_norm().to(device), source.head().to(device)
        self._positions = position_embeddings(source, task.settings.seq_len, device)

    def positions(self) -> list[nn.Parameter]:
        return [layer.position for layer in self.layers.values()]

    def divergence(self, ids: Tensor, half: bool) -> Tensor:
        """Mean KL divergence of the slices' predictions from the original model's, nats a token; ids: [n, seq_len]."""
        with torch.no_grad():
            expected = self._log_probs(ids, half, original=True)
        found = self._log_probs(ids, half, original=False)
        return functional.kl_div(found, expected, reduction="sum", log_target=True) / ids.numel()

    def _log_probs(self, ids: Tensor, half: bool, original: bool) -> Tensor:
        for layer in self.layers.values():
            layer.original = original
        hidden = functional.embedding(ids, self._embedding)
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=half and ids.is_cuda):
            for block in self._blocks:
                hidden = block(hidden, position_embeddings=self._positions)
            logits = functional.linear(self._norm(hidden), self._head)
        return logits.float().log_softmax(-1)

    def sliced(self) -> list[dict[str, SlicedWeight]]:
        def stored(layer: _DistilledLinear) -> SlicedWeight:
            codes = join_groups(layer.codes, layer.weight.shape[1]).contiguous()
            scales, offsets = (values.squeeze(-1).to(torch.float16) for values in (layer.scale, layer.offset))
            return SlicedWeight(codes.cpu(), scales.cpu(), offsets.cpu())

        blocks = range(len(self._blocks))
        return [{name: stored(self.layers[block_name(index, name)]) for name in LINEARS} for index in blocks]

    def save(self, path: Path, number: int, done: int, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Everything that a later run needs to go on at step `done` of slice `number`."""
        tensors = {"progress": np.array([number, done])}
        for name, layer in self.layers.items():
            tensors[f"{name}.codes"] = layer.codes.cpu().numpy()
            if optimizer is not None:
                state = optimizer.state[layer.position]
                tensors[f"{name}.position"] = layer.position.detach().cpu().numpy()
                tensors |= {f"{name}.{part}": state[part].cpu().numpy() for part in ("exp_avg", "exp_avg_sq")}
        write_tensors(path, tensors)

    def load(self, path: Path) -> tuple[int, int]:
        """Inverse of `save` but for the optimizer; returns the slice and its finished steps."""
        tensors = read_tensors(path)
        number, done = tensors["progress"].tolist()
        for name, layer in self.layers.items():
            layer.codes = torch.from_numpy(tensors[f"{name}.codes"]).to(self.task.device)
        return number, done

    def resume(self, path: Path, optimizer: torch.optim.Optimizer, done: int) -> None:
        """Positions and the optimizer's state as they were saved after `done` steps of the slice in training."""
        tensors = read_tensors(path)
        state = optimizer.state_dict()
        for place, (name, layer) in enumerate(self.layers.items()):
            layer.position.data.copy_(torch.from_numpy(tensors[f"{name}.position"]))
            moments = {part: torch.from_numpy(tensors[f"{name}.{part}"]) for part in ("exp_avg", "exp_avg_sq")}
            state["state"][place] = {"step": torch.tensor(float(done)), **moments}
        optimizer.load_state_dict(state)


def _train_slice(model: _Model, number: int, done: int, windows: Tensor, bar: tqdm) -> None:
    """Train slice `number` from its step `done` to its end, freeze it and save."""
    task = model.task
    steps, batch = slice_steps(task.settings), task.settings.distill_batch
    count, before = steps[number - 1], sum(steps[: number - 1])
    for layer in model.layers.values():
        layer.begin(number)
    # Gradients by positions are tiny, and smaller with every slice: epsilon must not hold them back.
    optimizer = torch.optim.AdamW(model.positions(), betas=(0.9, 0.95), eps=1e-15, weight_decay=0.0)
    if done:
        model.resume(task.state, optimizer, done)
    with _tensor_cores():
        for step in range(done, count):
            rate = _RATES[number - 1] * min(1.0, (step + 1) / (_WARMUP * count)) * (1 - step / count)
            optimizer.param_groups[0]["lr"] = rate
            start = (before + step) * batch
            ids = windows[start : start + batch].to(task.device)
            divergence = model.divergence(ids, half=number <= _BFLOAT16_SLICES)
            optimizer.zero_grad()
            (divergence.clamp_min(0) + _FLOOR).log().backward()
            optimizer.step()
            if number == 1:
                with torch.no_grad():
                    for layer in model.layers.values():
                        layer.position.lerp_(layer.start(), rate / _REACH)
            bar.set_description(f"slice {number}/{SLICE_COUNT}, divergence {divergence.item():.4g}", refresh=False)
            bar.update()
            if (step + 1) % _SAVE_EVERY == 0 and step + 1 < count:
                model.save(task.state, number, step + 1, optimizer)
    for layer in model.layers.values():
        layer.freeze()
    model.save(task.state, number + 1, 0)


@contextmanager
def _tensor_cores() -> Iterator[None]:
    """float32 products in TF32 on a GPU, and as before afterwards."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _check_memory(source: Source, device: torch.device) -> None:
    if device.type != "cuda":
        return
    weights = source.block_count * sum(rows * columns for rows, columns in linear_shapes(source.config).values())
    free, _ = torch.cuda.mem_get_info(device)
    if weights * _BYTES_PER_WEIGHT > free:
        needed, found = (value / 2**30 for value in (weights * _BYTES_PER_WEIGHT, free))
        raise ValueError(
            f"device: recipe best holds the whole model: expected {needed:.0f} GiB of free memory, found {found:.0f}; "
            "use --recipe paper"
        )
