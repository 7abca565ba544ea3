"""Generation speed on two threads while another process keeps one of the two cores busy.

    python tests/benchmarks/busy_core.py FILE.gguf [--bits B]

Quiet and busy runs alternate; the share of the quiet speed that is left is printed from medians and from bests.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import time
from pathlib import Path

import numpy as np

from runtime.native import NativeModel, NativeSession

_TOKENS = 32
_ROUNDS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--bits", type=int, default=2, choices=(2, 4, 6, 8))
    options = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))[:2]
    os.sched_setaffinity(0, cores)
    model = NativeModel(options.file, allow_partial=False, mmap=True)
    session = NativeSession(model, n_ctx=_TOKENS, n_threads=2, n_batch=1, kernel=None)
    session.set_depth(options.bits // 2)
    session.set_output_depth(options.bits // 2)
    speed(session)
    quiet, busy = [], []
    for _ in range(_ROUNDS):
        quiet.append(speed(session))
        other = multiprocessing.Process(target=spin, args=(cores[1],), daemon=True)
        other.start()
        time.sleep(0.2)
        busy.append(speed(session))
        other.terminate()
        other.join()
    print(f"quiet  median {statistics.median(quiet):.1f}  best {max(quiet):.1f} tok/s")
    print(f"busy   median {statistics.median(busy):.1f}  best {max(busy):.1f} tok/s")
    print(f"left   median {statistics.median(busy) / statistics.median(quiet):.0%}  best {max(busy) / max(quiet):.0%}")


def speed(session: NativeSession) -> float:
    """Tokens per second from an empty cache."""
    logits = np.empty((1, session.vocab_size), np.float32)
    token = np.zeros(1, np.int32)
    session.rewind(0)
    start = time.perf_counter()
    for _ in range(_TOKENS):
        session.eval(token, logits)
    return _TOKENS / (time.perf_counter() - start)


def spin(core: int) -> None:
    """Keep one core busy."""
    os.sched_setaffinity(0, {core})
    while True:
        pass


if __name__ == "__main__":
    main()
