"""The weight files of a Hugging Face folder: one file, or shards with an index, read a tensor or some rows at a time.

Owns which file holds which tensor, and that all of them are there in the expected shape and in a precision that can be
calibrated: said once, from the files' headers, before any work. No file stays mapped between reads, so that resident
memory is what was asked for. Everything is handed out in float32.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mobiquant.checkpoint import INDEX_FILE

SINGLE_FILE = "model.safetensors"
# As safetensors names them.
_PRECISIONS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_ROWS = 4096
_HEADER_BYTES = 1 << 20


class WeightError(ValueError):
    """A weight file or tensor is not what the model needs; the message names it, the expected and the found."""


class WeightFiles:
    """The tensors of a folder by name. Raises WeightError when files are missing or contradict their index."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._files = _weight_map(folder)
        self._headers = _headers(folder, self._files)

    def check(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Raise WeightError unless every tensor is there with its shape, in a precision that can be calibrated."""
        for name, shape in expected.items():
            where = f"{self._file(name)}: tensor {name}"
            found, dtype = self._headers[name]
            # Packed integers have another shape too; what they are is the better answer.
            if dtype not in _PRECISIONS:
                *most, last = _PRECISIONS.values()
                raise WeightError(
                    f"{where}: expected {', '.join(most)} or {last}, found {dtype}; a quantized model cannot be "
                    "calibrated, use the one that it was made from"
                )
            if found != shape:
                raise WeightError(f"{where}: expected shape {shape}, found {found}")

    def tensor(self, name: str, rows: slice = slice(None), device: torch.device | str = "cpu") -> Tensor:
        """One tensor, or some of its rows, in float32 on the device."""
        file = self._file(name)
        try:
            with safe_open(file, framework="pt") as opened:
                whole = rows == slice(None)
                stored = opened.get_tensor(name) if whole else opened.get_slice(name)[rows]
                return stored.to(device).to(torch.float32)  # in this order: half the bytes travel
        except (OSError, SafetensorError) as error:
            raise WeightError(f"{file}: tensor {name}: cannot be read: {error}") from error

    def pieces(self, name: str) -> Iterator[Tensor]:
        """A matrix in float32, some thousand rows at a time."""
        file = self._file(name)
        try:
            for start in range(0, self._headers[name][0][0], _ROWS):
                with safe_open(file, framework="pt") as opened:
                    yield opened.get_slice(name)[start : start + _ROWS].to(torch.float32)
        except (OSError, SafetensorError) as error:
            raise WeightError(f"{file}: tensor {name}: cannot be read: {error}") from error

    def rows(self, name: str, ids: Tensor) -> Tensor:
        """Rows `ids` of a matrix in float32, [*ids.shape, columns], without the rest of it in memory."""
        wanted, place = ids.unique(return_inverse=True)
        found = []
        for number, piece in enumerate(self.pieces(name)):
            start = number * _ROWS
            found.append(piece[wanted[(wanted >= start) & (wanted < start + len(piece))] - start])
        return torch.cat(found)[place]

    def update_digest(self, digest: hashlib._Hash) -> None:
        """Add the header and size of every file. Not all weights: reading a large model again would cost minutes."""
        for file in sorted(set(self._files.values())):
            with (self._folder / file).open("rb") as opened:
                digest.update(opened.read(_HEADER_BYTES))
            digest.update(f"{file} {(self._folder / file).stat().st_size}".encode())

    def _file(self, name: str) -> Path:
        if name in self._files:
            return self._folder / self._files[name]
        # Quantized formats keep their matrices under names of their own, such as NAME.qweight.
        stem = name.removesuffix("weight")
        relatives = [other for other in sorted(self._files) if other.startswith(stem)]
        found = ", ".join(f"{other} ({self._headers[other][1]})" for other in relatives[:3]) or "nothing"
        raise WeightError(f"{self._folder}: tensor {name}: expected, found {found}")


def _weight_map(folder: Path) -> dict[str, str]:
    """Tensor name -> file, from the index or from the single file."""
    index = folder / INDEX_FILE
    if index.is_file():
        try:
            content: Any = json.loads(index.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise WeightError(f"{index}: expected readable JSON: {error}") from error
        found = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(found, dict) or not found or not all(isinstance(file, str) for file in found.values()):
            raise WeightError(f"{index}: weight_map: expected tensor names with files, found {found!r:.80}")
        files = sorted(set(found.values()))
        for file in files:
            if Path(file).name != file:
                raise WeightError(f"{index}: weight_map: expected files of the folder, found {file!r}")
        missing = [file for file in files if not (folder / file).is_file()]
        if missing:
            raise WeightError(
                f"{folder}: expected the {len(files)} files of {INDEX_FILE}, found no {', '.join(missing[:3])}"
                + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
            )
        return found
    if not (folder / SINGLE_FILE).is_file():
        others = sorted(path.name for pattern in ("*.bin", "*.pth", "*.gguf") for path in folder.glob(pattern))
        found = f"{others[0]}; save the model with transformers' save_pretrained first" if others else "neither"
        raise WeightError(f"{folder}: expected {INDEX_FILE} or {SINGLE_FILE}, found {found}")
    return dict.fromkeys(_header(folder / SINGLE_FILE), SINGLE_FILE)


def _headers(folder: Path, files: Mapping[str, str]) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of every tensor, each from the file that the index gives it."""
    headers = {file: _header(folder / file) for file in sorted(set(files.values()))}
    for name, file in files.items():
        if name not in headers[file]:
            holders = [other for other, header in headers.items() if name in header]
            found = f"it in {holders[0]}" if holders else "nothing"
            raise WeightError(f"{folder / file}: tensor {name}: expected as {INDEX_FILE} says, found {found}")
    return {name: headers[file][name] for name, file in files.items()}


def _header(file: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    try:
        with safe_open(file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118  (not a mapping)
            return {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except (OSError, SafetensorError) as error:
        raise WeightError(f"{file}: expected a whole safetensors file: {error}") from error
