"""Whatever ends a writer, a file is the old one or the new one, and a killed writer's rest goes with the next."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.files import remove_leftovers, replacing, write_atomically

ROOT = Path(__file__).parent.parent
WRITER = """
import sys, time; from pathlib import Path; from runtime.files import replacing
with replacing(Path(sys.argv[1])) as temporary:
    temporary.write_bytes(b"half")
    print("written", flush=True)
    time.sleep(60)
"""


def dead_process() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_writer_ended_by_a_signal_leaves_the_old_file(tmp_path: Path, number: int) -> None:
    target = tmp_path / "file"
    target.write_bytes(b"old")
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, target], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout is not None and process.stdout.readline() == b"written\n"
    process.send_signal(number)
    process.wait(timeout=30)
    assert target.read_bytes() == b"old"
    write_atomically(target, b"new")
    assert target.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [target]


def test_error_in_the_block_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), replacing(target) as temporary:
        temporary.write_bytes(b"half")
        raise ZeroDivisionError
    assert target.read_bytes() == b"old" and list(tmp_path.iterdir()) == [target]


def test_error_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=rf"^{tmp_path}/no/file: cannot be written: No such file or directory$"):
        write_atomically(tmp_path / "no" / "file", b"")


def test_only_the_files_of_processes_that_have_ended_are_removed(tmp_path: Path) -> None:
    dead, names = dead_process(), [f".file.{os.getppid()}.tmp", ".file.tmp", "file.1.tmp", ".notes.txt", ".other.x.tmp"]
    for name in [*names, f".file.{dead}.tmp", f".other.{dead}.tmp"]:
        (tmp_path / name).touch()
    remove_leftovers(tmp_path, "file")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names, f".other.{dead}.tmp"])
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
