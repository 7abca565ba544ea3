"""Writes a Hugging Face folder of any size with seeded random bfloat16 weights, in shards, a tensor at a time.

    python -m tests.benchmarks.random_model llama-2-7b -o /tmp/7b [--blocks N]

For measuring memory and time at sizes for which there is no model here. The tokenizer is the bundled model's.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from zlib import crc32

import torch
from safetensors.torch import save_file
from transformers import PreTrainedConfig

from mobiquant.demo.train import Shape, model_config
from mobiquant.models import empty_block

_TOKENIZER = Path(__file__).parents[2] / "mobiquant" / "demo" / "tale-6m" / "tokenizer.json"
_SHARD_BYTES = 1 << 30


@dataclass(frozen=True)
class Named:
    """A shape and whether its output head is the embedding."""

    shape: Shape
    tied: bool


SHAPES = {
    "llama-3.2-1b": Named(Shape(128256, 2048, 16, 32, 8, 8192, 2048), tied=True),
    "llama-2-7b": Named(Shape(32000, 4096, 32, 32, 32, 11008, 4096), tied=False),
}


def write_model(folder: Path, named: Named, blocks: int, seed: int = 0) -> None:
    """Write config.json, tokenizer.json, the shards and their index."""
    folder.mkdir(parents=True, exist_ok=True)
    config = model_config(named.shape)
    config.num_hidden_layers, config.tie_word_embeddings, config.dtype = blocks, named.tied, "bfloat16"
    config.save_pretrained(folder)
    shutil.copyfile(_TOKENIZER, folder / "tokenizer.json")
    shards = _shards(config)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(shard, file)
        save_file({name: _values(name, shape, seed) for name, shape in shard.items()}, folder / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _values(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """bfloat16; norms are 1."""
    values = torch.ones(shape)
    if len(shape) == 2:
        values.normal_(0.0, shape[1] ** -0.5, generator=torch.Generator().manual_seed(crc32(f"{seed} {name}".encode())))
    return values.to(torch.bfloat16)


def _shards(config: PreTrainedConfig) -> list[dict[str, tuple[int, ...]]]:
    """Names and shapes of the tensors of every file."""
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in _tensors(config):
        if 2 * sum(map(prod, shards[-1].values())) >= _SHARD_BYTES:
            shards.append({})
        shards[-1][name] = shape
    return shards


def _tensors(config: PreTrainedConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "model.embed_tokens.weight", (config.vocab_size, config.hidden_size)
    for index in range(config.num_hidden_layers):
        for name, parameter in empty_block(config, index).state_dict().items():
            yield f"model.layers.{index}.{name}", tuple(parameter.shape)
    yield "model.norm.weight", (config.hidden_size,)
    if not config.tie_word_embeddings:
        yield "lm_head.weight", (config.vocab_size, config.hidden_size)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.random_model", description=__doc__.splitlines()[0]
    )
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--blocks", type=int, metavar="N", help="(the shape's)")
    options = parser.parse_args()
    named = SHAPES[options.shape]
    write_model(options.output, named, options.blocks or named.shape.layers)
    size = sum(path.stat().st_size for path in options.output.iterdir())
    print(f"{options.output}: {size / 1e9:.2f} GB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
