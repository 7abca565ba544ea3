"""Calibration: the loop over blocks, from a full-precision model and a text to a checkpoint folder.

Owns the order of work, the hidden states between blocks, saving and resuming. How one block is calibrated is a recipe
(mobiquant.recipes). Every finished block is saved; a run that was stopped recomputes the hidden states from the saved
blocks and goes on, and gives the same checkpoint as a run that was not. Memory holds one block in training, or the
embedding, never the model, and the hidden states unless they lie on disk.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from mobiquant.architectures import UnsupportedModelError
from mobiquant.balance import balanced, load_balances, measure_balance, save_balances
from mobiquant.checkpoint import (
    CONFIG_FILE,
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    INDEX_FILE,
    LINEARS,
    OUTER_FILE,
    ROTARY_FREQUENCIES,
    ROUTER_POINTS,
    STATIC_ORDER,
    CheckpointError,
    block_file,
    block_name,
    finish_checkpoint,
    read_tensors,
    write_tensors,
)
from mobiquant.config import CalibrationSettings, QuantizationConfig, RouterConfig
from mobiquant.data import CalibrationWindows, calibration_windows
from mobiquant.hidden import HiddenStates, hidden_states
from mobiquant.linear import Precision, SliceEmbedding
from mobiquant.models import hidden_bytes, install_slices, linear_shapes, load_block
from mobiquant.outer import measure_outer
from mobiquant.packing import SLICE_COUNT
from mobiquant.recipes import BlockTask, CalibratedBlock, ModelTask, Recipe, recipes
from mobiquant.router import expected_gains, router_hidden_size
from mobiquant.sensitivity import Sensitivity, measure_sensitivity, position_embeddings
from mobiquant.slices import SlicedWeight, slice_pieces, slice_weight, storable_groups
from mobiquant.source import Source
from mobiquant.static import static_order
from mobiquant.tensor_cores import tensor_cores
from mobiquant.thresholds import RouterScores, budget_cuts
from mobiquant.weights import WeightError
from mobiquant.work_folder import (
    BALANCE_FILE,
    GAINS_FILE,
    SENSITIVITY_FILE,
    claim_folder,
    fingerprint,
    remove_work_files,
)

_THRESHOLD_WINDOWS = 16
# Tokens that pass a block together where nothing is trained, and the room that what they leave in it may take.
_PASS_TOKENS = 16384
_PASS_BYTES = 3 << 30
ACTIVATIONS = ("cpu", "disk")


@dataclass
class _Streams:
    """Hidden states between two blocks; a block's outputs take the place of its inputs.

    exact: [samples, seq_len, width], full precision; sliced: [windows, seq_len, width], the training windows and then
    every held-out window once per depth; depths: int [windows]: a window stays at its depth through all blocks.
    """

    exact: HiddenStates
    sliced: HiddenStates
    depths: Tensor


def calibrate(
    source: Source,
    folder: Path,
    text: str,
    settings: CalibrationSettings,
    restart: bool = False,
    activations: str = "cpu",
) -> None:
    """Calibrate `source` into the checkpoint `folder`, or go on where an earlier run of the same settings stopped.

    activations: "cpu" or "disk", where hidden states between blocks are kept, on disk in `folder`; both give the same
    checkpoint, and a run that was stopped may go on with the other.
    Raises CheckpointError when the folder holds something else, ValueError and its subclasses on unusable input.
    """
    if activations not in ACTIVATIONS:
        raise ValueError(f"activations: expected one of {', '.join(ACTIVATIONS)}, found {activations}")
    settings = dataclasses.replace(settings.resolved(source.context_length), device=_device(settings.device))
    known = recipes()
    if settings.recipe not in known:
        raise ValueError(f"recipe: expected one of {', '.join(known)}, found {settings.recipe}")
    tokenizer, bos, seq_len = source.tokenizer(), _bos(source), settings.seq_len

    def windows(samples: int) -> CalibrationWindows:
        return calibration_windows(text, tokenizer, bos, samples, seq_len, settings.seed)

    calibration = _Calibration(source, folder, settings, windows, folder if activations == "disk" else None)
    claim_folder(folder, fingerprint(source, text, settings), restart)
    if (folder / INDEX_FILE).is_file():
        remove_work_files(folder)
        return
    torch.use_deterministic_algorithms(True, warn_only=True)
    with tensor_cores():
        calibration.run()


class _Calibration:
    """One run. windows: from a number of training windows to them and the held-out ones; hidden_folder: where hidden
    states lie, in memory without one."""

    def __init__(
        self,
        source: Source,
        folder: Path,
        settings: CalibrationSettings,
        windows: Callable[[int], CalibrationWindows],
        hidden_folder: Path | None,
    ):
        self.source, self.folder, self.settings = source, folder, settings
        self.hidden_folder = hidden_folder
        self.windows, self._draw_windows = windows(settings.samples), windows
        self.device = torch.device(settings.device)
        tokens = min(_PASS_TOKENS, _PASS_BYTES // hidden_bytes(source.config))
        self.batch = max(1, tokens // settings.seq_len)
        shapes = linear_shapes(source.config)
        hidden_size = router_hidden_size([[shapes[name] for name in names] for names in ROUTER_POINTS.values()])
        self.quantization = QuantizationConfig(RouterConfig(hidden_size), settings=settings)
        self.precision = Precision(self.quantization.router.budgets, exact=False)
        self.sizes = [rows * columns for rows, columns in shapes.values()]
        self.positions = position_embeddings(source, settings.seq_len, self.device)

    def run(self) -> None:
        for name in self._tables():
            self._check_table(name)
        recipe = recipes()[self.settings.recipe]
        if recipe.balanced:
            self._balance()
        sensitivity = self._sensitivity()
        model_task = self._model_task()
        slices = recipe.slices(model_task)
        gains = self._gains(self._blocks(recipe, slices, sensitivity))
        self._tune_routers(recipe, model_task)
        self._finish(gains)

    def _blocks(
        self, recipe: Recipe, slices: list[dict[str, SlicedWeight]] | None, sensitivity: Sensitivity
    ) -> list[list[Tensor]]:
        """Calibrate and save block after block; held-out scores of all linears, per depth."""
        steps = recipe.steps(self.settings, slices is not None)
        streams = self._first_streams()
        scores: list[list[Tensor]] = [[] for _ in range(SLICE_COUNT)]
        with tqdm(total=steps * self.source.block_count, unit="step", smoothing=0.05) as bar:
            for index in range(self.source.block_count):
                bar.set_description(f"block {index + 1}/{self.source.block_count}")
                exact_block = self.source.block(index, self.device)
                self._advance_exact(exact_block, streams.exact)
                if (self.folder / block_file(index)).is_file():
                    # Not work of this run: an estimate must not count it.
                    bar.total -= steps
                    bar.refresh()
                else:
                    task = self._task(index, exact_block, streams, sensitivity, bar)
                    if slices is not None:
                        task = dataclasses.replace(task, slices=slices[index])
                    self._save_block(index, recipe.run(task), exact_block)
                    del task
                # Before the next is read: two would be there at once.
                del exact_block
                self._advance_sliced(self._saved_block(index).to(self.device), streams, scores)
        return scores

    def _gains(self, scores: list[list[Tensor]]) -> np.ndarray:
        """Expected gains by the blocks' own routers, float64 [L, 3]: kept, because tuned ones take their place."""
        path = self.folder / GAINS_FILE
        if not path.is_file():
            write_tensors(path, {"gains": expected_gains(scores)})
        return read_tensors(path)["gains"]

    def _balance(self) -> None:
        """From here on every block is read with balanced channels."""
        path, training = self.folder / BALANCE_FILE, self.windows.training
        if not path.is_file():
            save_balances(path, measure_balance(self.source, training, self.batch, self.device, self.hidden_folder))
        self.source = balanced(self.source, load_balances(path))

    def _sensitivity(self) -> Sensitivity:
        path = self.folder / SENSITIVITY_FILE
        if not path.is_file():
            windows, seed = self.windows.training, self.settings.seed
            measured = measure_sensitivity(self.source, windows, self.batch, seed, self.device, self.hidden_folder)
            measured.save(path)
        return Sensitivity.load(path)

    def _model_task(self) -> ModelTask:
        return ModelTask(
            source=self.source,
            windows=self._draw_windows,
            settings=self.settings,
            device=self.device,
            folder=self.folder,
        )

    def _first_streams(self) -> _Streams:
        training, held_out = map(torch.from_numpy, (self.windows.training, self.windows.held_out))
        depths = torch.cat(
            (
                torch.arange(len(training)) % SLICE_COUNT + 1,
                torch.arange(SLICE_COUNT).repeat_interleave(len(held_out)) + 1,
            )
        )
        exact, sliced = self._room(len(training)), self._room(len(depths))
        for chosen in torch.arange(len(training)).split(self.batch):
            exact.write(chosen, self.source.embed(training[chosen]))
        ids = torch.cat((training, held_out.repeat(SLICE_COUNT, 1)))
        for chosen in torch.arange(len(ids)).split(self.batch):
            sliced.write(chosen, self._embed_sliced(ids[chosen]))
        return _Streams(exact, sliced, depths)

    def _room(self, windows: int) -> HiddenStates:
        shape = (windows, self.settings.seq_len, self.source.config.hidden_size)
        return hidden_states(shape, self.device, self.hidden_folder)

    def _embed_sliced(self, ids: Tensor) -> Tensor:
        """float32 [..., width] as the sliced embedding gives it; only the rows in use are sliced."""
        used, places = ids.unique(return_inverse=True)
        rows = slice_weight(self.source.rows(f"{EMBEDDING}.weight", used))
        return SliceEmbedding(rows, self.quantization.embedding_depth, self.source.config.embedding_scale)(places)

    def _tables(self) -> list[str]:
        return [EMBEDDING] if self.source.config.tie_word_embeddings else [EMBEDDING, HEAD]

    def _check_table(self, name: str) -> None:
        """Say now what `_table` would refuse after all blocks."""
        try:
            for piece in self.source.pieces(f"{name}.weight"):
                storable_groups(piece)
        except WeightError:
            raise
        except ValueError as error:
            raise UnsupportedModelError(f"tensor {name}.weight: {error}") from error

    def _task(self, index: int, block: nn.Module, streams: _Streams, sensitivity: Sensitivity, bar: tqdm) -> BlockTask:
        def advance(stage: str) -> None:
            bar.set_description(f"block {index + 1}/{self.source.block_count}, {stage}", refresh=False)
            bar.update()

        return BlockTask(
            block=block,
            inputs=streams.sliced,
            depths=streams.depths[: self.settings.samples],
            targets=streams.exact,
            positions=self.positions,
            token_cost=sensitivity.tokens[index],
            row_cost=sensitivity.rows[index],
            slices=None,
            quantization=self.quantization,
            settings=self.settings,
            # Seeded per block, so that a resumed run draws the same numbers.
            generator=torch.Generator().manual_seed(self.settings.seed * 1_000_003 + index),
            device=self.device,
            advance=advance,
        )

    def _save_block(self, index: int, result: CalibratedBlock, block: nn.Module) -> None:
        """Put slices and routers into the block and save it."""
        install_slices(block, index, result.slices, result.routers, self.precision)
        tensors = {block_name(index, name): value.cpu().numpy() for name, value in block.state_dict().items()}
        write_tensors(self.folder / block_file(index), tensors)

    def _saved_block(self, index: int) -> nn.Module:
        """Always from the file, so that a resumed run computes with the same numbers."""
        path = self.folder / block_file(index)
        tensors = read_tensors(path)

        def read(name: str, dtype: type[np.generic], shape: tuple[int, ...]) -> np.ndarray:
            value = tensors.get(name)
            if value is None or value.dtype != dtype or value.shape != shape:
                found = "nothing" if value is None else f"{value.dtype} {value.shape}"
                raise CheckpointError(f"{path}: tensor {name}: expected {np.dtype(dtype)} {shape}, found {found}")
            return value

        return load_block(read, self.source.config, index, self.quantization.router.hidden_size, self.precision)

    @torch.no_grad()
    def _advance_exact(self, block: nn.Module, hidden: HiddenStates) -> None:
        for chosen in torch.arange(hidden.shape[0]).split(self.batch):
            self._pass(block, hidden, chosen)

    @torch.no_grad()
    def _advance_sliced(self, block: nn.Module, streams: _Streams, scores: list[list[Tensor]]) -> None:
        """Every window at its depth; appends the held-out scores of the block's linears, per depth."""
        hidden, samples = streams.sliced, self.settings.samples
        for depth in range(1, SLICE_COUNT + 1):
            self.precision.depth = depth
            windows = torch.nonzero(streams.depths == depth).flatten()
            training, held_out = windows[windows < samples], windows[windows >= samples]
            with self.precision.keeping():
                for chosen in training.split(self.batch):
                    self._pass(block, hidden, chosen)
                with RouterScores(block) as recorded:
                    for chosen in held_out.split(self.batch):
                        self._pass(block, hidden, chosen)
            scores[depth - 1] += recorded.per_linear()

    def _pass(self, block: nn.Module, hidden: HiddenStates, windows: Tensor) -> None:
        hidden.write(windows, self._run(block, hidden.read(windows, self.device)))

    def _run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        return block(hidden, position_embeddings=self.positions)

    def _tune_routers(self, recipe: Recipe, task: ModelTask) -> None:
        """Let the recipe train the routers of all blocks together, and save them in place of the blocks' own."""
        tuned = recipe.routers(task, self._calibrated_block) or []
        for index, routers in enumerate(tuned):
            path = self.folder / block_file(index)
            tensors = read_tensors(path)
            for point, router in routers.items():
                parts = {part: value.numpy() for part, value in router.state_dict().items()}
                tensors |= {block_name(index, f"router_{point}.{part}"): value for part, value in parts.items()}
            write_tensors(path, tensors)

    def _calibrated_block(self, index: int) -> CalibratedBlock:
        block = self._saved_block(index)
        slices = {name: block.get_submodule(name).sliced() for name in LINEARS}
        return CalibratedBlock(slices, {point: block.get_submodule(f"router_{point}") for point in ROUTER_POINTS})

    def _cuts(self) -> np.ndarray:
        hidden = self._embed_sliced(torch.from_numpy(self.windows.held_out[:_THRESHOLD_WINDOWS]))
        blocks = [
            lambda index=index: self._saved_block(index).to(self.device) for index in range(self.source.block_count)
        ]
        return budget_cuts(
            blocks, self._run, hidden, self.precision, self.sizes, self.batch, self.device, self.hidden_folder
        )

    def _finish(self, gains: np.ndarray) -> None:
        """Set the thresholds in every block, write what lies outside the blocks, then make the folder a checkpoint."""
        count = self.source.block_count
        cuts = self._cuts()
        for index in range(count):
            path = self.folder / block_file(index)
            tensors = read_tensors(path)
            for point in ROUTER_POINTS:
                name = block_name(index, f"router_{point}.threshold")
                tensors[name] = np.broadcast_to(cuts, tensors[name].shape)
            write_tensors(path, tensors)
        tables = {name: slice_pieces(self.source.pieces(f"{name}.weight")) for name in self._tables()}
        table, head = tables[EMBEDDING], tables.get(HEAD, tables[EMBEDDING])
        held_out, batch = self.windows.held_out, self.settings.batch
        costs = measure_outer(self.source, table, head, held_out, batch, self.device, self.hidden_folder)
        embedding_depth, output_depth = costs.choose()
        quantization = dataclasses.replace(
            self.quantization, embedding_depth=embedding_depth, output_depth=output_depth
        )
        outer: dict[str, np.ndarray] = {}
        for name, sliced in tables.items():
            outer |= {f"{name}.{part.name}": getattr(sliced, part.name).numpy() for part in dataclasses.fields(sliced)}
        outer[FINAL_NORM] = self.source.final_norm().weight.numpy()
        outer[STATIC_ORDER] = static_order(gains)
        frequencies = self.source.frequencies()
        outer |= {name: table.numpy() for name, table in zip(ROTARY_FREQUENCIES, frequencies, strict=False)}
        write_tensors(self.folder / OUTER_FILE, outer)
        files = [*(block_file(index) for index in range(count)), OUTER_FILE]
        finish_checkpoint(self.folder, self.source.path, self.source.content, quantization, files)
        remove_work_files(self.folder)  # not before: a run that is stopped here goes on from them


def _bos(source: Source) -> int:
    bos = source.config.bos_token_id
    if not isinstance(bos, int):
        raise UnsupportedModelError(f"{source.path / CONFIG_FILE}: bos_token_id: expected a number, found {bos!r}")
    return bos


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise ValueError(f"device: expected cpu, cuda or auto, found {name}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: expected a CUDA GPU, found none that this torch can use")
    return name
