"""How long a user waits: importing the runtime, and from starting `mobiquant run` to its first token.

    python tests/benchmarks/startup.py FILE.gguf [-r 10]

Wall time of whole processes, with the file in the page cache; beside it processor time, which others disturb less.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("-r", "--repetitions", type=int, default=10)
    options = parser.parse_args()
    python = [sys.executable, "-c"]
    run = [sys.executable, "-m", "mobiquant", "run", "-m", str(options.file), "-p", "The sea was", "-n", "16"]
    cases: dict[str, tuple[Sequence[str], Callable[[Sequence[str]], float]]] = {
        "python alone": ([*python, "pass"], until_exit),
        "import runtime": ([*python, "import runtime"], until_exit),
        "from runtime import Model": ([*python, "from runtime import Model"], until_exit),
        "mobiquant run: first token": (run, until_first_byte),
    }
    print("| | median, s | best, s | processor, s |\n| --- | --- | --- | --- |")
    for name, (command, measure) in cases.items():
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = [measure(command) for _ in range(options.repetitions)]
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        processor = (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / options.repetitions
        print(f"| {name} | {statistics.median(seconds):.3f} | {min(seconds):.3f} | {processor:.3f} |")


def until_exit(command: Sequence[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True)
    return time.perf_counter() - start


def until_first_byte(command: Sequence[str]) -> float:
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        seconds = time.perf_counter() - start
        process.stdout.read()
    return seconds


if __name__ == "__main__":
    main()
