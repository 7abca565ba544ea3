"""Speed against llama.cpp on one shape, interleaved in one run: generation, prompt, generation far into a context.

    pip install llama-cpp-python gguf
    python -m export.to_gguf --synthetic llama-3.2-1b -o 1b.gguf
    python tests/benchmarks/compare_llama.py 1b.gguf WORK [-t 1,2] [-r 5] [-n 128] [-p 512] [--only 2,8]

The first run writes a file of the same shape with random weights into WORK and lets llama.cpp quantise it ("pure": all
matrices of one type). Each type runs with and without repacking, and the better of the two is taken for every figure.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import gguf
import llama_cpp
import numpy as np

from runtime.native import ModelInfo, NativeModel, NativeSession

# Of each of our widths, the llama.cpp types at the nearest higher bits per weight.
RIVALS: dict[int, tuple[str, ...]] = {2: ("Q2_K",), 4: ("Q4_0", "Q4_K"), 6: ("Q6_K",), 8: ("Q8_0",)}
_FILE_TYPES = {"Q2_K": 10, "Q4_0": 2, "Q4_K": 14, "Q6_K": 18, "Q8_0": 7}  # llama_ftype in llama.h
_LOG_WARN, _LOG_ERROR = 3, 4  # ggml_log_level in ggml.h
_NOISE = 1 << 22
_BATCH = 512
_FAR_TOKENS = 32  # generated at the end of the context


@dataclass(frozen=True)
class Test:
    """Evaluate `count` tokens, `at_once` together, with `start` already in the cache."""

    name: str
    start: int
    count: int
    at_once: int


@dataclass
class System:
    """One way to run the shape; samples in tokens per second by threads and test."""

    name: str
    run: Callable[[Test, int], None]  # test, threads
    samples: dict[tuple[int, str], list[float]] = field(default_factory=lambda: defaultdict(list))

    def measure(self, test: Test, threads: int) -> float:
        """Tokens per second."""
        start = time.perf_counter()
        self.run(test, threads)
        return test.count / (time.perf_counter() - start)


class LlamaContext:
    """A llama.cpp context whose cache can be cut back to any position."""

    def __init__(self, model: llama_cpp.llama_model_p, positions: int) -> None:
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = positions, _BATCH, _BATCH
        self._handle = llama_cpp.llama_init_from_model(model, options)
        if not self._handle:
            raise RuntimeError(f"llama.cpp could not open a context of {positions} positions")

    def evaluate(self, start: int, count: int, at_once: int, threads: int) -> None:
        """Tokens start .. start + count - 1, `at_once` together, after the `start` that the cache holds."""
        llama_cpp.llama_set_n_threads(self._handle, threads, threads)
        llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(self._handle), 0, start, -1)
        for first in range(0, count, at_once):
            n = min(at_once, count - first)
            tokens = (llama_cpp.llama_token * n)(*[300 + i for i in range(n)])
            if llama_cpp.llama_decode(self._handle, llama_cpp.llama_batch_get_one(tokens, n)) != 0:
                raise RuntimeError("llama_decode failed")
            llama_cpp.llama_synchronize(self._handle)


def llama_system(path: Path, repack: bool, near: int, far: int, threads: int) -> System:
    """llama.cpp on one file; its far context is filled here with `threads`."""
    options = llama_cpp.llama_model_default_params()
    options.use_extra_bufts = repack
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), options)
    if not model:
        raise RuntimeError(f"{path}: llama.cpp could not load it")
    contexts = {0: LlamaContext(model, near), far: LlamaContext(model, far + _FAR_TOKENS)}
    contexts[far].evaluate(0, far, _BATCH, threads)

    def run(test: Test, threads: int) -> None:
        contexts[test.start].evaluate(test.start, test.count, test.at_once, threads)

    return System(f"{path.stem}{'' if repack else ' no-repack'}", run)


def our_systems(model: NativeModel, widths: list[int], near: int, far: int, threads: list[int]) -> list[System]:
    """This runtime at each width, the output head too. The widths share sessions: what is in a cache costs the same."""

    def session(positions: int, count: int) -> NativeSession:
        return NativeSession(model, n_ctx=positions, n_threads=count, n_batch=_BATCH, kernel=None)

    sessions = {count: {0: session(near, count), far: session(far + _FAR_TOKENS, count)} for count in threads}
    logits = np.empty((1, model.info().vocab_size), np.float32)
    for by_start in sessions.values():
        by_start[far].set_depth(1)
        by_start[far].eval(np.arange(far, dtype=np.int32) % 256, logits)

    def system(width: int) -> System:
        def run(test: Test, threads: int) -> None:
            session = sessions[threads][test.start]
            session.set_depth(width // 2)
            session.set_output_depth(width // 2)
            session.rewind(test.start)
            tokens = np.arange(test.count, dtype=np.int32) % 256
            for first in range(0, test.count, test.at_once):
                session.eval(tokens[first : first + test.at_once], logits)

        return System(f"ours {width}", run)

    return [system(width) for width in widths]


def shapes_of(info: ModelInfo) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Tensors of llama.cpp's `llama` architecture, numpy shapes."""
    width, ff = info.embedding_length, info.feed_forward_length
    heads, kv = info.head_count * info.head_dim, info.head_count_kv * info.head_dim
    yield "token_embd.weight", (info.vocab_size, width)
    yield "output_norm.weight", (width,)
    if info.output_bytes:
        yield "output.weight", (info.vocab_size, width)
    for block in range(info.block_count):
        yield f"blk.{block}.attn_norm.weight", (width,)
        yield f"blk.{block}.attn_q.weight", (heads, width)
        yield f"blk.{block}.attn_k.weight", (kv, width)
        yield f"blk.{block}.attn_v.weight", (kv, width)
        yield f"blk.{block}.attn_output.weight", (width, heads)
        yield f"blk.{block}.ffn_norm.weight", (width,)
        yield f"blk.{block}.ffn_gate.weight", (ff, width)
        yield f"blk.{block}.ffn_up.weight", (ff, width)
        yield f"blk.{block}.ffn_down.weight", (width, ff)


