"""What one file gives at several precisions: bits, perplexity and speed, as the table that ends `make demo`.

python tests/benchmarks/demo_table.py FILE.gguf TEXT
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from mobiquant.evaluation.backends import RuntimeBackend
from mobiquant.evaluation.evaluate import Precision, score_windows, text_windows
from runtime import Model
from runtime.sampling import SamplingSettings

PRECISIONS = ("2", "2.5", "3.0", "3.5", "4.0", "4", "6.0", "8")
_WINDOWS = 24
_GENERATED = 128


def main(path: Path, text: str) -> None:
    """Print one row for each precision."""
    backend = RuntimeBackend(path)
    windows = text_windows(backend, text, "all", count=_WINDOWS)
    result = score_windows(backend, windows, [Precision.parse(name) for name in PRECISIONS])
    backend.close()
    print(f"{'precision':<16}{'avg bits':>10}{'bits/weight':>13}{'perplexity':>12}{'tok/s':>9}")
    with Model(path, seed=0) as model:
        for row in result.rows:
            model.budget = row.precision.budget
            figures = f"{row.bits:>10.2f}{row.bits_per_weight:>13.2f}{row.score.ppl:>12.2f}"
            print(f"{row.precision.label:<16}{figures}{generation_speed(model):>9.0f}", flush=True)
    print(f"bits/weight counts the scales and routers that are read; perplexity over {_WINDOWS} windows.")


def generation_speed(model: Model) -> float:
    """Greedy tokens per second after a short prompt, the prompt not counted."""
    model.reset()
    prompt = model.tokenize("It was late when")
    start, count = 0.0, -1
    for _ in model.generate(prompt, SamplingSettings(temperature=0)):
        count += 1
        if count == 0:
            start = time.perf_counter()
        if count == _GENERATED:
            break
    return count / (time.perf_counter() - start)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(f"usage: {sys.argv[0]} FILE.gguf TEXT")
    main(Path(sys.argv[1]), Path(sys.argv[2]).read_text(encoding="utf-8"))
