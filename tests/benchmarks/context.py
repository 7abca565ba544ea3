"""What a long context costs with each type of cache: memory, time per token, and how far the predictions move.

    python tests/benchmarks/context.py FILE.gguf [--contexts 512,4096,32768] [-t 1,2] [--bits 4]
    python tests/benchmarks/context.py FILE.gguf --text TEXT [--windows N] [--bits 8]

Without a text, sessions of every cache type grow together: at each context the same tokens are decoded again and again,
the types in turn, so that a machine whose speed drifts is unfair to none. With a text, KL divergence from the f16 cache
at equal weights, llama.cpp's rule.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import numpy as np

from mobiquant.evaluation.scoring import Score, default_window, make_windows
from mobiquant.text import clean_text
from runtime import Model

TYPES = ("f16", "q8_0")
REPEATS, DECODED = 5, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--contexts", default="512,2048,8192,16384,32000")
    parser.add_argument("-t", "--threads", default="1")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--windows", type=int)
    options = parser.parse_args()
    if options.text:
        divergence(options.file, options.bits, options.text, options.windows)
        return
    for threads in map(int, options.threads.split(",")):
        speed(options.file, options.bits, threads, [int(size) for size in options.contexts.split(",")])


def speed(path: Path, bits: int, threads: int, contexts: list[int]) -> None:
    """Print a row for every context: milliseconds per decoded token, median and best, and prompt tokens per second."""
    n_ctx = contexts[-1] + DECODED
    models = {kind: Model(path, n_ctx=n_ctx, n_threads=threads, bits=bits, cache_type=kind) for kind in TYPES}
    sizes = ", ".join(f"{kind} {model.cache_bytes / 2**20:.1f} MiB" for kind, model in models.items())
    print(f"{path.name}, {bits} bits, {threads} threads, cache of {n_ctx} positions: {sizes}")
    tokens = np.random.default_rng(0).integers(0, 256, n_ctx).astype(np.int32)
    for context in contexts:
        row = [f"{context}"]
        for model in models.values():
            start, new = time.perf_counter(), context - model.position
            model.eval(tokens[model.position : context])
            row.append(f"{new / (time.perf_counter() - start):.0f} t/s")
        samples: dict[str, list[float]] = {kind: [] for kind in TYPES}
        for _ in range(REPEATS):
            for kind, model in models.items():
                start = time.perf_counter()
                for token in tokens[context : context + DECODED]:
                    model.eval([token])
                samples[kind].append((time.perf_counter() - start) / DECODED * 1e3)
                model.reuse(tokens[: context + 1].tolist())
        row += [f"{statistics.median(times):.2f} / {min(times):.2f} ms" for times in samples.values()]
        print(" | ".join(row), flush=True)
    for model in models.values():
        model.close()


def divergence(path: Path, bits: int, text: Path, count: int | None) -> None:
    """Print the perplexity with each type, and its KL divergence from f16."""
    models = {kind: Model(path, bits=bits, cache_type=kind) for kind in (*TYPES, ("q8_0", "f16"), ("f16", "q8_0"))}
    exact = models["f16"]
    ids = exact.tokenizer.encode(clean_text(text.read_text(encoding="utf-8")), add_bos=False)
    windows = make_windows(ids, "llama.cpp", default_window("llama.cpp", exact.n_ctx), exact.tokenizer.bos or 0)[:count]
    scores = {kind: Score() for kind in models}
    for window in windows:
        first, expected = window.first_scored - 1, None
        for kind, model in models.items():
            model.reset()
            logits = model.eval(window.tokens[:-1], all_logits=True)[first:]
            expected = logits if expected is None else expected
            scores[kind].add(logits, window.targets, expected)
    for kind, score in scores.items():
        print(f"{kind}: {score.tokens} tokens, perplexity {score.ppl:.4f}, KL {score.kld:.3g}, top-1 {score.top1:.5f}")


if __name__ == "__main__":
    main()
