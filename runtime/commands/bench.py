"""`mobiquant bench`: speed of a file in llama-bench's form, and of single linears, beside the machine's bandwidth.

Cases are interleaved: every repetition measures the bandwidth and then each case once, so that a machine whose speed
drifts is unfair to none of them. Quote the median or the best; contention only slows a run.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from runtime.budget import Budget
from runtime.commands.faults import watch
from runtime.measure import measure_matvec, measure_read
from runtime.native import NativeModel, NativeSession

READ_BYTES = 400_000_000
LINEAR_SHAPES = ((4096, 4096), (14336, 4096))  # of an 8B model
_BATCH = 512


@dataclass
class Row:
    """One case and its samples. Names shared with llama-bench's JSON mean the same; speeds are tokens per second.

    bytes_per_token, gb_per_s, percent_of_bandwidth: of generation only; a prompt reads weights once for many tokens.
    The bandwidth is the CPU's, so the GPU has no percentage.
    """

    model: str
    size: int
    backend: str
    kernel: str
    n_threads: int
    bits: str
    type_k: str
    type_v: str
    n_prompt: int
    n_gen: int
    n_depth: int
    samples_ts: list[float] = field(default_factory=list)
    bandwidths: list[float] = field(default_factory=list)  # GB/s, one beside each sample
    bytes_per_token: float = 0.0

    @property
    def test(self) -> str:
        name = f"pp{self.n_prompt}" if self.n_prompt else f"tg{self.n_gen}"
        return f"{name} @ d{self.n_depth}" if self.n_depth else name

    @property
    def gb_per_s(self) -> float:
        return self.bytes_per_token * max(self.samples_ts) / 1e9

    def to_dict(self) -> dict[str, object]:
        """The row for JSON and CSV."""
        spread = statistics.stdev(self.samples_ts) if len(self.samples_ts) > 1 else 0.0
        generation = {
            "bytes_per_token": round(self.bytes_per_token),
            "gb_per_s": self.gb_per_s,
            "percent_of_bandwidth": 100 * self.gb_per_s / max(self.bandwidths) if self.bandwidths else None,
        }
        return {
            **{key: value for key, value in asdict(self).items() if key not in ("bandwidths", "bytes_per_token")},
            "test": self.test,
            "avg_ts": statistics.mean(self.samples_ts),
            "median_ts": statistics.median(self.samples_ts),
            "stddev_ts": spread,
            "best_ts": max(self.samples_ts),
            **(generation if self.n_gen else dict.fromkeys(generation)),
        }


@dataclass(frozen=True)
class Plan:
    """What `bench` measures: every combination.

    depths: tokens in the cache before. cache_types: of keys, of values. output_bits: of the head; None: as the budget,
    the file's default when routed or static.
    """

    prompts: Sequence[int]
    generations: Sequence[int]
    depths: Sequence[int]
    threads: Sequence[int]
    cache_types: tuple[str, str]
    budgets: Sequence[Budget]
    output_bits: int | None
    repetitions: int
    kernel: str | None
    device: str


def bench_file(path: Path, plan: Plan, progress: Callable[[str], None]) -> list[Row]:
    """Measure a file. Raises MobiQuantError for a bad file or option."""
    watch(path)
    model = NativeModel(path, allow_partial=False, mmap=True, device=plan.device)
    watch(path, model)
    backend = model.device.upper()
    context = min(model.info().context_length, max(plan.depths) + max(*plan.prompts, *plan.generations, 1))
    keys, values = plan.cache_types
    sessions = {
        threads: NativeSession(
            model,
            n_ctx=context,
            n_threads=threads,
            n_batch=_BATCH,
            kernel=plan.kernel,
            cache_type_k=keys,
            cache_type_v=values,
        )
        for threads in plan.threads
    }
    size = model.info().file_bytes
    cases: list[tuple[Row, Budget]] = []
    for threads, session in sessions.items():
        for budget in plan.budgets:
            name = f"{budget.bits:g}{' avg' if budget.routed else ' static' if budget.static else ''}"
            lengths = [(n, 0) for n in plan.prompts if n] + [(0, n) for n in plan.generations if n]
            for depth, pair in itertools.product(plan.depths, lengths):
                row = Row(path.stem, size, backend, session.kernel, threads, name, keys, values, *pair, depth)
                cases.append((row, budget))
    for repetition in range(plan.repetitions + 1):
        read = {}
        if backend == "CPU":
            read = {threads: READ_BYTES / min(measure_read(threads, READ_BYTES, 3)) / 1e9 for threads in plan.threads}
        for row, budget in cases:
            progress(f"{repetition}/{plan.repetitions} {row.test} {row.bits} bits, {row.n_threads} threads")
            speed = _run(sessions[row.n_threads], row, budget, plan.output_bits)
            if repetition:  # the first round warms up pages, clocks and caches
                row.samples_ts.append(speed)
                row.bandwidths += [read[row.n_threads]] if read else []
    return [row for row, _ in cases]


def _run(session: NativeSession, row: Row, budget: Budget, output_bits: int | None) -> float:
    """Tokens per second of one run after n_depth tokens; notes the bytes read per token."""
    budget.apply(session)
    default = 0 if budget.routed or budget.static else budget.depth
    session.set_output_depth(default if output_bits is None else output_bits // 2)
    tokens = np.random.default_rng(0).integers(0, 256, max(row.n_prompt, row.n_gen)).astype(np.int32)
    logits = np.empty((1, session.vocab_size), np.float32)
    # What is in the cache stays there for the next run: its tokens cost the same at every budget.
    kept = row.n_depth if session.rewind_floor <= row.n_depth <= session.position else 0
    session.rewind(kept)
    if kept < row.n_depth:
        session.eval(np.resize(tokens, row.n_depth), logits[:0])
    before, start = session.stats, time.perf_counter()
    if row.n_prompt:
        session.eval(tokens, logits)
    else:
        for token in range(row.n_gen):
            session.eval(tokens[token : token + 1], logits)
    elapsed = time.perf_counter() - start
    row.bytes_per_token = (session.stats - before).bytes_per_token
    return len(tokens) / elapsed


def format_rows(rows: Sequence[Row], output: str) -> str:
    """output: "md" as llama-bench prints it, "csv" or "json"."""
    content = [row.to_dict() for row in rows]
    if output == "json":
        return json.dumps(content, indent=2)
    if output == "csv":
        text = io.StringIO()
        writer = csv.DictWriter(text, [key for key in content[0] if key != "samples_ts"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(content)
        return text.getvalue().rstrip("\n")
    heads = [
        "model",
        "size",
        "backend",
        "kernel",
        "threads",
        "bits",
        "test",
        "t/s",
        "best",
        "MB/token",
        "GB/s",
        "% of read",
    ]
    table = [heads, ["---"] * len(heads)]
    for row, values in zip(rows, content, strict=True):
        figures = [f"{values['avg_ts']:.2f} ± {values['stddev_ts']:.2f}", f"{values['best_ts']:.2f}"]
        traffic = ["", "", ""]
        if row.n_gen:
            percent = values["percent_of_bandwidth"]
            traffic = [
                f"{row.bytes_per_token / 1e6:.1f}",
                f"{row.gb_per_s:.1f}",
                "" if percent is None else f"{percent:.0f}",
            ]
        size = f"{row.size / 2**20:.1f} MiB"
        names = [row.model, size, row.backend, row.kernel, str(row.n_threads), row.bits, row.test]
        table.append([*names, *figures, *traffic])
    return "\n".join("| " + " | ".join(line) + " |" for line in table)


def bench_linears(
    shapes: Sequence[tuple[int, int]], threads: Sequence[int], repetitions: int, kernel: str | None
) -> str:
    """Single mat-vecs from memory at every depth: microseconds, GB/s and percent of the read bandwidth, as a table.

    The bandwidth is measured before every case; percents are of the best for that number of threads.
    """
    heads = ["kernel", "rows x columns", "depth", "threads", "best µs", "median µs", "GB/s", "% of read"]
    table = [heads, ["---"] * len(heads)]
    for count in threads:
        read, cases = 0.0, []
        for rows, columns in shapes:
            for depth in (1, 2, 3, 4):
                read = max(read, READ_BYTES / min(measure_read(count, READ_BYTES, 5)) / 1e9)
                seconds, size, name = measure_matvec(kernel, rows, columns, depth, count, repetitions)
                cases.append(([name, f"{rows} x {columns}", str(depth), str(count)], seconds, size))
        for names, seconds, size in cases:
            speed = size / min(seconds) / 1e9
            times = [f"{min(seconds) * 1e6:.0f}", f"{statistics.median(seconds) * 1e6:.0f}"]
            table.append([*names, *times, f"{speed:.1f}", f"{100 * speed / read:.0f}"])
    return "\n".join("| " + " | ".join(line) + " |" for line in table)
