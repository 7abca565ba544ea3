"""The C library as Python objects: one class per C handle, exceptions for error values, numpy arrays for buffers.

Nothing here decides anything: policy (budgets, cache reuse, sampling) is in runtime.model.
"""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from runtime.errors import MobiQuantError

try:
    from runtime._native import ffi, lib
except ImportError as error:
    raise ImportError(f"the compiled module runtime._native is missing ({error}); run: pip install .") from error


@dataclass(frozen=True)
class Kernel:
    """One set of kernels compiled in; `supported`: this CPU can run it."""

    name: str
    supported: bool


@dataclass(frozen=True)
class ModelInfo:
    """Shape and sizes of an opened file, the fields of `mq_model_info` in mobiquant.h; sizes are in bytes."""

    vocab_size: int
    context_length: int
    embedding_length: int
    block_count: int
    feed_forward_length: int
    head_count: int
    head_count_kv: int
    head_dim: int
    max_depth: int
    embedding_depth: int
    output_depth: int
    router_hidden: int
    tensor_count: int
    has_checksums: int
    file_bytes: int
    expected_bytes: int
    slice_bytes: tuple[int, int, int, int]
    scale_bytes: int
    router_bytes: int
    embedding_bytes: int
    output_bytes: int
    routed_weights: int

    @property
    def linear_sizes(self) -> np.ndarray:
        """Weights of the seven linears of a block, int64 [7]."""
        heads, heads_kv = self.head_count * self.head_dim, self.head_count_kv * self.head_dim
        outside = [heads, heads_kv, heads_kv, heads, *(3 * [self.feed_forward_length])]
        return np.array(outside, np.int64) * self.embedding_length


@dataclass(frozen=True)
class Stats:
    """Sums over the tokens evaluated, as in `mq_stats`; the difference of two is the work between them."""

    tokens: int
    routed_bits: int
    routed_weights: int
    bytes_read: int

    def __sub__(self, earlier: Stats) -> Stats:
        return Stats(
            self.tokens - earlier.tokens,
            self.routed_bits - earlier.routed_bits,
            self.routed_weights - earlier.routed_weights,
            self.bytes_read - earlier.bytes_read,
        )

    @property
    def average_bits(self) -> float:
        """Average bits per routed weight; NaN before the first token."""
        return self.routed_bits / self.routed_weights if self.routed_weights else float("nan")

    @property
    def bytes_per_token(self) -> float:
        """Bytes of the file read per token; NaN before the first token."""
        return self.bytes_read / self.tokens if self.tokens else float("nan")


def version() -> str:
    """Version of the C library."""
    return text_of(lib.mq_version())


def kernels() -> list[Kernel]:
    """Kernels compiled in, best first."""
    found = []
    while (name := lib.mq_kernel_name(len(found))) != ffi.NULL:
        found.append(Kernel(text_of(name), bool(lib.mq_kernel_supported(len(found)))))
    return found


def device_info() -> tuple[bool, str]:
    """Whether a GPU can be used, and which, or why not."""
    info = ffi.new("mq_device_info *")
    lib.mq_device_describe(info)
    return bool(info.usable), ffi.string(info.text).decode("utf-8", errors="replace")


def device_for(asked: str, kernel: str | None, cache_types: tuple[str, str]) -> str:
    """The device that `asked` means beside other options: "auto" is the CPU when one of them is the CPU's alone."""
    return "cpu" if asked == "auto" and (kernel or set(cache_types) != {"f16"}) else asked


@dataclass(frozen=True)
class DeviceBytes:
    """Bytes in the memory of the GPU: the file's tensors, which a model's sessions share, and a session's own."""

    weights: int
    cache: int
    workspace: int


