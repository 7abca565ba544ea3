"""`python tests/c/small.py SMALL TINY`: the files that the C programs start from.

SMALL is for sweeps and fuzzers: one block, one group, and under 128 kB, so that sanitizers allocate it quickly. The
tokenizer in it knows more tokens than the model.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from tiny import TINY

from export.shape import ModelShape
from export.to_gguf import export_synthetic

SMALL = ModelShape(
    vocab_size=64,
    context_length=32,
    embedding_length=128,
    block_count=1,
    feed_forward_length=128,
    head_count=4,
    head_count_kv=1,
    head_dim=32,
    rms_epsilon=1e-5,
    rope_freq_base=10000.0,
    tied=True,
    router_hidden=2,
    budgets=(2.0, 3.0, 5.0, 8.0),
    embedding_depth=2,
    output_depth=2,
    static_order=tuple(range(7)) * 3,
)

TINY_WITH_ORDER = replace(TINY, context_length=128, static_order=tuple(range(14)) * 3)

if __name__ == "__main__":
    export_synthetic(SMALL, Path(sys.argv[1]), "small")
    export_synthetic(TINY_WITH_ORDER, Path(sys.argv[2]), "tiny")
