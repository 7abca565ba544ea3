"""Hours of mixed use of one file: nothing may grow, and the same question gets the same answer at the end (Linux).

    python tests/benchmarks/soak.py FILE.gguf [--minutes 60] [--seed 0] [-o soak.json]

One process uses the Python API and one server answers over HTTP, in turn: completions and chats of random prompts,
budgets, samplers, contexts and batches, some cancelled, some left half-way; states saved and loaded, forks in threads
and in processes, embeddings, likelihoods, and requests that must be refused. Every minute a row: resident memory,
memory of its own (not the mapped file), open descriptors and threads of both processes, and the hash of a fixed
generation. The first tenth of the time warms up; after it the second half may not hold more than the first. Exit
status 1 when something grew or differed.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import hashlib
import http.client
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from runtime import MobiQuantError, Model

TEXT = "the sea was grey and old houses stood at the end of a lane Grüße 😀 <|end|> 1 2 3 then she said no \n"
BITS = (2, 4, 6, 8, 2.5, 3.0, 4.7)
GROWTH = 4 << 20  # bytes of a process's own memory: what the allocator's arenas drift by


@dataclass(frozen=True)
class Sample:
    """One process at one moment. own: bytes of memory that no file backs."""

    minute: float
    process: str
    resident: int
    own: int
    descriptors: int
    threads: int


def sample(minute: float, name: str, pid: int) -> Sample:
    if pid == os.getpid():  # what was freed, and only kept for later, is not held
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    kilobytes = {key: int(value) for key, value in re.findall(r"^(\w+):\s+(\d+)", status, re.MULTILINE)}
    descriptors = len(os.listdir(f"/proc/{pid}/fd"))
    return Sample(minute, name, kilobytes["VmRSS"] << 10, kilobytes["RssAnon"] << 10, descriptors, kilobytes["Threads"])


class Api:
    """Random use of one model through the Python API; the model stays open all the time."""

    def __init__(self, path: Path, random: np.random.Generator) -> None:
        self.path, self.random = path, random
        self.words = TEXT.split(" ")
        self.model = Model(path, n_threads=1)
        self.done: Counter[str] = Counter()

    def prompt(self, most: int = 120) -> str:
        return " ".join(self.random.choice(self.words, int(self.random.integers(1, most))))

    def options(self) -> dict[str, Any]:
        random = self.random
        bits = BITS[random.integers(len(BITS))]
        return {
            "max_tokens": int(random.integers(0, 60)),
            "temperature": float(random.choice([0.0, 0.8, 2.0])),
            "top_k": int(random.choice([0, 1, 40])),
            "mirostat_mode": int(random.choice([0, 0, 2])),
            "repeat_penalty": float(random.choice([1.0, 1.3])),
            "seed": int(random.integers(1 << 30)),
            "stop": ["\n"] if random.random() < 0.2 else [],
        } | ({"bits": bits} if isinstance(bits, int) else {"avg_bits": bits})

    def complete(self) -> None:
        logprobs = int(self.random.integers(5)) if self.random.random() < 0.2 else None
        echo = bool(self.random.random() < 0.2)
        self.model.create_completion(self.prompt(), logprobs=logprobs, echo=echo, **self.options())

    def chat(self) -> None:
        messages = [{"role": "user", "content": self.prompt(20)}]
        self.model.create_chat_completion(messages, keep_cache=True, **self.options())

    def leave_half_way(self) -> None:
        chunks = self.model.create_completion(self.prompt(), stream=True, **self.options())
        for _ in zip(chunks, range(self.random.integers(1, 10)), strict=False):
            pass

    def cancel(self) -> None:
        left = iter(range(self.random.integers(0, 10)))
        self.model.create_completion(self.prompt(), cancelled=lambda: next(left, None) is None, **self.options())

    def other_context(self) -> None:
        n_ctx, n_batch = int(self.random.integers(64, self.model.n_ctx)), int(self.random.integers(1, 200))
        mmap, threads = bool(self.random.random() < 0.8), int(self.random.integers(1, 4))
        with Model(self.path, n_ctx=n_ctx, n_batch=n_batch, n_threads=threads, mmap=mmap) as model:
            model.create_completion(self.prompt(10), 8)

    def save_and_load(self) -> None:
        state = self.model.save_state()
        self.model.eval([1, 2, 3]) if self.model.position + 3 <= self.model.n_ctx else self.model.reset()
        self.model.load_state(state)
        if self.model.save_state() != state:
            raise AssertionError("a loaded state gives another state")

    def fork_in_threads(self) -> None:
        def work(session: Model) -> None:
            with session:
                session.create_completion("The sea", 8)

        forks = [
            self.model.fork(empty=bool(self.random.random() < 0.5)) for _ in range(int(self.random.integers(1, 8)))
        ]
        threads = [threading.Thread(target=work, args=(fork,)) for fork in forks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def fork_process(self) -> None:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                self.model.create_completion(self.prompt(10), 4)
                status = 0
            finally:
                os._exit(status)
        if os.waitpid(child, 0)[1] != 0:
            raise AssertionError("a forked process failed")

    def embed(self) -> None:
        self.model.embed(self.prompt(40), pooling=str(self.random.choice(["mean", "last", "none"])))

    def refused(self) -> None:
        state = bytearray(self.model.save_state())
        state[self.random.integers(len(state))] ^= 1
        attempts: list[Callable[[], object]] = [
            lambda: self.model.eval([1 << 30]),
            lambda: self.model.eval([0] * (self.model.n_ctx + 1)),
            lambda: self.model.load_state(state),
            lambda: self.model.create_completion("x", bits=3),
            lambda: Model(self.path, n_ctx=1 << 30),
            lambda: Model(__file__),
        ]
        for attempt in attempts:
            try:
                attempt()
            except (MobiQuantError, ValueError):
                continue
            raise AssertionError("something that must be refused was not")

    def step(self) -> None:
        """One random use."""
        uses = [self.complete, self.chat, self.leave_half_way, self.cancel, self.other_context, self.save_and_load]
        uses += [self.fork_in_threads, self.fork_process, self.embed, self.refused]
        use = uses[self.random.integers(len(uses))]
        use()
        self.done[f"api {use.__name__}"] += 1


class Web:
    """Random use of a server by clients with and without manners."""

    def __init__(self, port: int, random: np.random.Generator, api: Api) -> None:
        self.port, self.random, self.api = port, random, api
        self.done: Counter[str] = Counter()

    def post(self, path: str, body: dict[str, Any] | bytes) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request("POST", path, data, {"Content-Type": "application/json"})
        return connection

    def answer(self, path: str, body: dict[str, Any] | bytes) -> tuple[int, bytes]:
        connection = self.post(path, body)
        try:
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def body(self) -> dict[str, Any]:
        return {"prompt": self.api.prompt(), "stream": bool(self.random.random() < 0.5)} | self.api.options()

    def complete(self) -> None:
        self.expect(200, "/v1/completions", self.body())

    def chat(self) -> None:
        body = {"messages": [{"role": "user", "content": self.api.prompt(20)}], **self.api.options()}
        self.expect(200, "/v1/chat/completions", body)

    def cancel(self) -> None:
        connection = self.post("/v1/completions", self.body() | {"stream": True, "max_tokens": 400, "stop": []})
        response = connection.getresponse()
        for _ in range(self.random.integers(0, 8)):
            response.readline()
        response.close()
        connection.close()

    def leave_at_once(self) -> None:
        self.post("/v1/completions", self.body() | {"max_tokens": 400}).close()

    def refused(self) -> None:
        for body in (b"{", b"[]", {"prompt": 3}, {"prompt": "x", "max_tokens": -1}, {"prompt": "x", "n": 2}):
            self.expect(400, "/v1/completions", body)

    def expect(self, status: int, path: str, body: dict[str, Any] | bytes) -> bytes:
        found, text = self.answer(path, body)
        if found != status:
            raise AssertionError(f"{path}: expected status {status}, found {found}: {text!r:.300}")
        return text

    def step(self) -> None:
        """One random use."""
        uses = [self.complete, self.chat, self.cancel, self.leave_at_once, self.refused]
        use = uses[self.random.integers(len(uses))]
        use()
        self.done[f"web {use.__name__}"] += 1


@contextmanager
def serving(path: Path) -> Iterator[tuple[int, int]]:
    """A server with two sessions; gives its port and process id."""
    command = [sys.executable, "-m", "mobiquant", "serve", "-m", path, "--port", "0", "-t", "1", "-np", "2"]
    # A file and not a pipe: nobody reads on, and a server whose log is full stands still.
    with tempfile.NamedTemporaryFile("w+") as log:
        process = subprocess.Popen([*map(str, command)], stderr=log)
        try:
            started = None
            while started is None:
                time.sleep(0.05)
                text = Path(log.name).read_text(encoding="utf-8")
                started = re.search(r":(\d+)/v1$", text, re.MULTILINE)
                if started is None and process.poll() is not None:
                    raise RuntimeError(f"the server did not start: {text}")
            yield int(started[1]), process.pid
        finally:
            process.terminate()
            process.wait()


def fixed_answer(path: Path, web: Web) -> str:
    """A hash of the logits and tokens of a fixed prompt at fixed precisions, by the API and by the server."""
    digest = hashlib.sha256()
    with Model(path, n_threads=1) as model:
        for bits in (2, 8, 3.5):
            model.bits = bits
            model.reset()
            digest.update(model.eval(model.tokenize("The old house stood"), all_logits=True).tobytes())
            text = model.create_completion("The old house stood", 40, seed=3, temperature=1.0)["choices"][0]["text"]
            asked = {"prompt": "The old house stood", "max_tokens": 40, "seed": 3, "temperature": 1.0}
            asked |= {"bits": bits} if isinstance(bits, int) else {"avg_bits": bits}
            if json.loads(web.expect(200, "/v1/completions", asked))["choices"][0]["text"] != text:
                raise AssertionError(f"the server answers other than the API at {bits} bits")
            digest.update(text.encode())
    return digest.hexdigest()


def growth(samples: list[Sample], name: str, minutes: float) -> tuple[bool, str]:
    """Whether the process stayed flat after the warm-up, and its figures."""
    mine = [s for s in samples if s.process == name and s.minute > 0.1 * minutes]
    if len(mine) < 4:
        raise ValueError(f"--minutes: expected time for at least 4 samples after the warm-up, found {len(mine)}")
    early, late = mine[: len(mine) // 2], mine[len(mine) // 2 :]

    def medians(values: Callable[[Sample], int]) -> tuple[int, int]:
        return int(statistics.median(map(values, early))), int(statistics.median(map(values, late)))

    own, resident = medians(lambda s: s.own), medians(lambda s: s.resident)
    descriptors, threads = medians(lambda s: s.descriptors), medians(lambda s: s.threads)
    flat = own[1] - own[0] <= GROWTH and descriptors[1] <= descriptors[0] and threads[1] <= threads[0]
    text = (
        f"{name}: own memory {own[0] / 1e6:.1f} -> {own[1] / 1e6:.1f} MB, resident {resident[0] / 1e6:.1f} -> "
        f"{resident[1] / 1e6:.1f} MB, descriptors {descriptors[0]} -> {descriptors[1]}, "
        f"threads {threads[0]} -> {threads[1]} (medians of the two halves after the warm-up)"
    )
    return flat, text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--every", type=float, default=60.0, metavar="S", help="seconds between samples (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, metavar="FILE.json")
    options = parser.parse_args()
    random = np.random.default_rng(options.seed)
    samples: list[Sample] = []
    with serving(options.file) as (port, server):
        api = Api(options.file, random)
        web = Web(port, random, api)
        first = fixed_answer(options.file, web)
        same = True
        start = time.monotonic()
        next_sample = start + options.every
        while (now := time.monotonic()) < start + 60 * options.minutes:
            (api if random.random() < 0.5 else web).step()
            if now >= next_sample:
                next_sample += options.every
                found = fixed_answer(options.file, web)
                same = same and found == first
                minute = (now - start) / 60
                samples += [sample(minute, "api", os.getpid()), sample(minute, "server", server)]
                row = ", ".join(
                    f"{s.process} {s.resident / 1e6:.1f} MB ({s.own / 1e6:.1f} own) {s.descriptors} fd {s.threads} thr"
                    for s in samples[-2:]
                )
                print(f"{minute:6.1f} min  {row}  {found[:12]}", flush=True)
        last = fixed_answer(options.file, web)
        same = same and last == first
        done = api.done + web.done
    judged = [growth(samples, name, options.minutes) for name in ("api", "server")]
    print(f"{sum(done.values())} uses: " + ", ".join(f"{name} {count}" for name, count in sorted(done.items())))
    print(*(text for _, text in judged), f"hash {first} -> {last}", sep="\n")
    if options.output:
        content = {
            "minutes": options.minutes,
            "uses": done,
            "hashes": [first, last],
            "samples": [*map(asdict, samples)],
        }
        options.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0 if same and all(flat for flat, _ in judged) else 1


if __name__ == "__main__":
    sys.exit(main())
