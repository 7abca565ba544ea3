"""How fast a file opens, and which of its bytes are in memory after some tokens at each depth (Linux).

    python tests/benchmarks/resident.py FILE.gguf [-n 128]

Every depth runs in a process of its own; a slice that is never read is a page that is never touched.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from pathlib import Path

import numpy as np

from runtime.native import NativeModel, NativeSession


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("-n", "--n-gen", type=int, default=128)
    options = parser.parse_args()
    for depth in (1, 2, 3, 4):
        worker = multiprocessing.get_context("spawn").Process(target=run, args=(options.file, depth, options.n_gen))
        worker.start()
        worker.join()


def run(path: Path, depth: int, count: int) -> None:
    """Open, generate and print one line."""
    start = time.perf_counter()
    model = NativeModel(path, allow_partial=False, mmap=True)
    opened = time.perf_counter() - start
    session = NativeSession(model, n_ctx=count, n_threads=1, n_batch=1, kernel=None)
    session.set_depth(depth)
    logits = np.empty((1, session.vocab_size), np.float32)
    for token in range(count):
        session.eval(np.array([token % 256], np.int32), logits)
    info = model.info()
    read = sum(info.slice_bytes[:depth]) + info.scale_bytes
    print(
        f"depth {depth}: opened in {opened * 1e3:.2f} ms; after {count} tokens {resident(path) / 1e6:.0f} MB "
        f"of the file's {info.file_bytes / 1e6:.0f} MB resident; slices and scales read: {read / 1e6:.0f} MB",
        flush=True,
    )


def resident(path: Path) -> int:
    """Bytes of the mapped file that this process has touched."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        if "-" in line.split()[0]:
            inside = line.endswith(str(path.resolve()))
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


if __name__ == "__main__":
    main()