def write_f16(path: Path, info: ModelInfo) -> None:
    """A llama.cpp file of the same shape, f16, seeded random weights; a vocabulary of numbered tokens."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(info.context_length)
    writer.add_embedding_length(info.embedding_length)
    writer.add_block_count(info.block_count)
    writer.add_feed_forward_length(info.feed_forward_length)
    writer.add_head_count(info.head_count)
    writer.add_head_count_kv(info.head_count_kv)
    writer.add_rope_dimension_count(info.head_dim)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(info.vocab_size)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<0x{i:02X}>" if i < 256 else f"t{i}" for i in range(info.vocab_size)])
    writer.add_token_scores([0.0] * info.vocab_size)
    writer.add_token_types([6 if i < 256 else 1 for i in range(info.vocab_size)])  # bytes, then normal tokens
    shapes = dict(shapes_of(info))
    for name, shape in shapes.items():
        kind = np.dtype(np.float32 if len(shape) == 1 else np.float16)
        writer.add_tensor_info(name, shape, kind, int(np.prod(shape)) * kind.itemsize)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    noise = (np.random.default_rng(0).normal(size=_NOISE) * 0.02).astype(np.float16)
    for shape in shapes.values():
        writer.write_tensor_data(np.ones(shape, np.float32) if len(shape) == 1 else np.resize(noise, shape))
    writer.close()


def quantize(work: Path, info: ModelInfo, kinds: list[str]) -> dict[str, Path]:
    """A file of each type; those that are not there are made."""
    paths = {kind: work / f"{kind}.gguf" for kind in kinds}
    missing = [kind for kind, path in paths.items() if not path.exists()]
    source = work / "f16.gguf"
    if missing:
        work.mkdir(parents=True, exist_ok=True)
        write_f16(source, info)
    for kind in missing:
        options = llama_cpp.llama_model_quantize_default_params()
        options.ftype, options.pure = _FILE_TYPES[kind], True
        part = paths[kind].with_suffix(".part")
        if llama_cpp.llama_model_quantize(str(source).encode(), str(part).encode(), ctypes.byref(options)) != 0:
            raise RuntimeError(f"{part}: llama.cpp could not quantise to {kind}")
        part.rename(paths[kind])
    source.unlink(missing_ok=True)
    return paths


def report(systems: list[System], widths: list[int], tests: list[Test], threads: int) -> None:
    """Every system's figures, then ours over the best rival's at each width, and what a full context costs."""
    print(f"\n{threads} thread(s), tok/s, median / best" + "".join(f"{test.name:>18}" for test in tests))
    for system in systems:
        columns = [system.samples[threads, test.name] for test in tests]
        figures = [f"{statistics.median(samples):.1f} / {max(samples):.1f}" for samples in columns]
        print(f"{system.name:<31}" + "".join(f"{figure:>18}" for figure in figures))
    near, far = tests[0].name, tests[-1].name
    for width in widths:
        ours = next(system for system in systems if system.name == f"ours {width}")
        rivals = [system for system in systems if system.name.split()[0] in RIVALS[width]]
        figures = []
        for test in tests:
            mine = ours.samples[threads, test.name]
            theirs = [rival.samples[threads, test.name] for rival in rivals]
            ratios = [choose(mine) / max(map(choose, theirs)) for choose in (statistics.median, max)]
            figures.append(" / ".join(f"{ratio:.2f}x" for ratio in ratios))
        title = f"{width} bits over {', '.join(RIVALS[width])}"
        print(f"{title:<31}" + "".join(f"{figure:>18}" for figure in figures))
    for system in systems:
        speeds = [max(system.samples[threads, name]) for name in (near, far)]
        cost = 1e3 / speeds[1] - 1e3 / speeds[0]
        print(f"{system.name}: {far} keeps {speeds[1] / speeds[0]:.0%} of {near}, {cost:.2f} ms more a token (bests)")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("-t", "--threads", default="1,2")
    parser.add_argument("-r", "--repetitions", type=int, default=5)
    parser.add_argument("-n", "--n-gen", type=int, default=128)
    parser.add_argument("-p", "--n-prompt", type=int, default=512)
    parser.add_argument("--only", default="2,4,6,8", help="widths to compare")
    options = parser.parse_args()
    threads, widths = ([int(value) for value in text.split(",")] for text in (options.threads, options.only))

    llama_cpp.llama_log_set(quiet_log, ctypes.c_void_p())
    llama_cpp.llama_backend_init()
    model = NativeModel(options.file, allow_partial=False, mmap=True)
    info = model.info()
    files = quantize(options.work, info, [kind for width in widths for kind in RIVALS[width]])
    near, far = max(options.n_gen, options.n_prompt), info.context_length - _FAR_TOKENS
    tests = [
        Test(f"tg{options.n_gen}", 0, options.n_gen, 1),
        Test(f"pp{options.n_prompt}", 0, options.n_prompt, options.n_prompt),
        Test(f"tg{_FAR_TOKENS} @ {far}", far, _FAR_TOKENS, 1),
    ]
    systems = our_systems(model, widths, near, far, threads)
    for kind, path in files.items():
        for repack in (True, False):
            print(f"loading {kind}{'' if repack else ' no-repack'}, filling {far} positions", file=sys.stderr)
            systems.append(llama_system(path, repack, near, far, max(threads)))
    for repetition in range(options.repetitions + 1):
        print(f"repetition {repetition} of {options.repetitions}", file=sys.stderr)
        for count in threads:
            for test in tests:
                for system in systems:
                    speed = system.measure(test, count)
                    if repetition:  # the first round warms up
                        system.samples[count, test.name].append(speed)
    print("llama.cpp: " + llama_cpp.llama_print_system_info().decode())
    for count in threads:
        report(systems, widths, tests, count)


@llama_cpp.llama_log_callback
def quiet_log(level: int, text: bytes, user_data: ctypes.c_void_p) -> None:
    """llama.cpp's warnings and errors only."""
    if _LOG_WARN <= level <= _LOG_ERROR:
        sys.stderr.write(text.decode(errors="replace"))


if __name__ == "__main__":
    main()
