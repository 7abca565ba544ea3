"""Tensor data of the file, read from a calibrated checkpoint and checked: shapes, dtypes, finite numbers."""

from __future__ import annotations

import numpy as np

from export.errors import ExportError
from export.keys import LINEARS, SUFFIX_SCALE_OFFSET
from export.names import checkpoint_name
from export.plan import PlannedTensor
from export.shape import ModelShape
from mobiquant.architectures import MAIN_ROPE, UnsupportedModelError, parse_config
from mobiquant.checkpoint import CONFIG_FILE, STATIC_ORDER, Checkpoint
from mobiquant.packing import TILE_ROWS, groups_of, pack_plane, pack_scale_offset
from mobiquant.static import check_static_order

_PIECE_WEIGHTS = 1 << 24


def checkpoint_shape(checkpoint: Checkpoint) -> ModelShape:
    """The ModelShape that config.json describes. Raises ExportError for another architecture or a bad key."""
    quantization, where = checkpoint.quantization, checkpoint.path / CONFIG_FILE
    try:
        spec = parse_config(checkpoint.config, where)
    except UnsupportedModelError as error:
        raise ExportError(str(error)) from error
    blocks, plain = spec.num_hidden_layers, float(np.float32(1.0) / np.sqrt(np.float32(spec.head_dim)))
    static_order = _static_order(checkpoint, blocks)
    windowed = tuple(int(window > 0) for window in spec.windows)
    try:
        return ModelShape(
            vocab_size=spec.vocab_size,
            context_length=spec.context_length,
            embedding_length=spec.hidden_size,
            block_count=blocks,
            feed_forward_length=spec.intermediate_size,
            head_count=spec.num_attention_heads,
            head_count_kv=spec.num_key_value_heads,
            head_dim=spec.head_dim,
            rms_epsilon=spec.rms_norm_eps,
            rope_freq_base=spec.rope_theta,
            tied=spec.tie_word_embeddings,
            router_hidden=quantization.router.hidden_size,
            budgets=tuple(quantization.router.budgets),
            embedding_depth=quantization.embedding_depth,
            output_depth=quantization.output_depth,
            base_architecture=spec.base_architecture,
            attention_scale=None if spec.attention_scale == plain else spec.attention_scale,
            attention_softcap=spec.attention_softcap,
            output_softcap=spec.output_softcap,
            embedding_scale=spec.embedding_scale,
            activation=spec.activation,
            rope_dim=spec.rotary_dim,
            rope_scaling=spec.rope_scaling,
            rope_pattern=() if set(spec.ropes) == {MAIN_ROPE} else spec.ropes,
            sliding_window=max(spec.windows),
            sliding_window_pattern=() if len(set(windowed)) == 1 else windowed,
            qkv_bias=spec.qkv_bias,
            output_bias=spec.output_bias,
            qk_norm=spec.qk_norm,
            post_norms=spec.post_norms,
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
        name = checkpoint_name(tensor.module, tensor.block, self._shape.post_norms)
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
