"""The Arm kernels under an emulator: the bits of scalar.c there, and of this machine's library on the same file.

tests/qemu/kernels_check.c does the comparing; it is built with a cross compiler and run with QEMU's user mode.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from tiny import TINY

from export.to_gguf import export_synthetic
from runtime._build import COMPILE_FLAGS, ROOT
from runtime.native import NativeModel, NativeSession

COMPILER = shutil.which("aarch64-linux-gnu-gcc")
QEMU = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
PROMPT = 24  # as in kernels_check.c
BUDGETS = [2.0, 3.5, 4.0, 5.2, 6.0, 8.0]

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="needs aarch64-linux-gnu-gcc (Debian: gcc-aarch64-linux-gnu)"),
    pytest.mark.skipif(QEMU is None, reason="needs qemu-aarch64 (Debian: qemu-user or qemu-user-static)"),
]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """kernels_check for plain ARMv8.0: only the files that ask for more may use more."""
    target = tmp_path_factory.mktemp("arm") / "kernels_check"
    sources = [
        Path(__file__).parent / "qemu" / "kernels_check.c",
        *(ROOT / "src").glob("*.c"),
        *(ROOT / "kernels").glob("*.c"),
    ]
    command = [COMPILER, *COMPILE_FLAGS, "-march=armv8-a", "-static", '-DMQ_VERSION="test"']
    command += [f"-I{ROOT / folder}" for folder in ("include", "src")]
    subprocess.run([*command, *map(str, sources), "-o", str(target), "-lm"], check=True)
    return target


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("arm") / "tiny.gguf"
    export_synthetic(TINY, target, "tiny")
    return target


@pytest.fixture(scope="module")
def host_hashes(file: Path) -> dict[float, str]:
    """FNV-1a of all logits of kernels_check's prompt, computed here, by budget."""
    session = NativeSession(
        NativeModel(file, allow_partial=False, mmap=True), n_ctx=0, n_threads=1, n_batch=512, kernel=None
    )
    tokens = np.arange(PROMPT, dtype=np.int32) * 37 % TINY.vocab_size
    hashes = {}
    for bits in BUDGETS:
        logits = np.empty((PROMPT, TINY.vocab_size), np.float32)
        session.rewind(0)
        session.set_average_bits(bits)
        session.eval(tokens, logits)
        value = 14695981039346656037
        for byte in logits.tobytes():
            value = (value ^ byte) * 1099511628211 % 2**64
        hashes[bits] = f"{value:016x}"
    return hashes


@pytest.mark.parametrize(
    ("cpu", "kernels"),
    [("max", ["neon_dotprod", "neon", "scalar"]), ("cortex-a53", ["neon", "scalar"])],
)
def test_every_arm_kernel_gives_the_bits_of_scalar_and_of_this_machine(
    program: Path, file: Path, host_hashes: dict[float, str], cpu: str, kernels: list[str]
) -> None:
    result = subprocess.run([QEMU, "-cpu", cpu, str(program), str(file)], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    lines = [line.split() for line in result.stdout.splitlines()]
    assert lines == [[kernel, f"{bits:.1f}", host_hashes[bits]] for kernel in kernels for bits in BUDGETS]
