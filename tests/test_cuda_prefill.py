"""The prefill kernels of CUDA give the bits of plain C on shapes that fit no tile: tests/cuda/prefill_check.cu.

Needs nvcc and a GPU; skipped without.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from runtime._build import ROOT
from runtime.native import device_info

NVCC = shutil.which("nvcc")
USABLE, REASON = device_info()

pytestmark = [
    pytest.mark.skipif(NVCC is None, reason="needs nvcc"),
    pytest.mark.skipif(not USABLE, reason=REASON),
]


def test_prefill_kernels_give_the_bits_of_plain_c(tmp_path: Path) -> None:
    include = [f"-I{ROOT / part}" for part in ("include", "src", "kernels/cuda")]
    scalar, program = tmp_path / "scalar.o", tmp_path / "prefill_check"
    compiler = ["cc", "-std=c11", "-O2", "-ffp-contract=off", "-D_GNU_SOURCE", *include]
    subprocess.run([*compiler, "-c", ROOT / "kernels/scalar.c", "-o", scalar], check=True)
    # As the Makefile: 9.0 has instructions of its own; other GPUs take what PTX gives them.
    targets = ["-gencode", "arch=compute_90a,code=sm_90a", "-gencode", "arch=compute_80,code=compute_80"]
    source = Path(__file__).parent / "cuda" / "prefill_check.cu"
    command = [NVCC, "-std=c++17", "-O3", "-fmad=false", *targets, *include, source, scalar, "-o", program]
    subprocess.run(command, check=True, capture_output=True)
    found = subprocess.run([program], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout
