"""Threads, forks and signals: what a model promises to threads, and how a command ends when it is interrupted.

MOBIQUANT_LONG=1 repeats the determinism test a hundred times on 1 to 16 threads.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from benchmarks.interrupts import Case, sweep
from tiny import TINY

from export.to_gguf import export_synthetic
from runtime import MobiQuantError, Model

ROOT = Path(__file__).parent.parent
LONG = os.environ.get("MOBIQUANT_LONG") == "1"
TALK = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A context so long that an answer goes on until it is ended."""
    target = tmp_path_factory.mktemp("processes") / "random.gguf"
    export_synthetic(replace(TINY, context_length=50_000), target, "random")
    return target


@pytest.fixture
def model(path: Path) -> Iterator[Model]:
    with Model(path, n_threads=1, n_ctx=4000, seed=1) as opened:
        yield opened


def in_threads(count: int, work: Callable[[int], object]) -> list[object]:
    """What `work(number)` gave in each of `count` threads that ran together: a result, or the error it raised."""
    results: list[object] = [None] * count

    def run(number: int) -> None:
        try:
            results[number] = work(number)
        except Exception as error:
            results[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def held() -> tuple[int, int]:
    """Open descriptors and threads of this process."""
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


# Threads


def test_refused_call_of_a_second_thread_leaves_what_the_model_remembers(model: Model) -> None:
    tokens = np.random.default_rng(0).integers(0, 256, 3000)
    expected = model.eval(tokens).copy()
    model.reset()
    refused: list[MobiQuantError] = []
    done = threading.Event()

    def disturb() -> None:
        while not done.is_set():
            for call in (lambda: model.eval([1]), model.reset, model.save_state, model.close, model.fork):
                try:
                    call()
                except MobiQuantError as error:
                    refused.append(error)
                else:
                    return

    worker = threading.Thread(target=disturb)
    evaluation = threading.Thread(target=lambda: model.eval(tokens))
    evaluation.start()
    while model.position == 0:
        time.sleep(0.001)
    worker.start()
    while len(refused) < 20 and evaluation.is_alive():
        time.sleep(0.001)
    done.set()
    worker.join()
    evaluation.join()
    assert {error.status for error in refused} == {"MQ_ERR_BUSY"}
    assert "fork() gives each thread its own" in str(refused[0])
    assert model.logits.tobytes() == expected.tobytes()
    assert model.reuse([*tokens.tolist(), 1]) == len(tokens)  # it still knows what is in its cache


def test_generation_notices_that_another_changed_the_cache(model: Model) -> None:
    first = model.generate([1, 2, 3])
    next(first)
    assert in_threads(1, lambda _: next(model.generate([4, 5]))) != [None]
    with pytest.raises(MobiQuantError, match="something else changed the cache") as caught:
        next(first)
    assert caught.value.status == "MQ_ERR_BUSY"
    assert len(list(zip(model.generate([1, 2, 3]), range(3), strict=False))) == 3


def test_sixty_four_sessions_are_opened_and_closed_in_threads(path: Path, model: Model) -> None:
    def work(number: int) -> str:
        opened = model.fork(empty=True) if number % 2 else Model(path, n_threads=2, n_ctx=500)
        with opened as session:
            return session.create_completion("the same", 5, temperature=0.0)["choices"][0]["text"]

    expected = work(1)
    before = held()
    assert in_threads(64, work) == [expected] * 64
    end = time.monotonic() + 20
    while held() != before and time.monotonic() < end:  # a thread's end is seen a moment after it was waited for
        time.sleep(0.01)
    assert held() == before


def test_one_hash_whatever_the_threads_and_however_often(path: Path) -> None:
    tokens = np.random.default_rng(3).integers(0, 256, 70)

    def run(threads: int) -> str:
        with Model(path, n_threads=threads, n_ctx=200, avg_bits=3.5) as model:
            digest = hashlib.sha256(model.eval(tokens, all_logits=True).tobytes())
            generated = model.create_completion(tokens.tolist(), 10, seed=2, temperature=1.5)
        return digest.hexdigest() + generated["choices"][0]["text"]

    counts = [*range(1, 17)] * 100 if LONG else [1, 2, 3, 16]
    assert len({run(threads) for threads in counts}) == 1


def test_process_that_ends_while_a_thread_computes_does_not_crash(path: Path) -> None:
    code = (
        "import sys, threading, time; from runtime import Model\n"
        "model = Model(sys.argv[1], n_threads=2)\n"
        "threading.Thread(target=lambda: model.eval([1] * 40_000), daemon=True).start()\n"
        "while not model.position: time.sleep(0.001)\n"
    )
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", code, path], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")


