"""Speed on the GPU beside its copy bandwidth and float16 torch, all in one run: linears, decode, prefill, memory.

    python tests/benchmarks/cuda_speed.py FILE.gguf

Times are those of the device's events, medians; linears read copies that no cache holds. What torch runs with float16
weights are a model's linears alone (and its attention, in prefill), recorded as a graph in decode.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from runtime.budget import Budget
from runtime.measure import measure_device_matvec
from runtime.native import ModelInfo, NativeModel, NativeSession

_COPY_BYTES = 4_000_000_000
_MATRIX = 8192  # of the product that stands for the peak of the tensor cores
_LINEARS = ((4096, 4096), (14336, 4096), (4096, 14336), (1024, 4096))
_BUDGETS = (2, 3.0, 4, 6, 8)


def seconds_of(work: Callable[[], object], repeats: int) -> float:
    """Median seconds of `work` on the device."""
    seconds = []
    for _ in range(repeats + 2):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        work()
        end.record()
        end.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(seconds[2:])


def copy_bandwidth(repeats: int = 15) -> float:
    """Bytes per second of a copy within the GPU's memory, read and written bytes counted."""
    source = torch.empty(_COPY_BYTES, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * _COPY_BYTES / seconds_of(lambda: target.copy_(source), repeats)


def tensor_peak(repeats: int = 10) -> tuple[float, float]:
    """Operations per second of a large product: float16, and int8 by torch."""
    a, b = (torch.randn(_MATRIX, _MATRIX, device="cuda", dtype=torch.float16) for _ in range(2))
    half = 2 * _MATRIX**3 / seconds_of(lambda: a @ b, repeats)
    a, b = (torch.randint(-127, 128, (_MATRIX, _MATRIX), device="cuda", dtype=torch.int8) for _ in range(2))
    return half, 2 * _MATRIX**3 / seconds_of(lambda: torch._int_mm(a, b.t()), repeats)


class Float16Model:
    """The linears of a model with random float16 weights, each in memory of its own."""

    def __init__(self, info: ModelInfo) -> None:
        q, kv = info.head_count * info.head_dim, info.head_count_kv * info.head_dim
        width, ff = info.embedding_length, info.feed_forward_length
        shapes = ((q + 2 * kv, width), (width, q), (2 * ff, width), (width, ff))
        self.info = info
        self.blocks = [[self._random(*shape) for shape in shapes] for _ in range(info.block_count)]
        self.head = self._random(info.vocab_size, width)

    @staticmethod
    def _random(rows: int, columns: int) -> torch.Tensor:
        return torch.empty(rows, columns, dtype=torch.float16, device="cuda").normal_(0, 0.02)

    def run(self, n: int, attention: bool) -> None:
        """One pass of n tokens through the linears, logits of the last."""
        info, linear = self.info, torch.nn.functional.linear
        q, kv, dim = info.head_count * info.head_dim, info.head_count_kv * info.head_dim, info.head_dim
        x = torch.ones(n, info.embedding_length, dtype=torch.float16, device="cuda")
        for qkv, out, gate_up, down in self.blocks:
            parts = linear(x, qkv)
            heads = parts[:, :q]
            if attention:
                # With a dimension of batches, without which torch takes a slow way.
                split = [part.view(n, -1, dim).transpose(0, 1)[None] for part in parts.split((q, kv, kv), dim=1)]
                heads = torch.nn.functional.scaled_dot_product_attention(*split, is_causal=True, enable_gqa=True)
                heads = heads[0].transpose(0, 1).reshape(n, q)
            x = x + linear(heads, out)
            gate, up = linear(x, gate_up).chunk(2, dim=1)
            x = x + linear(torch.nn.functional.silu(gate) * up, down)
        linear(x[-1:], self.head)

    def decode_seconds(self, repeats: int) -> float:
        """Per token: the pass of one token as a graph."""
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            self.run(1, attention=False)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.run(1, attention=False)
        return seconds_of(graph.replay, repeats)


def decode(session: NativeSession, budget: Budget, tokens: int, repeats: int, prompt: int) -> tuple[float, float]:
    """Seconds and bytes of the file per token, greedy decoding after `prompt` tokens."""
    budget.apply(session)
    session.set_output_depth(0 if budget.routed or budget.static else budget.depth)
    seconds = []
    for _ in range(repeats + 1):
        session.rewind(0)
        session.eval(np.arange(prompt, dtype=np.int32) % 250, np.empty((0, session.vocab_size), np.float32))
        before = session.stats
        _, milliseconds = session.greedy(1, tokens)
        seconds.append(milliseconds / 1e3 / tokens)
    return statistics.median(seconds[1:]), (session.stats - before).bytes_per_token


def prefill(session: NativeSession, budget: Budget, tokens: int, repeats: int) -> float:
    """Seconds of a prompt with the logits of its last token, by the host's clock: the device is done by then."""
    budget.apply(session)
    seconds, logits = [], np.empty((1, session.vocab_size), np.float32)
    for _ in range(repeats + 1):
        session.rewind(0)
        begin = time.perf_counter()
        session.eval(np.arange(tokens, dtype=np.int32) % 250, logits)
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[1:])


