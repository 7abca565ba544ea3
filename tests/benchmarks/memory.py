"""Peak memory of calibration and export of one model, each in a process of its own (Linux).

    python -m tests.benchmarks.memory MODEL -o DIR --samples 4 --seq-len 16 --distill-steps 1 --activations disk

Other flags go to `mobiquant calibrate`, which goes on where an earlier run stopped: its peak is then that of
the blocks that were left. With --export-only DIR is a checkpoint.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path


def measured(name: str, command: list[str]) -> int:
    """Run it, print seconds and peak resident memory; the exit status."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *command])
    _, status, usage = os.wait4(process.pid, 0)
    seconds, cpu = time.perf_counter() - start, usage.ru_utime + usage.ru_stime
    print(f"{name}: {seconds:.0f} s ({cpu:.0f} s of CPU), peak {usage.ru_maxrss * 1024 / 1e9:.2f} GB", flush=True)
    return os.waitstatus_to_exitcode(status)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.memory", description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="the checkpoint")
    parser.add_argument("--export-only", action="store_true")
    options, flags = parser.parse_known_args()
    if not options.export_only:
        command = ["-m", "mobiquant", "calibrate", options.model, "-o", str(options.output), *flags]
        status = measured("calibrate", command)
        if status:
            return status
    target = options.output.with_suffix(".gguf")
    status = measured("export", ["-m", "export.to_gguf", str(options.output), "-o", str(target)])
    if not status:
        print(f"file: {target.stat().st_size / 1e9:.2f} GB")
    return status


if __name__ == "__main__":
    sys.exit(main())
