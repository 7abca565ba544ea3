"""The commands of the device side: `mobiquant run`, `mobiquant bench` and `mobiquant info`.

Arguments in, text out; what the commands do is in the other files of this package. Every error is one line on stderr.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.budget import DEPTH_BITS, parse_bits
from runtime.errors import MobiQuantError

if TYPE_CHECKING:
    from runtime.model import Model
    from runtime.native import Stats


def add_commands(subparsers: argparse._SubParsersAction) -> None:
    """Register `run` and `info`; each sets `func(args) -> int`, the exit status."""
    run = subparsers.add_parser("run", help="continue a prompt")
    _add_model_options(run)
    prompt = run.add_mutually_exclusive_group(required=True)
    prompt.add_argument("-p", "--prompt", help="text to continue")
    prompt.add_argument("-f", "--file", type=Path, help="file with the text to continue")
    run.add_argument(
        "-n",
        "--n-predict",
        type=int,
        default=128,
        help="tokens to generate (default %(default)s); 0: to the end of the context",
    )
    run.add_argument(
        "--temp", type=float, default=0.8, help="temperature (default %(default)s); 0: the most likely token"
    )
    run.add_argument(
        "--top-k", type=int, default=40, help="keep the k most likely tokens (default %(default)s); 0: off"
    )
    run.add_argument(
        "--top-p",
        type=float,
        default=0.95,
        help="keep the most likely tokens of this total (default %(default)s); 1: off",
    )
    run.add_argument(
        "--min-p",
        type=float,
        default=0.05,
        help="drop tokens below this share of the best (default %(default)s); 0: off",
    )
    run.add_argument(
        "--repeat-penalty", type=float, default=1.0, help="penalty on the last 64 tokens (default %(default)s: off)"
    )
    run.add_argument(
        "-s", "--seed", type=int, default=-1, help="seed of the draws (default %(default)s: a new one each time)"
    )
    run.set_defaults(func=run_command)

    _add_bench(subparsers)

    info = subparsers.add_parser("info", help="show what a file holds and which kernels run it")
    info.add_argument("model", type=Path, metavar="FILE", help="GGUF file")
    info.set_defaults(func=info_command)


def _add_bench(subparsers: argparse._SubParsersAction) -> None:
    bench = subparsers.add_parser("bench", help="measure speed, as llama-bench does")
    what = bench.add_mutually_exclusive_group(required=True)
    what.add_argument("-m", "--model", type=Path, metavar="FILE", help="GGUF file to measure")
    what.add_argument("--kernels", action="store_true", help="measure single linears instead of a file")
    bench.add_argument("-p", "--n-prompt", type=_numbers, default=[512], metavar="N,..", help="prompts (512); 0: none")
    bench.add_argument("-n", "--n-gen", type=_numbers, default=[128], metavar="N,..", help="answers (128); 0: none")
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


def bits_option(text: str) -> int | str:
    """The value of --bits: 2, 4, 6, 8 or static:X, as Model takes it."""
    try:
        return parse_bits(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _averages(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-m", "--model", type=Path, required=True, metavar="FILE", help="GGUF file")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument(
        "--bits",
        type=bits_option,
        metavar="B",
        help="one precision for all tokens: 2, 4, 6 or 8, or static:X with one per linear; default: the highest",
    )
    budget.add_argument("--avg-bits", type=float, metavar="X", help="average precision from 2 to 8, routed by token")
    parser.add_argument("--output-bits", type=int, choices=DEPTH_BITS, help="precision of the output head")
    parser.add_argument("-c", "--ctx-size", type=int, default=0, help="tokens of context (default: the model's)")
    parser.add_argument("-t", "--threads", type=int, default=None, help="threads (default: one per physical core)")
    parser.add_argument(
        "-b", "--batch-size", type=int, default=512, help="prompt tokens computed together (default %(default)s)"
    )
    parser.add_argument("--kernel", help="kernels to use, see `mobiquant info`; also $MOBIQUANT_KERNEL")
    parser.add_argument("--partial", action="store_true", help="accept a file cut after its last base slice")
    parser.add_argument("--no-mmap", action="store_true", help="read the file into memory instead of mapping it")


def _one_line_errors(command: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """Turn what a user can cause into one line on stderr and exit status 1."""

    @functools.wraps(command)
    def wrapped(args: argparse.Namespace) -> int:
        try:
            return command(args)
        except BrokenPipeError:  # the reader of our output has left
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except (ImportError, MobiQuantError, OSError, ValueError) as error:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            return 1

    return wrapped


@_one_line_errors
def run_command(args: argparse.Namespace) -> int:
    """`mobiquant run`: stream a continuation to stdout, then one line of figures to stderr."""
    from runtime.completion import stream_text
    from runtime.sampling import SamplingSettings

    sampling = SamplingSettings(
        args.temp, args.top_k, args.top_p, args.min_p, args.repeat_penalty, seed=None if args.seed < 0 else args.seed
    )
    prompt = args.file.read_bytes() if args.prompt is None else args.prompt
    with _open_model(args) as model:
        tokens = model.tokenize(prompt)
        if not tokens:
            raise ValueError("prompt: expected at least one token, found none")
        if len(tokens) > model.n_ctx:
            raise ValueError(f"prompt: expected at most {model.n_ctx} tokens, the context, found {len(tokens)}")
        start = time.perf_counter()
        prompt_end, prompt_stats, interrupted = None, model.stats, False
        try:
            for piece in stream_text(model, tokens, max_tokens=args.n_predict, sampling=sampling):
                if prompt_end is None:
                    prompt_end, prompt_stats = time.perf_counter(), model.stats
                print(piece.text, end="", flush=True)
        except KeyboardInterrupt:
            interrupted = True
        end = time.perf_counter()
        print(flush=True)
        if prompt_end is not None:
            _print_summary(model, len(tokens), prompt_end - start, end - prompt_end, prompt_stats)
    return 130 if interrupted else 0


def _print_summary(model: Model, prompt_tokens: int, prompt_s: float, generation_s: float, prompt_stats: Stats) -> None:
    """Speeds, precision and traffic. The first generated token comes with the prompt, so it is not timed."""
    generation = model.stats - prompt_stats
    measured = generation if generation.tokens else model.stats
    print(
        f"prompt {prompt_tokens} tokens, {prompt_tokens / prompt_s:.1f} tok/s; "
        f"generation {generation.tokens} tokens, {generation.tokens / generation_s:.1f} tok/s; "
        f"average bits {measured.average_bits:.2f}; {measured.bytes_per_token / 1e6:.2f} MB read per token",
        file=sys.stderr,
    )


@_one_line_errors
def bench_command(args: argparse.Namespace) -> int:
    """`mobiquant bench`: a table of speeds on stdout, progress on stderr."""
    from runtime.bench import LINEAR_SHAPES, Plan, bench_file, bench_linears, format_rows
    from runtime.budget import Budget
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
    plan = Plan(args.n_prompt, args.n_gen, threads, budgets, args.output_bits, args.repetitions, kernel)
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


@_one_line_errors
def info_command(args: argparse.Namespace) -> int:
    """`mobiquant info`: the file's shape and sizes, and the kernels of this machine."""
    from runtime.model import Model
    from runtime.report import describe

    with Model(args.model, n_ctx=1, n_threads=1, n_batch=1, allow_partial=True) as model:
        print(describe(model))
    return 0


def _open_model(args: argparse.Namespace) -> Model:
    from runtime.model import Model

    return Model(
        args.model,
        n_ctx=args.ctx_size,
        n_threads=args.threads,
        n_batch=args.batch_size,
        kernel=args.kernel,
        bits=args.bits,
        avg_bits=args.avg_bits,
        output_bits=args.output_bits,
        allow_partial=args.partial,
        mmap=not args.no_mmap,
    )
