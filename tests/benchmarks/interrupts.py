"""Commands that are interrupted, killed, or find the disk full at random moments: how they end, and what they leave.

    python -m tests.benchmarks.interrupts CASE FILE.gguf CHECKPOINT MODEL_FOLDER [--by INT|KILL|FULL] [--times 100]

CASE: run, chat, perplexity, evaluate, bench, serve, export, calibrate. An undisturbed run comes first and says how long
it takes and what it writes. Then the command is started again and again, and the signal comes at random moments.
After SIGINT: status 130 (or the command had finished), one line about it, no traceback, nothing half-written. After
either signal: no file under its own name that differs from a finished one, and where the command goes on from what it
left (calibrate), the same bytes in the end and nothing else in the folder. FULL: a disk (as root a small tmpfs, else a
limit on a file) of random size: one line that names the file, and the same about what is left. Exit status 1
when anything was otherwise.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent.parent
PATIENCE = 60.0  # seconds for a command to end after the signal
# What one Ctrl-C may leave on stderr: that it came, or the figures of the text that it ended.
LAST_LINE = re.compile(r"(error: )?interrupted.*|prompt \d+ tokens, .*")


@dataclass(frozen=True)
class Case:
    """A command. arguments: of Python, with {out} for a folder to write to. resumes: it goes on from what it left.
    ends: by itself; a server and a chat are given `span` seconds."""

    arguments: tuple[str, ...]
    resumes: bool = False
    span: float | None = None


def cases(file: Path, checkpoint: Path, model: Path, text: Path) -> dict[str, Case]:
    program = ("-m", "mobiquant")
    small = ("--samples", "4", "--seq-len", "64", "--batch", "2", "--epochs", "1", "--recipe", "paper")
    html = ("--html", "{out}/bits.html", "--prompt-cache", "{out}/session.bin")
    tables = ("--output", "{out}/table.json", "--budgets", "2,3.0", "--windows", "2")
    return {
        "run": Case(
            (*program, "run", "-m", f"{file}", "-p", "The sea", "-n", "200", "-s", "1", "--avg-bits", "3", *html)
        ),
        "chat": Case((*program, "chat", "-m", f"{file}", "-p", "Hello", "-n", "60"), span=4.0),
        "perplexity": Case((*program, "perplexity", "-m", f"{file}", "-f", f"{text}", "--windows", "4")),
        "evaluate": Case((*program, "evaluate", f"{file}", "--text", f"{text}", *tables)),
        "bench": Case((*program, "bench", "-m", f"{file}", "-p", "64", "-n", "64", "-r", "1", "--bits", "2")),
        "serve": Case((*program, "serve", "-m", f"{file}", "--port", "0"), span=4.0),
        "export": Case(("-m", "export.to_gguf", f"{checkpoint}", "-o", "{out}/model.gguf", "--name", "m")),
        "calibrate": Case((*program, "calibrate", f"{model}", "-o", "{out}/checkpoint", *small), resumes=True),
    }


@dataclass(frozen=True)
class Ended:
    status: int
    stdout: str
    stderr: str
    seconds: float


def start(case: Case, out: Path, largest_file: int | None = None) -> subprocess.Popen[str]:
    def prepare() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # as from a terminal, also where this runs in the background
        if largest_file is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))

    arguments = [argument.format(out=out) for argument in case.arguments]
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        stdin=subprocess.PIPE if case.span else subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=prepare,
    )


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[int | None]:
    """At `folder` a file system of `size` bytes; as an ordinary user, gives the size that no file there may exceed."""
    if os.geteuid() != 0:
        yield size
        return
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True)
    try:
        yield None
    finally:
        subprocess.run(["umount", folder], check=True)


def on_full_disks(case: Case, times: int, seed: int) -> tuple[Counter[str], list[str]]:
    """As `sweep`, on disks of random sizes up to what a finished command leaves."""
    random = np.random.default_rng(seed)
    ends: Counter[str] = Counter()
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        whole, out = Path(name) / "whole", Path(name) / "out"
        whole.mkdir()
        start(case, whole).communicate()
        expected = contents(whole)
        total = sum(map(len, expected.values()))
        for number in range(times):
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir()
            size = int(random.integers(1, total // 4096 + 2)) * 4096
            with small_disk(out, size) as largest:
                process = start(case, out, largest)
                _, errors = process.communicate()
                found, kept = (
                    left(contents(out), expected, case, signal.SIGINT, finished=process.returncode == 0),
                    contents(out),
                )
            line = re.split(r"[\r\n]+", errors.strip())[-1]
            named = re.match(rf"error: {re.escape(str(out))}\S*: (cannot be written: )?", line)
            if process.returncode not in (0, 1) or (process.returncode == 1 and (not named or "Traceback" in errors)):
                found = f"status {process.returncode}"
            ends["disk full" if process.returncode else "finished"] += 1
            if case.resumes and process.returncode and not found:
                for file, data in kept.items():
                    (out / file).parent.mkdir(parents=True, exist_ok=True)
                    (out / file).write_bytes(data)
                start(case, out).communicate()
                found = left(contents(out), expected, case, signal.SIGINT, finished=True)
            if found:
                wrong.append(f"#{number} on a disk of {size} bytes: {found}: {errors[-1500:]}")
                print(wrong[-1], flush=True)
    return ends, wrong


def disturbed(case: Case, out: Path, moment: float, number: int) -> Ended:
    """One run that gets the signal `moment` seconds after its start."""
    process = start(case, out)
    try:
        process.wait(timeout=moment)
    except subprocess.TimeoutExpired:
        os.kill(process.pid, number)
    begun = time.monotonic()
    try:
        output, errors = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        output, errors = process.communicate()
        errors += f"\nstill running {PATIENCE:g} s after the signal"
    return Ended(process.returncode, output, errors, time.monotonic() - begun)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fault(ended: Ended) -> str | None:
    """What was wrong with the way a command ended after SIGINT."""
    if "still running" in ended.stderr:
        return "it did not end"
    if re.search("Traceback|Exception ignored|Error:", ended.stderr):
        # Until the program's first lines have set a handler, the interpreter is alone with the signal.
        inside = re.search(r'File "[^"]*/(mobiquant|runtime|export)/', ended.stderr)
        first = "import interrupts" in ended.stderr or "interrupts.end_at_once()" in ended.stderr
        return "a traceback" if inside and not first else None
    if ended.status not in (0, 130, -signal.SIGINT):
        return f"status {ended.status}"
    last = re.split(r"[\r\n]+", ended.stderr.strip())[-1]
    if ended.status == 130 and not LAST_LINE.search(last):
        return "no line that says so"
    return None


def began(ended: Ended) -> str:
    """How it ended, by name."""
    if ended.status == -signal.SIGINT or "Traceback" in ended.stderr:
        return "before the program's first line"
    return {130: "interrupted", 0: "finished before"}.get(ended.status, f"status {ended.status}")


def sweep(case: Case, number: int, times: int, seed: int) -> tuple[Counter[str], list[str]]:
    """How often what happened, and what was wrong."""
    random = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        whole = folder / "whole"
        whole.mkdir()
        begun = time.monotonic()
        if case.span is None:
            _, errors = start(case, whole).communicate()
            span, expected = time.monotonic() - begun, contents(whole)
        else:
            errors, span, expected = "", case.span, {}
        print(f"an undisturbed run takes {span:.2f} s and leaves {len(expected)} files", flush=True)
        ends: Counter[str] = Counter()
        wrong: list[str] = []
        out = folder / "out"
        for time_ in range(times):
            if not case.resumes or not out.exists():
                shutil.rmtree(out, ignore_errors=True)
                out.mkdir()
            moment = float(random.uniform(0, 1.05 * span))
            ended = disturbed(case, out, moment, number)
            ends[began(ended) if number == signal.SIGINT else "killed" if ended.status < 0 else "finished"] += 1
            found = fault(ended) if number == signal.SIGINT else None
            found = found or left(contents(out), expected, case, number, finished=ended.status == 0)
            if found:
                wrong.append(f"#{time_} at {moment:.3f} s: {found}: {ended.stderr[-1500:]}")
                print(wrong[-1], flush=True)
            if case.resumes and ended.status == 0:
                shutil.rmtree(out)
        if case.resumes and out.exists():
            _, errors = start(case, out).communicate()
            found = left(contents(out), expected, case, number, finished=True)
            wrong += [f"the run that went on: {found}: {errors[-1500:]}"] if found else []
    return ends, wrong


def left(found: dict[str, bytes], expected: dict[str, bytes], case: Case, number: int, *, finished: bool) -> str | None:
    """What is wrong with the files: other bytes, missing after a finish, temporary ones after Ctrl-C or a finish."""
    strange = {name for name in found if Path(name).name.startswith(".")}
    if strange and (finished or number == signal.SIGINT):
        return f"it left {sorted(strange)}"
    if finished and not case.span and {name: len(data) for name, data in found.items()}.keys() != expected.keys():
        return f"expected the files {sorted(expected)}, found {sorted(found)}"
    if not case.resumes or finished:  # a run that is not done writes blocks anew
        different = [n for n in found.keys() & expected.keys() if repeatable(n) and found[n] != expected[n]]
        return f"other bytes in {different}" if different and (finished or not interruptible(different)) else None
    return None


def repeatable(name: str) -> bool:
    """Whether two runs write the same bytes; a table has times in it."""
    return not name.endswith(".json") or "checkpoint" in name


def interruptible(names: list[str]) -> bool:
    """Files that hold what was done until Ctrl-C, whole in themselves."""
    return all(name in ("bits.html", "session.bin") for name in names)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("case")
    parser.add_argument("file", type=Path, help="a GGUF file")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("model", type=Path, help="a Hugging Face folder")
    parser.add_argument("--text", type=Path, default=ROOT / "mobiquant" / "demo" / "heldout.txt")
    parser.add_argument("--by", choices=("INT", "KILL", "FULL"), default="INT")
    parser.add_argument("--times", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    known = cases(*(path.resolve() for path in (options.file, options.checkpoint, options.model, options.text)))
    if options.by == "FULL":
        ends, wrong = on_full_disks(known[options.case], options.times, options.seed)
    else:
        ends, wrong = sweep(known[options.case], signal.Signals[f"SIG{options.by}"], options.times, options.seed)
    print(f"{options.case}, {options.by}: " + ", ".join(f"{n} {name}" for name, n in sorted(ends.items())))
    print(f"{len(wrong)} of {options.times} were wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
