"""The commands of the device side: their registration, and `bench` and `info`.

Arguments in, text out; what the commands do is in the other files of this package.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from runtime.budget import DEPTH_BITS
from runtime.commands.converse import add_chat
from runtime.commands.options import add_cache_options, one_line_errors
from runtime.commands.run import add_run
from runtime.commands.serve import add_serve


def add_commands(subparsers: argparse._SubParsersAction) -> None:
    """Register the commands; each sets `func(args) -> int`, the exit status."""
    add_run(subparsers)
    add_chat(subparsers)
    add_serve(subparsers)
    _add_bench(subparsers)

    info = subparsers.add_parser("info", help="show what this installation and a file hold")
    info.add_argument("model", type=Path, metavar="FILE", nargs="?", help="GGUF file; without it, this machine only")
    info.set_defaults(func=info_command)


def _add_bench(subparsers: argparse._SubParsersAction) -> None:
    bench = subparsers.add_parser("bench", help="measure speed, as llama-bench does")
    what = bench.add_mutually_exclusive_group(required=True)
    what.add_argument("-m", "--model", type=Path, metavar="FILE", help="GGUF file to measure")
    what.add_argument("--kernels", action="store_true", help="measure single linears instead of a file")
    bench.add_argument("-p", "--n-prompt", type=_numbers, default=[512], metavar="N,..", help="prompts (512); 0: none")
    bench.add_argument("-n", "--n-gen", type=_numbers, default=[128], metavar="N,..", help="answers (128); 0: none")
    bench.add_argument("-d", "--n-depth", type=_numbers, default=[0], metavar="N,..", help="tokens before it (0)")
    add_cache_options(bench)
    bench.add_argument("-t", "--threads", type=_numbers, default=None, metavar="N,..", help="threads (physical cores)")
    bench.add_argument("-r", "--repetitions", type=int, default=5, metavar="N", help="repetitions (%(default)s)")
    bench.add_argument(
        "--bits", default="2,4,6,8", metavar="B,..", help="2, 4, 6, 8 or static:X (default: %(default)s); 0: none"
    )
    bench.add_argument("--avg-bits", type=_averages, default=[], metavar="X,..", help="routed averages (none)")
    bench.add_argument("--output-bits", type=int, choices=DEPTH_BITS, help="of the output head (default: as --bits)")
    bench.add_argument("--kernel", help="kernels to use; also $MOBIQUANT_KERNEL")
    bench.add_argument("-o", "--output", choices=("md", "csv", "json"), default="md", help="(%(default)s)")
    bench.set_defaults(func=bench_command)


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _averages(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


@one_line_errors
def bench_command(args: argparse.Namespace) -> int:
    """`mobiquant bench`: a table of speeds on stdout, progress on stderr."""
    from runtime.budget import Budget
    from runtime.commands.bench import LINEAR_SHAPES, Plan, bench_file, bench_linears, format_rows
    from runtime.cpu import physical_cores

    threads = args.threads or [physical_cores()]
    kernel = args.kernel or os.environ.get("MOBIQUANT_KERNEL") or None
    if args.repetitions < 1:
        raise ValueError(f"--repetitions: expected at least 1, found {args.repetitions}")
    if args.kernels:
        print(bench_linears(LINEAR_SHAPES, threads, args.repetitions, kernel))
        return 0
    budgets = [Budget.of(bits) for bits in args.bits.split(",") if bits != "0"]
    budgets += [Budget(bits, routed=True) for bits in args.avg_bits]
    plan = Plan(
        prompts=args.n_prompt,
        generations=args.n_gen,
        depths=args.n_depth,
        threads=threads,
        cache_types=(args.cache_type_k, args.cache_type_v),
        budgets=budgets,
        output_bits=args.output_bits,
        repetitions=args.repetitions,
        kernel=kernel,
    )
    show = _rewritten_line()
    rows = bench_file(args.model, plan, show)
    show("")
    print(format_rows(rows, args.output))
    return 0


def _rewritten_line() -> Callable[[str], None]:
    """Show a text on one line of the terminal; silent when stderr is no terminal."""

    def show(text: str) -> None:
        if sys.stderr.isatty():
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)

    return show


@one_line_errors
def info_command(args: argparse.Namespace) -> int:
    """`mobiquant info`: the version and the kernels of this machine, and a file's shape and sizes."""
    from runtime.commands.report import describe, describe_machine

    if args.model is None:
        print(describe_machine())
        return 0
    from runtime.model import Model

    with Model(args.model, n_ctx=1, n_threads=1, n_batch=1, allow_partial=True, device="cpu") as model:
        print(describe(model))
    return 0