def show_linears(bandwidth: float, repeats: int) -> None:
    for rows, columns in _LINEARS:
        for depth in (1, 2, 3, 4):
            microseconds, size = measure_device_matvec(rows, columns, depth, repeats)
            middle = statistics.median(microseconds)
            share = size / middle * 1e6 / bandwidth
            print(
                f"linear {rows} x {columns} depth {depth}: {middle:.2f} us, {size / 1e6:.1f} MB, {share:.0%} of copy",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    bandwidth = copy_bandwidth()
    half, integer = tensor_peak()
    torch.cuda.empty_cache()
    print(f"{torch.cuda.get_device_name()}: copy {bandwidth / 1e9:.0f} GB/s, float16 {half / 1e12:.0f} TFLOP/s, "
          f"int8 {integer / 1e12:.0f} TOP/s (torch, {_MATRIX} x {_MATRIX})", flush=True)  # fmt: skip
    show_linears(bandwidth, options.repeats)
    model = NativeModel(options.file, allow_partial=False, mmap=True, device="cuda")
    info = model.info()
    session = NativeSession(model, n_ctx=4096, n_threads=1, n_batch=2048, kernel=None)
    sizes, free = session.device_bytes, torch.cuda.mem_get_info()[0]
    print(f"memory: {sizes}, file {info.file_bytes}, free {free}", flush=True)
    dense = Float16Model(info)
    dense_decode = dense.decode_seconds(20)
    print(f"float16 linears by torch: {1 / dense_decode:.1f} tok/s", flush=True)
    for bits in _BUDGETS:
        seconds, size = decode(session, Budget.of(bits), options.tokens, options.repeats, 64)
        share = size / bandwidth / seconds
        print(f"decode {bits} bits: {1 / seconds:.1f} tok/s, {size / 1e6:.0f} MB/token, {share:.1%} of roofline, "
              f"{dense_decode / seconds:.2f} x float16", flush=True)  # fmt: skip
    operations = 2 * info.routed_weights
    for tokens in (512, 2048):
        dense_seconds = seconds_of(lambda n=tokens: dense.run(n, attention=True), options.repeats)
        print(f"float16 prefill {tokens}: {tokens / dense_seconds:.0f} tok/s", flush=True)
        for bits in _BUDGETS:
            seconds = prefill(session, Budget.of(bits), tokens, 3)
            share = operations * tokens / seconds / integer
            print(f"prefill {tokens} at {bits} bits: {tokens / seconds:.0f} tok/s, {share:.0%} of the int8 peak, "
                  f"{dense_seconds / seconds:.2f} x float16", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
