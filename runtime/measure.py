"""Measurements that the C library makes of itself and of the machine (runtime/src/measure.c), for benchmarks."""

from __future__ import annotations

from runtime._native import ffi, lib
from runtime.native import expect_ok, text_of


def measure_device_matvec(rows: int, columns: int, depth: int, repeats: int) -> tuple[list[float], int]:
    """Microseconds per mat-vec on the GPU of weights from memory in each pass, and the bytes one reads."""
    microseconds, size, error = ffi.new("double[]", repeats), ffi.new("size_t *"), ffi.new("mq_error *")
    expect_ok(lib.mq_device_measure_matvec(rows, columns, depth, repeats, microseconds, size, error), error)
    return list(microseconds), size[0]


def measure_read(n_threads: int, size: int, repeats: int) -> list[float]:
    """Seconds of each pass in which `n_threads` read `size` bytes of memory once."""
    seconds, error = ffi.new("double[]", repeats), ffi.new("mq_error *")
    expect_ok(lib.mq_measure_read(n_threads, size, repeats, seconds, error), error)
    return list(seconds)


def measure_matvec(
    kernel: str | None, rows: int, columns: int, depth: int, n_threads: int, repeats: int
) -> tuple[list[float], int, str]:
    """Seconds per mat-vec of weights from memory in each pass, the bytes one reads, and the kernel's name."""
    seconds, size, error = ffi.new("double[]", repeats), ffi.new("size_t *"), ffi.new("mq_error *")
    name = ffi.NULL if kernel is None else ffi.new("char[]", kernel.encode())
    expect_ok(lib.mq_measure_matvec(name, rows, columns, depth, n_threads, repeats, seconds, size, error), error)
    return list(seconds), size[0], text_of(lib.mq_kernels_find(name).name)
