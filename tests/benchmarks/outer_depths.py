"""What the depths of embedding and output head cost: perplexity by both, and the pair that calibration chooses.

python tests/benchmarks/outer_depths.py MODEL TEXT
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from mobiquant.data import calibration_windows
from mobiquant.outer import measure_outer
from mobiquant.slices import slice_weight
from mobiquant.source import open_source


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a full-precision folder")
    parser.add_argument("text", type=Path)
    options = parser.parse_args()
    source = open_source(options.model)
    text, bos = options.text.read_text(encoding="utf-8"), source.config.bos_token_id
    windows = calibration_windows(text, source.tokenizer(), bos, 4, source.context_length, 0).held_out
    embedding, head = slice_weight(source.embedding()), slice_weight(source.head())
    measured = measure_outer(source, embedding, head, windows, 1, torch.device("cpu"))
    print("growth of perplexity, and divergence from full precision in nats:")
    print("| embedding | " + " | ".join(f"head at {2 * depth} bits" for depth in (1, 2, 3, 4)) + " |")
    print("| --- " * 5 + "|")
    for depth, row in enumerate(zip(measured.perplexity, measured.divergence, strict=True), start=1):
        cells = (f"{growth:+.2%}, {divergence:.4f}" for growth, divergence in zip(*row, strict=True))
        print(f"| {2 * depth} bits | " + " | ".join(cells) + " |")
    embedding_depth, head_depth = measured.choose()
    print(f"chosen: embedding {2 * embedding_depth} bits, head {2 * head_depth} bits")
    return 0


if __name__ == "__main__":
    sys.exit(main())
