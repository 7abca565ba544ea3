"""The full-precision model to calibrate: a Hugging Face folder or hub id, read one tensor or block at a time.

Memory holds one block, never the whole model. Everything is handed out in float32.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional

from mobiquant.architectures import UnsupportedModelError, parse_config
from mobiquant.block import DecoderBlock, Norm, soft_capped
from mobiquant.checkpoint import CONFIG_FILE, EMBEDDING, FINAL_NORM, HEAD, INDEX_FILE, TOKENIZER_FILES
from mobiquant.models import empty_block, rotary_frequencies, transformers_config

_SINGLE_FILE = "model.safetensors"


class Source:
    """An opened model folder. config: what config.json says of the forward pass; content: config.json as it is;
    original: the configuration as transformers takes it."""

    def __init__(self, path: Path, content: dict[str, Any]):
        self.path = path
        self.content = content
        self.config = parse_config(content, path / CONFIG_FILE)
        self.original = transformers_config(content, path / CONFIG_FILE)
        self._index = _weight_map(path)

    @property
    def block_count(self) -> int:
        return self.config.num_hidden_layers

    @property
    def context_length(self) -> int:
        return self.config.max_position_embeddings

    def tensor(self, name: str, rows: slice = slice(None)) -> Tensor:
        """One tensor, or some of its rows, in float32. Raises UnsupportedModelError when absent or unreadable."""
        if name not in self._index:
            raise UnsupportedModelError(f"{self.path}: tensor {name}: expected, found nothing")
        file = self.path / self._index[name]
        try:
            with safe_open(file, framework="pt") as opened:
                whole = rows == slice(None)
                return (opened.get_tensor(name) if whole else opened.get_slice(name)[rows]).to(torch.float32)
        except (OSError, SafetensorError) as error:
            raise UnsupportedModelError(f"{file}: tensor {name}: cannot be read: {error}") from error

    def block(self, index: int) -> DecoderBlock:
        """Block `index` in full precision, ready to run, its parameters frozen."""
        block = empty_block(self.config, index)
        prefix = f"model.layers.{index}."
        tensors = {}
        for name, parameter in block.state_dict().items():
            stored, rows = self.config.source_rows(name)
            tensors[name] = self.tensor(prefix + stored, rows)
            if tensors[name].shape != parameter.shape:
                raise UnsupportedModelError(
                    f"{self.path}: tensor {prefix + stored}: expected shape {tuple(parameter.shape)}, "
                    f"found {tuple(tensors[name].shape)}"
                )
            if name.endswith("norm.weight"):
                tensors[name] = tensors[name] + self.config.norm_offset
        block.load_state_dict(tensors, assign=True)
        return block.requires_grad_(False).eval()

    def embedding(self) -> Tensor:
        """float32 [vocab, width]."""
        return self.tensor(f"{EMBEDDING}.weight")

    def head(self) -> Tensor:
        """float32 [vocab, width]; the embedding when tied."""
        return self.embedding() if self.config.tie_word_embeddings else self.tensor(f"{HEAD}.weight")

    def embed(self, ids: Tensor, table: Tensor) -> Tensor:
        """What the first block reads: rows of an embedding float32 [vocab, width], scaled."""
        return functional.embedding(ids, table) * self.config.embedding_scale

    def capped(self, logits: Tensor) -> Tensor:
        """Logits as the model predicts with them."""
        return soft_capped(logits, self.config.output_softcap)

    def final_norm(self) -> nn.Module:
        """The norm before the head, frozen."""
        norm = Norm(self.config.hidden_size, self.config.rms_norm_eps)
        norm.weight.data = self.tensor(FINAL_NORM) + self.config.norm_offset
        return norm.requires_grad_(False)

    def frequencies(self) -> list[Tensor]:
        """Rotary frequencies, float32 [rotated dimensions / 2], of every table of the model."""
        return rotary_frequencies(self.config, self.original)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer of tokenizer.json."""
        return load_tokenizer(self.path)

    def fingerprint(self) -> str:
        """A digest of the configuration, the tokenizer, and the header and size of every weight file.

        Not of all weights: reading them again at every start would cost minutes on a large model.
        """
        digest = hashlib.sha256(json.dumps(self.content, sort_keys=True).encode())
        digest.update((self.path / TOKENIZER_FILES[0]).read_bytes())
        for name in sorted(set(self._index.values())):
            with (self.path / name).open("rb") as file:
                digest.update(file.read(1 << 20))
            digest.update(f"{name} {(self.path / name).stat().st_size}".encode())
        return digest.hexdigest()


def open_source(model: str) -> Source:
    """Open a local folder, or fetch a hub id. Raises UnsupportedModelError when it cannot be calibrated."""
    path = Path(model)
    if not path.is_dir():
        path = _fetch(model)
    try:
        content = json.loads((path / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UnsupportedModelError(f"{path}: expected a folder with a readable {CONFIG_FILE}: {error}") from error
    if not isinstance(content, dict):
        raise UnsupportedModelError(f"{path / CONFIG_FILE}: expected a JSON object, found {type(content).__name__}")
    if "quantization_config" in content:
        raise UnsupportedModelError(f"{path / CONFIG_FILE}: expected full precision, found a quantized model")
    return Source(path, content)


def load_tokenizer(path: Path) -> Tokenizer:
    """tokenizer.json of a model or checkpoint folder."""
    file = path / TOKENIZER_FILES[0]
    if not file.is_file():
        raise UnsupportedModelError(f"{path}: expected {file.name}, found nothing")
    return Tokenizer.from_file(str(file))


def _weight_map(path: Path) -> dict[str, str]:
    """Tensor name -> file, from the index or from the single file."""
    index = path / INDEX_FILE
    if index.is_file():
        return json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    if not (path / _SINGLE_FILE).is_file():
        raise UnsupportedModelError(f"{path}: expected {INDEX_FILE} or {_SINGLE_FILE}, found neither")
    with safe_open(path / _SINGLE_FILE, framework="pt") as opened:
        return dict.fromkeys(opened.keys(), _SINGLE_FILE)


def _fetch(model: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=["*.json", "*.safetensors", "*.jinja"]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UnsupportedModelError(f"{model}: expected a folder or a hub id; the hub says: {reason}") from error
