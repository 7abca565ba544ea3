"""Speed against llama.cpp on one shape, interleaved in one run: generation and prompt, medians, bests and their ratios.

    pip install llama-cpp-python gguf
    python -m export.to_gguf --synthetic llama-3.2-1b -o 1b.gguf
    python tests/benchmarks/compare_llama.py 1b.gguf WORK [-t 1,2] [-r 5] [-n 128] [-p 512]

The first run writes files of the same shape with random weights into WORK and lets llama.cpp quantise them ("pure": all
tensors of one type). Each type runs with and without repacking, and the better of the two is taken for every figure.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import gguf
import llama_cpp
import numpy as np

from runtime.native import ModelInfo, NativeModel, NativeSession

# Of each depth, the llama.cpp types at the nearest higher bits per weight.
RIVALS: dict[int, tuple[str, ...]] = {2: ("Q2_K",), 4: ("Q4_0", "Q4_K"), 6: ("Q6_K",), 8: ("Q8_0",)}
_FILE_TYPES = {"Q2_K": 10, "Q4_0": 2, "Q4_K": 14, "Q6_K": 18, "Q8_0": 7}  # llama_ftype in llama.h
_NOISE = 1 << 22


@dataclass
class System:
    """One way to run the shape. generate, prompt: evaluate so many tokens from an empty cache."""

    name: str
    generate: Callable[[int], None]
    prompt: Callable[[int], None]
    generated: list[float] = field(default_factory=list)
    prompted: list[float] = field(default_factory=list)


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
    writer.add_token_types([6 if i < 256 else 1 for i in range(info.vocab_size)])
    width, heads, kv = info.embedding_length, info.head_count * info.head_dim, info.head_count_kv * info.head_dim
    shapes = {"token_embd.weight": (info.vocab_size, width), "output_norm.weight": (width,)}
    if info.output_bytes:
        shapes["output.weight"] = (info.vocab_size, width)
    for block in range(info.block_count):
        linears = {
            "attn_q": (heads, width),
            "attn_k": (kv, width),
            "attn_v": (kv, width),
            "attn_output": (width, heads),
            "ffn_gate": (info.feed_forward_length, width),
            "ffn_up": (info.feed_forward_length, width),
            "ffn_down": (width, info.feed_forward_length),
        }
        shapes |= {f"blk.{block}.{name}.weight": shape for name, shape in linears.items()}
        shapes |= {f"blk.{block}.{name}.weight": (width,) for name in ("attn_norm", "ffn_norm")}
    for name, shape in shapes.items():
        kind = np.float32 if len(shape) == 1 else np.float16
        writer.add_tensor_info(name, shape, np.dtype(kind), int(np.prod(shape)) * np.dtype(kind).itemsize)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    noise = (np.random.default_rng(0).normal(size=_NOISE) * 0.02).astype(np.float16)
    for shape in shapes.values():
        writer.write_tensor_data(np.ones(shape, np.float32) if len(shape) == 1 else np.resize(noise, shape))
    writer.close()


def quantized(work: Path, info: ModelInfo, kind: str) -> Path:
    """The file of one type, made when it is not there."""
    path = work / f"{kind}.gguf"
    if not path.exists():
        source = work / "f16.gguf"
        if not source.exists():
            write_f16(source, info)
        options = llama_cpp.llama_model_quantize_default_params()
        options.ftype, options.pure, options.nthread = _FILE_TYPES[kind], True, 2
        part = path.with_suffix(".part")
        if llama_cpp.llama_model_quantize(str(source).encode(), str(part).encode(), ctypes.byref(options)) != 0:
            raise RuntimeError(f"{path}: llama.cpp could not quantise to {kind}")
        part.rename(path)
    return path


def llama_system(path: Path, kind: str, repack: bool, threads: int, context: int) -> System:
    """llama.cpp on one file."""
    model_options = llama_cpp.llama_model_default_params()
    model_options.use_extra_bufts = repack
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), model_options)
    options = llama_cpp.llama_context_default_params()
    options.n_ctx, options.n_batch, options.n_ubatch = context, 512, 512
    options.n_threads = options.n_threads_batch = threads
    handle = llama_cpp.llama_init_from_model(model, options)

    def decode(count: int, at_once: int) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(handle), True)
        tokens = (llama_cpp.llama_token * at_once)(*[300 + i for i in range(at_once)])
        for _ in range(count // at_once):
            if llama_cpp.llama_decode(handle, llama_cpp.llama_batch_get_one(tokens, at_once)) != 0:
                raise RuntimeError(f"{path}: llama_decode failed")
            llama_cpp.llama_synchronize(handle)

    name = f"{kind}{'' if repack else ' no-repack'}"
    return System(name, lambda n: decode(n, 1), lambda n: decode(n, n))


def our_system(model: NativeModel, bits: int, threads: int, context: int) -> System:
    """This runtime at one depth, the output head too."""
    session = NativeSession(model, n_ctx=context, n_threads=threads, n_batch=512, kernel=None)
    session.set_depth(bits // 2)
    session.set_output_depth(bits // 2)
    logits = np.empty((1, session.vocab_size), np.float32)

    def evaluate(count: int, at_once: int) -> None:
        session.rewind(0)
        tokens = np.arange(count, dtype=np.int32) % 256
        for start in range(0, count, at_once):
            session.eval(tokens[start : start + at_once], logits)

    return System(f"ours {bits}", lambda n: evaluate(n, 1), lambda n: evaluate(n, n))


def timed(run: Callable[[int], None], count: int) -> float:
    """Tokens per second."""
    start = time.perf_counter()
    run(count)
    return count / (time.perf_counter() - start)


def report(systems: list[System], threads: int, n_gen: int, n_prompt: int) -> None:
    """Every system's figures, then ratios to the best rival at each depth."""
    print(f"\n{threads} thread(s)   tg{n_gen} median / best        pp{n_prompt} median / best   tok/s")
    for system in systems:
        figures = [statistics.median(system.generated), max(system.generated)]
        figures += [statistics.median(system.prompted), max(system.prompted)]
        print(f"{system.name:<16}" + "".join(f"{figure:>14.1f}" for figure in figures))
    for bits, kinds in RIVALS.items():
        ours = next(system for system in systems if system.name == f"ours {bits}")
        rivals = [system for system in systems if system.name.split()[0] in kinds]
        ratios = [
            choose(getattr(ours, figure)) / max(choose(getattr(rival, figure)) for rival in rivals)
            for figure in ("generated", "prompted")
            for choose in (statistics.median, max)
        ]
        print(f"{bits} bits against the best of {', '.join(kinds)}: " + "  ".join(f"{ratio:.2f}x" for ratio in ratios))
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("-t", "--threads", default="1,2")
    parser.add_argument("-r", "--repetitions", type=int, default=5)
    parser.add_argument("-n", "--n-gen", type=int, default=128)
    parser.add_argument("-p", "--n-prompt", type=int, default=512)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    llama_cpp.llama_backend_init()
    model = NativeModel(options.file, allow_partial=False, mmap=True)
    files = {kind: quantized(options.work, model.info(), kind) for kinds in RIVALS.values() for kind in kinds}
    context = max(options.n_gen, options.n_prompt)
    for threads in map(int, options.threads.split(",")):
        systems = [our_system(model, bits, threads, context) for bits in RIVALS]
        for kind, path in files.items():
            systems += [llama_system(path, kind, repack, threads, context) for repack in (True, False)]
        for repetition in range(options.repetitions + 1):
            for system in systems:
                speeds = timed(system.generate, options.n_gen), timed(system.prompt, options.n_prompt)
                if repetition:  # the first round warms up
                    system.generated.append(speeds[0])
                    system.prompted.append(speeds[1])
        report(systems, threads, options.n_gen, options.n_prompt)


if __name__ == "__main__":
    main()
