"""The C programs of tests/c, built as the library is: the API end to end, injected failures, cuts and changed bytes.

`make asan`, `ubsan`, `tsan` and `msan` run the same programs under sanitizers, `make sweep` every value of every byte.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from malformed import CLASSES, make
from tiny import TINY

from export.to_gguf import export_synthetic
from runtime._build import COMPILE_FLAGS, ROOT

PROGRAMS = Path(__file__).parent / "c"
COMPILER = shutil.which("cc") or "gcc"
INCLUDE = [f"-I{ROOT / folder}" for folder in ("include", "src")]
# As in checks.mk: what failures.c makes fail.
WRAPPED = ("aligned_alloc", "free", "pthread_create", "open", "close", "fstat", "mmap", "read")


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the library's objects."""
    folder = tmp_path_factory.mktemp("c")
    sources = [*(ROOT / "src").glob("*.c"), *(ROOT / "kernels").glob("*.c"), PROGRAMS / "harness.c"]
    command = [COMPILER, *COMPILE_FLAGS, "-O1", *INCLUDE, "-c", *map(str, sources)]
    subprocess.run(command, cwd=folder, check=True)
    return folder


@pytest.fixture(scope="module")
def tiny(build: Path) -> Path:
    target = build / "tiny.gguf"
    export_synthetic(replace(TINY, context_length=128, static_order=tuple(range(14)) * 3), target, "tiny")
    return target


def run(build: Path, name: str, *arguments: object, link: tuple[str, ...] = ()) -> str:
    """What the program printed; it must end well."""
    program = build / name
    objects = sorted(map(str, build.glob("*.o")))
    command = [COMPILER, *COMPILE_FLAGS, "-O1", *INCLUDE, str(PROGRAMS / f"{name}.c"), *objects]
    subprocess.run([*command, "-lm", "-pthread", *link, "-o", str(program)], check=True)
    done = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, f"{name}: {done.returncode}: {done.stderr}"
    return done.stdout


def test_api_from_end_to_end(build: Path, tiny: Path, tmp_path: Path) -> None:
    good = tiny.read_bytes()
    for kind in CLASSES:
        (tmp_path / f"{kind.name}.gguf").write_bytes(make(good, kind, 0)[0])
    assert run(build, "suite", tiny, tmp_path).endswith("suite: ok\n")


def test_every_failed_allocation_thread_and_system_call_is_a_named_error(build: Path, tiny: Path) -> None:
    out = run(build, "failures", tiny, link=tuple(f"-Wl,--wrap={name}" for name in WRAPPED))
    counts = {name: int(count) for count, name in re.findall(r"(\d+) (\w+)", out)}
    assert out.count("each a named error") == 2
    assert counts["allocation"] > 30 and counts["thread"] == 2


def test_every_cut_and_changed_byte_is_refused_or_runs(build: Path, tmp_path: Path) -> None:
    target = tmp_path / "small.gguf"
    shape = replace(TINY, vocab_size=64, context_length=32, block_count=1, feed_forward_length=128, router_hidden=2)
    export_synthetic(shape, target, "small")
    lines = run(build, "sweep", target, 8, 1).splitlines()
    assert [line.split(":")[0] for line in lines] == ["cuts", "cuts, opened as partial", "changed bytes of metadata"]
    assert "0 loaded" in lines[0] and "MQ_ERR_FORMAT" in lines[2]
