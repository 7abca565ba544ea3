"""The full-precision model to calibrate: a Hugging Face folder or hub id, read one tensor or block at a time.

Memory holds one block, never the whole model. Everything is handed out in float32.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from mobiquant.architectures import UnsupportedModelError, parse_config
from mobiquant.block import DecoderBlock, Norm, soft_capped
from mobiquant.checkpoint import CONFIG_FILE, EMBEDDING, FINAL_NORM, HEAD, TOKENIZER_FILES
from mobiquant.models import empty_block, rotary_frequencies, transformers_config
from mobiquant.weights import WeightFiles


class Source:
    """An opened model folder. config: what config.json says of the forward pass; content: config.json as it is;
    original: the configuration as transformers takes it."""

    def __init__(self, path: Path, content: dict[str, Any]):
        self.path = path
        self.content = content
        self.config = parse_config(content, path / CONFIG_FILE)
        self.original = transformers_config(content, path / CONFIG_FILE)
        self._weights = WeightFiles(path)
        self._weights.check(self._shapes())
        self._adjust: Callable[[int, DecoderBlock], None] | None = None

    @property
    def block_count(self) -> int:
        return self.config.num_hidden_layers

    @property
    def context_length(self) -> int:
        return self.config.max_position_embeddings

    def tensor(self, name: str, rows: slice = slice(None), device: torch.device | str = "cpu") -> Tensor:
        """One tensor, or some of its rows, in float32. Raises WeightError when it cannot be read."""
        return self._weights.tensor(name, rows, device)

    def pieces(self, name: str) -> Iterator[Tensor]:
        """A matrix in float32, some thousand rows at a time."""
        return self._weights.pieces(name)

    def rows(self, name: str, ids: Tensor) -> Tensor:
        """Rows of a matrix, float32 [*ids.shape, columns], without the rest of it in memory."""
        return self._weights.rows(name, ids)

    def embed(self, ids: Tensor) -> Tensor:
        """What the first block reads: int64 [...] -> float32 [..., width]."""
        return self.rows(f"{EMBEDDING}.weight", ids) * self.config.embedding_scale

    def block(self, index: int, device: torch.device | str = "cpu") -> DecoderBlock:
        """Block `index` in full precision on the device, ready to run, its parameters frozen."""
        block = empty_block(self.config, index)
        tensors = {}
        for name in block.state_dict():
            stored, rows = self.config.source_rows(name)
            tensors[name] = self.tensor(f"model.layers.{index}.{stored}", rows, device)
            if name.endswith("norm.weight"):
                tensors[name] += self.config.norm_offset
        block.load_state_dict(tensors, assign=True)
        block.requires_grad_(False).eval()
        if self._adjust:
            self._adjust(index, block)
        return block

    def adjusted(self, adjust: Callable[[int, DecoderBlock], None]) -> Source:
        """The same model, its blocks changed in place by adjust(index, block) whenever one is read."""
        result = copy.copy(self)
        result._adjust = adjust
        return result

    def embedding(self) -> Tensor:
        """float32 [vocab, width]."""
        return self.tensor(f"{EMBEDDING}.weight")

    def head(self) -> Tensor:
        """float32 [vocab, width]; the embedding when tied."""
        return self.embedding() if self.config.tie_word_embeddings else self.tensor(f"{HEAD}.weight")

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
        """The tokenizer of tokenizer.json. Raises UnsupportedModelError when it knows more tokens than the model."""
        tokenizer = load_tokenizer(self.path)
        largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        if largest >= self.config.vocab_size:
            raise UnsupportedModelError(
                f"{self.path / TOKENIZER_FILES[0]}: expected token ids below the model's vocab_size "
                f"{self.config.vocab_size}, found {largest}"
            )
        return tokenizer

    def fingerprint(self) -> str:
        """A digest of the configuration, the tokenizer, and the header and size of every weight file."""
        digest = hashlib.sha256(json.dumps(self.content, sort_keys=True).encode())
        digest.update((self.path / TOKENIZER_FILES[0]).read_bytes())
        self._weights.update_digest(digest)
        return digest.hexdigest()

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor that will be read, with its shape."""
        config = self.config
        table = (config.vocab_size, config.hidden_size)
        shapes: dict[str, tuple[int, ...]] = {f"{EMBEDDING}.weight": table, FINAL_NORM: (config.hidden_size,)}
        if not config.tie_word_embeddings:
            shapes[f"{HEAD}.weight"] = table
        for index in range(self.block_count):
            for name, parameter in empty_block(config, index).state_dict().items():
                stored, rows = config.source_rows(name)
                length = rows.stop or parameter.shape[0]  # of a tensor that holds several, the last one's end
                shapes[f"model.layers.{index}.{stored}"] = (length, *parameter.shape[1:])
        return shapes


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
    quantization = content.get("quantization_config") or content.get("compression_config")
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise UnsupportedModelError(
            f"{path / CONFIG_FILE}: quantization_config: expected full precision, found a quantized model "
            f"(quant_method {method}); calibrate the one that it was made from"
        )
    return Source(path, content)


def load_tokenizer(path: Path) -> Tokenizer:
    """tokenizer.json of a model or checkpoint folder."""
    file = path / TOKENIZER_FILES[0]
    if not file.is_file():
        others = [name for name in ("tokenizer.model", "vocab.json", "spiece.model") if (path / name).is_file()]
        found = "nothing"
        if others:
            found = (
                f"{others[0]} alone; make it with transformers: "
                "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
            )
        raise UnsupportedModelError(f"{path}: expected {file.name}, found {found}")
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the tokenizers package raises bare Exception
        raise UnsupportedModelError(f"{file}: expected a tokenizer of the tokenizers package: {error}") from error


def _fetch(model: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=["*.json", "*.safetensors", "*.jinja"]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UnsupportedModelError(f"{model}: expected a folder or a hub id; the hub says: {reason}") from error