class NativeModel:
    """An opened file: immutable, shared by any number of sessions."""

    def __init__(
        self, path: Path, *, allow_partial: bool, mmap: bool, check_tensors: bool = False, device: str = "cpu"
    ) -> None:
        name = ffi.new("char[]", device.encode())
        fields = {"allow_partial": allow_partial, "no_mmap": not mmap, "check_tensors": check_tensors, "device": name}
        options = ffi.new("mq_model_options *", fields)
        handle = ffi.new("mq_model **")
        error = ffi.new("mq_error *")
        expect_ok(lib.mq_model_open(str(path).encode(), options, handle, error), error)
        self._handle = handle[0]
        self._close = weakref.finalize(self, lib.mq_model_close, self._handle)
        self.path = path
        self._close.atexit = False  # a daemon thread may still compute then
        self._users = 0
        self._users_lock = threading.Lock()

    def retain(self) -> NativeModel:
        """Count one more user, who will call `release`; returns this model."""
        with self._users_lock:
            self._users += 1
        return self

    def release(self) -> None:
        """One user has closed its sessions; the last one closes the file."""
        with self._users_lock:
            self._users -= 1
            if self._users == 0:
                self.close()

    @property
    def handle(self) -> Any:
        """The C handle. Raises ValueError after `close`."""
        if not self._close.alive:
            raise ValueError("model: expected an open one, found it closed")
        return self._handle

    @property
    def device(self) -> str:
        """Where sessions run: "cpu" or "cuda"."""
        return text_of(lib.mq_model_device(self.handle))

    @property
    def device_note(self) -> str:
        """The GPU's name, or what stood in its way under "auto"."""
        return ffi.string(lib.mq_model_device_note(self.handle)).decode("utf-8", errors="replace")

    def close(self) -> None:
        """Release the file; every session must be closed before. Closing twice is allowed."""
        self._close()

    def info(self) -> ModelInfo:
        raw = ffi.new("mq_model_info *")
        lib.mq_model_get_info(self.handle, raw)
        fields: dict[str, Any] = {name: getattr(raw, name) for name in ModelInfo.__dataclass_fields__}
        return ModelInfo(**fields | {"slice_bytes": tuple(raw.slice_bytes)})

    def string(self, key: str) -> str | None:
        """Value of a string key, None when absent. Raises ValueError when it is not UTF-8."""
        data, size, error = ffi.new("const char **"), ffi.new("size_t *"), ffi.new("mq_error *")
        expect_ok(lib.mq_model_string(self.handle, key.encode(), data, size, error), error)
        if data[0] == ffi.NULL:
            return None
        value = bytes(ffi.buffer(data[0], size[0]))
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as wrong:
            found = f"byte {value[wrong.start]:#04x} at {wrong.start}"
            raise ValueError(f"{self.path}: key '{key}': expected UTF-8, found {found}") from wrong

    def check(self, index: int) -> None:
        """One tensor by the order of their names, or the metadata at info().tensor_count. Raises MobiQuantError."""
        error = ffi.new("mq_error *")
        expect_ok(lib.mq_model_check(self.handle, index, error), error)

    def integers(self, key: str) -> tuple[int, ...]:
        """Values of a u32, bool or u32 array key, empty when absent."""
        count, error = ffi.new("size_t *"), ffi.new("mq_error *")
        expect_ok(lib.mq_model_u32(self.handle, key.encode(), ffi.NULL, 0, count, error), error)
        values = ffi.new("uint32_t[]", count[0])
        expect_ok(lib.mq_model_u32(self.handle, key.encode(), values, count[0], count, error), error)
        return tuple(values)


# How keys and values are kept, by llama.cpp's names.
CACHE_TYPES: dict[str, int] = {"f16": lib.MQ_CACHE_F16, "q8_0": lib.MQ_CACHE_Q8_0}