# Forks


def in_child(work: Callable[[], object]) -> object:
    """What `work` gives in a forked process, as JSON."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writing, json.dumps(work()).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as file:
        text = file.read()
    os.waitpid(child, 0)
    return json.loads(text) if text else None


def test_forked_process_generates_and_talks_as_its_parent_does(path: Path) -> None:
    with Model(path, n_threads=3, n_ctx=500, avg_bits=3.0) as model:

        def work() -> list[str]:
            model.reset()
            text = model.create_completion("a tale", 8, temperature=0.0)["choices"][0]["text"]
            return [text, model.create_chat_completion(TALK, 8, temperature=0.0)["choices"][0]["message"]["content"]]

        expected = work()
        model.chat.prepare()  # a process that waits for a conversation of the parent's
        assert in_child(work) == expected
        assert in_child(lambda: model.close()) is None
        assert work() == expected


def test_parent_s_template_is_rendered_while_a_forked_process_lives(model: Model) -> None:
    model.chat.prepare()
    child = os.fork()
    if child == 0:
        time.sleep(30)
        os._exit(0)
    try:
        assert model.chat.encode(TALK)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_template_is_not_rendered_with_modules_of_the_working_directory(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("json", "jinja2", "resource"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\n")
    monkeypatch.chdir(tmp_path)
    assert model.chat.encode(TALK)
    assert not (tmp_path / "executed").exists()


# Files that change under a command


@pytest.mark.parametrize("options", [(), ("--no-mmap",)], ids=["mapped", "read"])
def test_file_cut_under_a_command_is_one_line_and_nothing_when_it_was_read(
    path: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    file = tmp_path / "cut.gguf"
    file.write_bytes(path.read_bytes())
    command = [
        sys.executable,
        "-m",
        "mobiquant",
        "run",
        "-m",
        str(file),
        "-p",
        "hi",
        "-n",
        "0",
        "--temp",
        "2",
        *options,
    ]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.read(1)
    os.truncate(file, 4096)
    if options:
        process.stdout.read(200)  # it goes on
        process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=60)[1].decode()
    assert process.returncode == (130 if options else 1), errors
    expected = f"error: {file}: cannot be read while it is mapped: it became shorter, or its disk failed; --no-mmap "
    assert re.match("prompt " if options else re.escape(expected), errors) and errors.count("\n") == 1


# Ctrl-C


@pytest.mark.parametrize("command", ["run", "chat", "serve", "perplexity"])
def test_control_c_at_random_moments_is_one_line(path: Path, tmp_path: Path, command: str) -> None:
    text = tmp_path / "text.txt"
    text.write_text("some text to score " * 40)
    options = {
        "run": (
            "-p",
            "hi",
            "-n",
            "300",
            "-c",
            "500",
            "--html",
            "{out}/bits.html",
            "--prompt-cache",
            "{out}/session.bin",
        ),
        "chat": ("-p", "hi", "-n", "100", "-c", "500"),
        "serve": ("--port", "0", "-c", "500"),
        "perplexity": ("-f", f"{text}", "-c", "64"),
    }
    case = Case(("-m", "mobiquant", command, "-m", f"{path}", *options[command]), span=1.5)
    _, wrong = sweep(case, signal.SIGINT, times=3, seed=int(time.time()) if LONG else 4)
    assert not wrong


def test_control_c_that_python_would_forget_ends_the_process() -> None:
    code = (
        "import os, signal, sys, time; from mobiquant import interrupts\n"
        "class Loud:\n"
        "    def __del__(self): os.kill(os.getpid(), signal.SIGINT)\n"
        "def command():\n"
        "    Loud(); time.sleep(20); return 0\n"
        "sys.exit(interrupts.run(command))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


def test_ignored_control_c_stays_ignored() -> None:
    code = (
        "import os, signal, sys; from mobiquant import interrupts\n"
        "interrupts.end_at_once()\n"
        "sys.exit(interrupts.run(lambda: os.kill(os.getpid(), signal.SIGINT) or 0))"
    )
    ignoring = lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)  # noqa: E731
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, preexec_fn=ignoring, capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")
