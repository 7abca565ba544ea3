"""Tensor data of the file, read from a calibrated checkpoint and checked: shapes, dtypes, finite numbers."""

from __future__ import annotations

from typing import Any

import numpy as np

from export.errors import ExportError
from export.keys import LINEARS, SUFFIX_SCALE_OFFSET
from export.names import checkpoint_name
from export.plan import PlannedTensor
from export.shape import ModelShape
from mobiquant.checkpoint import CONFIG_FILE, STATIC_ORDER, Checkpoint
from mobiquant.packing import TILE_ROWS, groups_of, pack_plane, pack_scale_offset
from mobiquant.static import check_static_order
from mobiquant.windows import sliding_windows

SUPPORTED = ("llama",)
_PIECE_WEIGHTS = 1 << 24
_ROPE_THETA = 10000.0  # the base of a configuration that names none


def checkpoint_shape(checkpoint: Checkpoint) -> ModelShape:
    """The ModelShape that config.json describes. Raises ExportError for another architecture or a bad key."""
    config, quantization = checkpoint.config, checkpoint.quantization
    # Newer configurations keep the rotary base in an object of its own.
    config = config | (config.get("rope_parameters") or {})
    where = checkpoint.path / CONFIG_FILE
    model_type = config.get("model_type")
    if model_type not in SUPPORTED:
        raise ExportError(f"{where}: model_type: expected one of {', '.join(SUPPORTED)}, found {model_type!r}")

    def number(key: str, kind: type[int] | type[float], default: float | None = None) -> Any:
        value = config.get(key) if config.get(key) is not None else default
        if isinstance(value, bool) or not isinstance(value, (int, kind)):
            raise ExportError(f"{where}: {key}: expected a number of type {kind.__name__}, found {value!r}")
        return kind(value)

    width, heads = number("hidden_size", int), number("num_attention_heads", int)
    sizes = {
        "vocab_size": number("vocab_size", int),
        "context_length": number("max_position_embeddings", int),
        "embedding_length": width,
        "block_count": number("num_hidden_layers", int),
        "feed_forward_length": number("intermediate_size", int),
        "head_count": heads,
        "head_count_kv": number("num_key_value_heads", int, default=heads),
        "head_dim": number("head_dim", int, default=width // max(heads, 1)),
        "rms_epsilon": number("rms_norm_eps", float),
        "rope_freq_base": number("rope_theta", float, default=_ROPE_THETA),
    }
    static_order = _static_order(checkpoint, sizes["block_count"])
    try:
        windows = sliding_windows(config, sizes["block_count"])
    except ValueError as error:
        raise ExportError(f"{where}: {error}") from error
    try:
        return ModelShape(
            **sizes,
            tied=bool(config.get("tie_word_embeddings", False)),
            router_hidden=quantization.router.hidden_size,
            budgets=tuple(quantization.router.budgets),
            embedding_depth=quantization.embedding_depth,
            output_depth=quantization.output_depth,
            base_architecture=model_type,
            sliding_window=max(windows),
            sliding_window_pattern=() if min(windows) == max(windows) else tuple(int(window > 0) for window in windows),
            static_order=static_order,
        )
    except ExportError as error:
        raise ExportError(f"{where}: {error}") from error


def _static_order(checkpoint: Checkpoint, block_count: int) -> tuple[int, ...]:
    """The checkpoint's static order, checked; empty when it has none."""
    if not checkpoint.has(STATIC_ORDER):
        return ()
    order = checkpoint.tensor(STATIC_ORDER, np.int32)
    try:
        check_static_order(order, block_count * len(LINEARS))
    except ValueError as error:
        raise ExportError(f"{checkpoint.path}: tensor {STATIC_ORDER}: {error}") from error
    return tuple(order.tolist())


class CheckpointSource:
    """Reads and packs one tensor at a time; nothing is kept between calls."""

    def __init__(self, checkpoint: Checkpoint, shape: ModelShape) -> None:
        self._checkpoint = checkpoint
        self._shape = shape

    def read(self, tensor: PlannedTensor) -> np.ndarray:
        """Data of `tensor`. Raises CheckpointError when the checkpoint lacks it, ExportError for bad numbers."""
        name = checkpoint_name(tensor.module, tensor.block)
        if tensor.slice_index is not None:
            return self._plane(f"{name}.codes", tensor, tensor.slice_index)
        if tensor.part == SUFFIX_SCALE_OFFSET:
            rows, columns = self._shape.linear(tensor.module)
            scales, offsets = (
                self._floats(f"{name}.{kind}", np.float16, (rows, groups_of(columns))) for kind in ("scales", "offsets")
            )
            if not (scales > 0).all():
                raise self._error(f"{name}.scales", f"expected numbers above 0, found {scales.min()}")
            return pack_scale_offset(scales, offsets)
        if tensor.part == "hidden":
            return self._hidden(f"{name}.hidden", tensor)
        values = self._floats(f"{name}.{tensor.part}" if tensor.part else name, np.float32, tensor.shape)
        if tensor.part == "threshold" and (np.diff(values, axis=-1) > 0).any():
            raise self._error(f"{name}.threshold", "expected values that never rise with the budget, found a rise")
        return values

    def _plane(self, name: str, tensor: PlannedTensor, slice_index: int) -> np.ndarray:
        """One slice of a matrix of codes, packed some tiles at a time: an embedding's codes can be larger than all that
        an export may take."""
        rows, columns = self._shape.linear(tensor.module)
        plane = np.empty(tensor.shape, np.int8)
        step = max(1, _PIECE_WEIGHTS // (TILE_ROWS * columns))
        for tile in range(0, len(plane), step):
            piece = slice(tile * TILE_ROWS, min(rows, (tile + step) * TILE_ROWS))
            codes = self._checkpoint.tensor(name, np.uint8, (rows, columns), piece)
            plane[tile : tile + step] = pack_plane(codes, slice_index)
        return plane

    def _hidden(self, name: str, tensor: PlannedTensor) -> np.ndarray:
        """A router's hidden weights, columns padded with 0 to whole groups."""
        point = tensor.module.removeprefix("router_")
        columns = self._shape.router_columns(point)
        hidden = self._checkpoint.tensor(name, np.int8, (self._shape.router_hidden, columns))
        return np.pad(hidden, ((0, 0), (0, tensor.shape[1] - columns)))

    def _floats(self, name: str, dtype: type[np.floating], shape: tuple[int, ...]) -> np.ndarray:
        values = self._checkpoint.tensor(name, dtype, shape)
        if not np.isfinite(values).all():
            count = int((~np.isfinite(values)).sum())
            raise self._error(name, f"expected finite numbers, found {count} that are not")
        return values

    def _error(self, tensor: str, problem: str) -> ExportError:
        return ExportError(f"{self._checkpoint.path}: tensor {tensor}: {problem}")