class NativeSession:
    """A KV cache with a position and a thread pool; one thread at a time may use it."""

    def __init__(
        self,
        model: NativeModel,
        *,
        n_ctx: int,
        n_threads: int,
        n_batch: int,
        kernel: str | None,
        cache_type_k: str = "f16",
        cache_type_v: str = "f16",
    ) -> None:
        for name, value in (("n_ctx", n_ctx), ("n_threads", n_threads), ("n_batch", n_batch)):
            if not 0 <= value < 1 << 32:
                raise MobiQuantError(f"{name}: expected 0 or a positive number, found {value}", "MQ_ERR_ARGUMENT")
        name = ffi.NULL if kernel is None else ffi.new("char[]", kernel.encode())
        options = ffi.new(
            "mq_session_options *",
            {
                "n_ctx": n_ctx,
                "n_threads": n_threads,
                "n_batch": n_batch,
                "kernel": name,
                "cache_type_k": CACHE_TYPES[cache_type_k],
                "cache_type_v": CACHE_TYPES[cache_type_v],
            },
        )
        handle = ffi.new("mq_session **")
        error = ffi.new("mq_error *")
        expect_ok(lib.mq_session_open(model.handle, options, handle, error), error)
        self._model = model  # kept open as long as this session lives
        self._raw_handle = handle[0]
        self._block_count = model.info().block_count
        self._close = weakref.finalize(self, lib.mq_session_close, self._raw_handle)
        self._close.atexit = False

    @property
    def _handle(self) -> Any:
        if not self._close.alive:
            raise ValueError("session: expected an open one, found it closed")
        return self._raw_handle

    def close(self) -> None:
        """Free the cache and stop the threads. Closing twice is allowed."""
        self._close()

    @property
    def kernel(self) -> str:
        """Name of the kernels in use."""
        return text_of(lib.mq_session_kernel(self._handle))

    @property
    def vocab_size(self) -> int:
        """Length of one token's logits."""
        return self._model.info().vocab_size

    @property
    def position(self) -> int:
        """Number of tokens in the cache."""
        return lib.mq_session_position(self._handle)

    @property
    def context(self) -> int:
        """Number of tokens the cache can hold."""
        return lib.mq_session_context(self._handle)

    @property
    def stats(self) -> Stats:
        raw = ffi.new("mq_stats *")
        lib.mq_session_get_stats(self._handle, raw)
        return Stats(raw.tokens, raw.routed_bits, raw.routed_weights, raw.bytes_read)

    def set_depth(self, depth: int) -> None:
        """One depth for every token."""
        error = ffi.new("mq_error *")
        expect_ok(lib.mq_session_set_depth(self._handle, depth, error), error)

    def set_average_bits(self, bits: float) -> None:
        """Depths from the routers, at this average bits."""
        error = ffi.new("mq_error *")
        expect_ok(lib.mq_session_set_average_bits(self._handle, bits, error), error)

    def set_static_bits(self, bits: float) -> None:
        """One depth for every linear, from the file's static order, within this average bits."""
        error = ffi.new("mq_error *")
        expect_ok(lib.mq_session_set_static_bits(self._handle, bits, error), error)

    def set_output_depth(self, depth: int) -> None:
        """Depth of the output head; 0: the file's default."""
        error = ffi.new("mq_error *")
        expect_ok(lib.mq_session_set_output_depth(self._handle, depth, error), error)

    def eval(self, tokens: np.ndarray, logits: np.ndarray) -> None:
        """Evaluate tokens, int32 [n], and fill `logits`, float32 [k, vocab_size], with those of the last k <= n."""
        error = ffi.new("mq_error *")
        expect_ok(
            lib.mq_session_eval(
                self._handle,
                ffi.from_buffer("int32_t[]", tokens),
                len(tokens),
                ffi.from_buffer("float[]", logits, require_writable=True) if len(logits) else ffi.NULL,
                len(logits),
                error,
            ),
            error,
        )

    def greedy(self, token: int, n: int) -> tuple[np.ndarray, float]:
        """Evaluate `token` and n - 1 times the most likely token after it. Returns int32 [n], the token after each, and
        the milliseconds on the GPU, 0 on the CPU."""
        chosen = np.empty(n, np.int32)
        milliseconds, error = ffi.new("float *"), ffi.new("mq_error *")
        buffer = ffi.from_buffer("int32_t[]", chosen, require_writable=True)
        expect_ok(lib.mq_session_greedy(self._handle, token, n, buffer, milliseconds, error), error)
        return chosen, milliseconds[0]

    @property
    def device_bytes(self) -> DeviceBytes:
        """All 0 on the CPU."""
        sizes = [ffi.new("uint64_t *") for _ in range(3)]
        lib.mq_session_device_bytes(self._handle, *sizes)
        return DeviceBytes(*(size[0] for size in sizes))

    @property
    def cache_bytes(self) -> int:
        """Bytes of the keys and values it has room for."""
        return lib.mq_session_cache_bytes(self._handle)

    @property
    def rewind_floor(self) -> int:
        """The least position above 0 that `rewind` accepts; 0: every position."""
        return lib.mq_session_rewind_floor(self._handle)

    def rewind(self, position: int) -> None:
        """Forget every position from `position` on."""
        error = ffi.new("mq_error *")
        expect_ok(lib.mq_session_rewind(self._handle, position, error), error)

    def depths(self, first: int, n: int) -> np.ndarray:
        """Depths that tokens first..first+n-1 read: uint8 [n, blocks, 7], q, k, v, output, gate, up, down."""
        depths = np.empty((n, self._block_count, 7), np.uint8)
        error = ffi.new("mq_error *")
        buffer = ffi.from_buffer("uint8_t[]", depths, require_writable=True)
        expect_ok(lib.mq_session_depths(self._handle, first, n, buffer, error), error)
        return depths

    def eval_hidden(self, tokens: np.ndarray, hidden: np.ndarray) -> None:
        """Evaluate tokens, int32 [n], and fill `hidden`, float32 [k, width], with the states after the final norm of
        the last k <= n."""
        error = ffi.new("mq_error *")
        buffer = ffi.from_buffer("float[]", hidden, require_writable=True)
        tokens_buffer = ffi.from_buffer("int32_t[]", tokens)
        expect_ok(
            lib.mq_session_eval_hidden(self._handle, tokens_buffer, len(tokens), buffer, len(hidden), error), error
        )

    def state(self) -> bytearray:
        """The cache up to the position as bytes."""
        state = bytearray(lib.mq_session_state_size(self._handle))
        error = ffi.new("mq_error *")
        buffer = ffi.from_buffer("uint8_t[]", state, require_writable=True)
        expect_ok(lib.mq_session_state_get(self._handle, buffer, len(state), error), error)
        return state

    def set_state(self, state: bytes | bytearray | memoryview) -> None:
        """Replace the cache by one that `state` gave."""
        error = ffi.new("mq_error *")
        expect_ok(lib.mq_session_state_set(self._handle, ffi.from_buffer("uint8_t[]", state), len(state), error), error)


def text_of(value: Any) -> str:
    """A string of the C library."""
    return ffi.string(value).decode("utf-8")


def expect_ok(status: int, error: Any) -> None:
    """Raise what a call of the C library says it met."""
    if status != lib.MQ_OK:
        message = ffi.string(error.message).decode("utf-8", errors="replace")
        raise MobiQuantError(message, text_of(lib.mq_status_name(status)))
