"""The calibrated checkpoint: a folder of safetensors files, and how to read and write it with numpy (no torch here).

    DIR/config.json                    the Hugging Face config with `quantization_config` (mobiquant.config)
    DIR/model.safetensors.index.json   tensor name -> file; written last, so a folder without it is unfinished
    DIR/block-00000.safetensors ...    one per block: slices, norms, routers
    DIR/outer.safetensors              embedding, head (when untied), final norm, rotary frequencies, static order
    DIR/tokenizer.json ...             copied from the source model

Tensor names are Hugging Face module paths. A sliced matrix NAME of [rows, columns] is `NAME.codes` uint8
[rows, columns], `NAME.scales` and `NAME.offsets` float16 [rows, groups] (offset = s·z, docs/format.md). NAME is
`model.embed_tokens`, `lm_head` (only when untied) or `model.layers.N.` + one of LINEARS. Routers are
`model.layers.N.router_POINT.` + `hidden` int8 [H, columns], `hidden_scale` and `hidden_bias` float32 [H], `head`
float32 [L, 3, H+1], `head_bias` float32 [L, 3], `threshold` float32 [L, 3, P]. Vectors, all float32: the norms
`model.layers.N.input_layernorm.weight`, `model.layers.N.post_attention_layernorm.weight`, `model.norm.weight`, and
`model.rotary_emb.inv_freq` [head dimension / 2]. `static_order` int32 [3 · 7 · blocks] lists linears as block · 7 +
place in LINEARS (mobiquant.static); a checkpoint of before lacks it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from mobiquant.config import QuantizationConfig

CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"
OUTER_FILE = "outer.safetensors"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)

EMBEDDING = "model.embed_tokens"
HEAD = "lm_head"
STATIC_ORDER = "static_order"
FINAL_NORM = "model.norm.weight"
ROTARY_FREQUENCIES = "model.rotary_emb.inv_freq"
BLOCK_NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")

# A router serves the linears that read one input; this order is also that of recorded depths.
ROUTER_POINTS: dict[str, tuple[str, ...]] = {
    "attn_in": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn_out": ("self_attn.o_proj",),
    "ffn_in": ("mlp.gate_proj", "mlp.up_proj"),
    "ffn_down": ("mlp.down_proj",),
}
LINEARS: tuple[str, ...] = tuple(name for names in ROUTER_POINTS.values() for name in names)


class CheckpointError(ValueError):
    """A folder, file or tensor is not what a checkpoint holds; the message names it, the expected and the found."""


def block_file(block: int) -> str:
    """`block-00003.safetensors` for block 3."""
    return f"block-{block:05d}.safetensors"


def block_name(block: int, name: str) -> str:
    """`model.layers.3.mlp.up_proj` for block 3 and name `mlp.up_proj`."""
    return f"model.layers.{block}.{name}"


class Checkpoint:
    """A finished checkpoint, open for reading. Tensors are read from disk one at a time, when asked for, and no file
    stays mapped between reads, so that resident memory is what was asked for.

    path: the folder; config: the parsed config.json; quantization: its `quantization_config`.
    """

    def __init__(self, path: Path, config: dict[str, Any], quantization: QuantizationConfig, index: dict[str, str]):
        self.path = path
        self.config = config
        self.quantization = quantization
        self._index = index

    def names(self) -> list[str]:
        """All tensor names, sorted."""
        return sorted(self._index)

    def has(self, name: str) -> bool:
        return name in self._index

    def tensor(
        self,
        name: str,
        dtype: type[np.generic] | None = None,
        shape: tuple[int, ...] | None = None,
        rows: slice | None = None,
    ) -> np.ndarray:
        """Read one tensor, or some `rows` of it. With `dtype` or `shape`, also require them of the whole.

        Raises CheckpointError when the tensor is absent, unreadable, or not of that dtype or shape.
        """
        if name not in self._index:
            raise CheckpointError(f"{self.path}: tensor {name}: expected in {INDEX_FILE}, found nothing")
        file = self.path / self._index[name]
        try:
            with safe_open(file, framework="numpy") as opened:
                part = opened.get_slice(name)
                found = tuple(part.get_shape())
                if shape is not None and found != tuple(shape):
                    raise CheckpointError(f"{file}: tensor {name}: expected shape {tuple(shape)}, found {found}")
                value = opened.get_tensor(name) if rows is None else part[rows]
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file}: tensor {name}: cannot be read: {error}") from error
        if dtype is not None and value.dtype != np.dtype(dtype):
            raise CheckpointError(f"{file}: tensor {name}: expected dtype {np.dtype(dtype)}, found {value.dtype}")
        return value


def open_checkpoint(path: Path | str) -> Checkpoint:
    """Open a finished checkpoint folder. Raises CheckpointError when it is none."""
    path = Path(path)
    config = _read_json(path / CONFIG_FILE, "a checkpoint folder")
    if "quantization_config" not in config:
        raise CheckpointError(f"{path / CONFIG_FILE}: key quantization_config: expected, found nothing; not calibrated")
    try:
        quantization = QuantizationConfig.from_dict(config["quantization_config"])
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path / CONFIG_FILE}: quantization_config: {error}") from error
    index = _read_json(path / INDEX_FILE, "a finished calibration").get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(file, str) for file in index.values()):
        raise CheckpointError(f"{path / INDEX_FILE}: weight_map: expected an object of strings, found {index!r:.80}")
    for file in sorted(set(index.values())):
        if Path(file).name != file or not (path / file).is_file():
            raise CheckpointError(f"{path / INDEX_FILE}: weight_map: expected a file in the folder, found {file!r}")
    return Checkpoint(path, config, quantization, index)


def is_checkpoint(path: Path | str) -> bool:
    """Whether the folder's config.json carries a MoBiQuant `quantization_config` (finished or not)."""
    try:
        entry = json.loads((Path(path) / CONFIG_FILE).read_text(encoding="utf-8")).get("quantization_config")
    except (OSError, ValueError, AttributeError):
        return False
    return isinstance(entry, dict) and entry.get("quant_method") == "mobiquant"


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """All tensors of one safetensors file. Raises CheckpointError when it is none."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: expected a safetensors file: {error}") from error


def write_tensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Write one safetensors file atomically. Raises CheckpointError when it cannot be written, as on a full disk."""
    contiguous = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    try:
        _atomically(path, lambda temporary: save_file(contiguous, temporary))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be written: {error}") from error


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write one JSON file atomically."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    _atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def finish_checkpoint(
    path: Path, source: Path, config: dict[str, Any], quantization: QuantizationConfig, files: Iterable[str]
) -> None:
    """Turn a folder of tensor `files` into a checkpoint: tokenizer files of `source`, config.json, then the index."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            _atomically(path / name, lambda temporary, name=name: shutil.copyfile(source / name, temporary))
    weight_map: dict[str, str] = {}
    total = 0
    for name in files:
        with safe_open(path / name, framework="numpy") as file:
            weight_map.update(dict.fromkeys(file.keys(), name))
        total += (path / name).stat().st_size
    write_json(path / CONFIG_FILE, {**config, "quantization_config": quantization.to_dict()})
    write_json(path / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})


def _read_json(path: Path, kind: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(f"{path.parent}: expected {kind}, found no {path.name}") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: expected readable JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def _atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` with a temporary name in the same folder, then rename; nothing is left behind on failure."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        temporary.chmod(0o644)  # safetensors makes files that only their owner can read
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
