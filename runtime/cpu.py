"""What the machine has: physical cores for the default thread count, and instruction-set flags for `mobiquant info`."""

from __future__ import annotations

import os
from pathlib import Path

# Flags that decide which kernels can run, as Linux names them on x86 and Arm.
_FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_vnni", "avx_vnni", "asimd", "asimddp", "i8mm", "sve")


def physical_cores() -> int:
    """Cores this process may run on, hyper-threads of one core counted once; at least 1."""
    cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores = set()
    for cpu in cpus:
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            cores.add(siblings.read_text(encoding="ascii").strip())
        except OSError:  # no such file outside Linux, or hidden in a container
            cores.add(str(cpu))
    return len(cores)


def cpu_flags() -> list[str]:
    """Instruction sets of this CPU that matter to the kernels; empty where /proc/cpuinfo does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    present = {word for line in lines if line.lower().startswith(("flags", "features")) for word in line.split()}
    return [flag for flag in _FLAGS if flag in present]
