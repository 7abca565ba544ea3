"""Speed on the GPU: decode of a file at several precisions beside the copy bandwidth and f16 torch, in one run.

python tests/benchmarks/cuda_speed.py FILE.gguf
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import numpy as np
import torch

from runtime.budget import Budget
from runtime.native import NativeModel, NativeSession

_COPY_BYTES = 4_000_000_000


def copy_bandwidth(repeats: int = 20) -> float:
    """Bytes per second of a copy within the GPU's memory, read and written bytes counted; median."""
    source = torch.empty(_COPY_BYTES, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * _COPY_BYTES / _median_seconds(lambda: target.copy_(source), repeats)


def _median_seconds(work, repeats: int) -> float:
    seconds = []
    for _ in range(repeats + 3):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        work()
        end.record()
        end.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(seconds[3:])


def decode(session: NativeSession, budget: Budget, tokens: int, repeats: int, prompt: int) -> tuple[float, float]:
    """Seconds and bytes of the file per token, greedy decoding after `prompt` tokens; median."""
    budget.apply(session)
    session.set_output_depth(0 if budget.routed or budget.static else budget.depth)
    seconds = []
    for _ in range(repeats + 1):
        session.rewind(0)
        session.eval(np.arange(prompt, dtype=np.int32) % 250, np.empty((0, session.vocab_size), np.float32))
        before = session.stats
        _, milliseconds = session.greedy(1, tokens)
        seconds.append(milliseconds / 1e3 / tokens)
    return statistics.median(seconds[1:]), (session.stats - before).bytes_per_token


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    print(torch.cuda.get_device_name())
    bandwidth = copy_bandwidth()
    torch.cuda.empty_cache()
    print(f"copy bandwidth {bandwidth / 1e9:.0f} GB/s")
    model = NativeModel(options.file, allow_partial=False, mmap=True, device="cuda")
    session = NativeSession(model, n_ctx=4096, n_threads=1, n_batch=512, kernel=None)
    print(session.device_bytes, model.info().file_bytes)
    for bits in (2, 3.0, 4, 6, 8):
        seconds, size = decode(session, Budget.of(bits), options.tokens, options.repeats, 16)
        share = size / bandwidth / seconds
        print(
            f"decode {bits} bits: {1 / seconds:.1f} tok/s, {size / 1e6:.0f} MB/token, {share:.1%} of roofline",
            flush=True,
        )


if __name__ == "__main__":
    main()
