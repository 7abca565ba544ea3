"""The commands that judge a model: `mobiquant perplexity`, one score quickly, and `mobiquant evaluate`, whole tables.

Owns their flags, the checks before long work, and what is shown when; the work itself is in evaluate, tasks, report
and plot beside it. A GGUF file without --reference needs no torch.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING

from mobiquant.evaluation.backends import Backend, RuntimeBackend, open_backend
from mobiquant.evaluation.baselines import Baseline, read_baselines
from mobiquant.evaluation.evaluate import DEFAULT_BUDGETS, FULL, Precision, TextResult, score_windows, text_windows
from mobiquant.evaluation.plot import check_plot, draw
from mobiquant.evaluation.report import Report, TextReport, write_report
from mobiquant.evaluation.scoring import RULES, default_window, format_result
from mobiquant.text import read_text
from mobiquant.torch_setup import prepare_torch
from runtime.budget import Budget
from runtime.commands.options import add_cache_options, bits_option

if TYPE_CHECKING:
    from lm_eval.api.task import Task

_INTERRUPTED = 130


def add_commands(subparsers: argparse._SubParsersAction) -> None:
    """Register `perplexity` and `evaluate`; each sets `func(args) -> int`, the exit status."""
    _add_perplexity(subparsers)
    _add_evaluate(subparsers)


def _add_perplexity(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "perplexity",
        help="score a model on a text",
        description="Perplexity of a .gguf file with this runtime, or of a checkpoint or model folder with torch.",
    )
    parser.add_argument("-m", "--model", type=Path, required=True, metavar="X", help="a .gguf file or a folder")
    parser.add_argument("-f", "--file", type=Path, required=True, metavar="TEXT", help="the text to score")
    precision = parser.add_mutually_exclusive_group()
    precision.add_argument("--bits", type=bits_option, metavar="B", help="2, 4, 6, 8 or static:X (default: full)")
    precision.add_argument("--avg-bits", type=float, metavar="A", help="routed: average bits per weight, 2 to 8")
    parser.add_argument("--check-tensors", action="store_true", help="refuse a damaged .gguf file, read wholly first")
    _add_scoring_options(parser)
    parser.add_argument("-o", "--output", choices=("text", "json"), default="text", help="(%(default)s)")
    parser.set_defaults(func=perplexity_command)


def _add_evaluate(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "evaluate",
        help="quality at many precisions: perplexity, divergence, zero-shot tasks, a picture",
        description="Measure a .gguf file (this runtime), a checkpoint or a full-precision folder (torch) at a list of "
        "budgets. A whole number is one depth for all tokens, a number with a point an average that the routers spend, "
        "static:X an average over linears of one depth each.",
    )
    parser.add_argument("model", type=Path, metavar="MODEL", help="a .gguf file or a folder")
    parser.add_argument("--text", type=Path, nargs="+", default=[], metavar="FILE", help="texts to score")
    parser.add_argument("--tasks", type=_names, default=[], metavar="T,..", help="zero-shot tasks, through lm_eval")
    parser.add_argument(
        "--tasks-dir", type=Path, metavar="DIR", help="where tasks lie as TASK.jsonl (default: the hub)"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="the first N documents of each task only")
    parser.add_argument(
        "--budgets", type=_names, metavar="B,..", help=f"2, 3.0, static:3, ... ({','.join(DEFAULT_BUDGETS)})"
    )
    _add_scoring_options(parser)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where torch runs (%(default)s)")
    parser.add_argument("-o", choices=("md", "json"), default="md", dest="form", help="what is printed (%(default)s)")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="also write the JSON here")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="draw quality against bits per weight (or .png)")
    parser.add_argument(
        "--baselines", type=Path, nargs="+", default=[], metavar="FILE.json", help="figures of other methods to show"
    )
    parser.set_defaults(func=evaluate_command)


def _add_scoring_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--reference", type=Path, metavar="DIR", help="full-precision folder: adds KL and top-1")
    parser.add_argument("--rule", choices=RULES, default=RULES[0], help="which tokens are scored (%(default)s)")
    parser.add_argument("--windows", type=int, metavar="N", help="score the first N windows only")
    parser.add_argument("-c", "--ctx-size", type=int, metavar="N", help="tokens of a window (default: the rule's)")
    parser.add_argument("-t", "--threads", type=int, metavar="N", help="threads (default: one per physical core)")
    add_cache_options(parser)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def perplexity_command(args: argparse.Namespace) -> int:
    """`mobiquant perplexity`: one score at one precision, as a line or a JSON object."""
    _check_counts(args, "windows", "threads", "ctx_size")
    precision = Precision("asked", Budget.requested(args.bits, args.avg_bits))
    text = read_text(args.file)
    with ExitStack() as stack:
        backend = _open(stack, args.model, args)
        reference = _open(stack, args.reference, args) if args.reference else None
        windows = text_windows(backend, text, args.rule, args.ctx_size, args.windows)
        result = score_windows(backend, windows, [precision], reference, _progress_line())
    row = result.rows[0]
    figures = row.score.to_dict(row.bits)
    print(format_result(figures if args.bits is None else figures | {"bits": args.bits}, args.output))
    if result.interrupted:
        print(f"interrupted: this is the score of {result.windows} of {result.planned} windows", file=sys.stderr)
    return _INTERRUPTED if result.interrupted else 0


def evaluate_command(args: argparse.Namespace) -> int:
    """`mobiquant evaluate`: tables on stdout, and the files asked for. After Ctrl-C, what was done until then."""
    texts, precisions, baselines = _check_evaluate(args)
    report = Report(str(args.model), reference=str(args.reference) if args.reference else None)
    interrupted = False
    try:
        _evaluate(report, args, texts, precisions, baselines)
    except KeyboardInterrupt:
        if not report.texts and not report.tasks:
            raise
        interrupted = True
        print("interrupted: this is what was done", file=sys.stderr)
    print(report.to_json() if args.form == "json" else report.to_markdown())
    if args.output:
        write_report(args.output, report)
    if args.plot and report.texts:
        draw(report, args.plot)
    return _INTERRUPTED if interrupted else 0


def _check_evaluate(args: argparse.Namespace) -> tuple[list[tuple[str, str]], list[Precision] | None, list[Baseline]]:
    """Everything that can be wrong before a model is opened. Returns the texts, each after its file's name, what
    --budgets asks for (None without it), and the baselines."""
    _check_counts(args, "windows", "threads", "ctx_size", "limit")
    if not args.text and not args.tasks:
        raise ValueError("expected --text or --tasks, found neither")
    if args.plot and not args.text:
        raise ValueError("--plot: expected --text as well: the picture shows the scores on texts")
    for path in (args.output, args.plot):
        if path and not path.parent.is_dir():
            raise ValueError(f"{path}: expected a folder {path.parent}, found none")
    if args.plot:
        check_plot(args.plot)
    if args.tasks and importlib.util.find_spec("lm_eval") is None:
        raise ValueError("--tasks: lm_eval is not installed: pip install 'mobiquant[evaluate]'")
    if args.tasks_dir and not args.tasks_dir.is_dir():
        raise ValueError(f"--tasks-dir: expected a folder, found none at {args.tasks_dir}")
    texts = [(path.name, read_text(path)) for path in args.text]
    precisions = [Precision.parse(budget) for budget in args.budgets] if args.budgets else None
    return texts, precisions, [baseline for path in args.baselines for baseline in read_baselines(path)]


def _evaluate(
    report: Report,
    args: argparse.Namespace,
    texts: list[tuple[str, str]],
    precisions: list[Precision] | None,
    baselines: list[Baseline],
) -> None:
    """Fill `report`. Raises KeyboardInterrupt with the report as far as it came."""
    with ExitStack() as stack:
        backend = _open(stack, args.model, args)
        reference = _open(stack, args.reference, args) if args.reference else None
        report.kind = backend.kind
        if precisions is None:
            full = backend.kind == "full precision"
            precisions = [FULL] if full else [Precision.parse(name) for name in DEFAULT_BUDGETS]
        tasks = _load_tasks(args)
        for name, text in texts:
            windows = text_windows(backend, text, args.rule, args.ctx_size, args.windows)
            result = score_windows(backend, windows, precisions, reference, _progress_line(f"{name}: "))
            context = args.ctx_size or default_window(args.rule, backend.n_ctx)
            compared = [baseline for baseline in baselines if baseline.belongs_to(name, args.rule)]
            report.texts.append(TextReport(name, args.rule, context, result, compared))
            if result.interrupted:
                raise KeyboardInterrupt
        if tasks:
            _answer_tasks(report, backend, reference, precisions, tasks, args.limit)


def _load_tasks(args: argparse.Namespace) -> Mapping[str, Task]:
    if not args.tasks:
        return {}
    from mobiquant.evaluation.tasks import load_tasks

    return load_tasks(args.tasks, args.tasks_dir)


def _answer_tasks(
    report: Report,
    backend: Backend,
    reference: Backend | None,
    precisions: list[Precision],
    tasks: Mapping[str, Task],
    limit: int | None,
) -> None:
    from mobiquant.evaluation.tasks import answer, task_row

    show = _say(len(precisions) + (reference is not None))
    expected = None
    if reference is not None:
        show("full precision")
        expected = answer(reference, None, tasks, limit)
        report.tasks += [task_row(task, "full precision", found, None) for task, found in expected.items()]
    for precision in precisions:
        show(precision.label)
        for task, found in answer(backend, precision.budget, tasks, limit).items():
            report.tasks.append(task_row(task, precision.label, found, expected and expected[task]))


def _open(stack: ExitStack, path: Path, args: argparse.Namespace) -> Backend:
    """A model that `stack` closes."""
    device = getattr(args, "device", "cpu")  # `perplexity` has no such flag, and `evaluate` no --check-tensors
    if path.is_dir():
        prepare_torch(args.threads)
        return stack.enter_context(closing(open_backend(path, device=device, n_threads=args.threads)))
    from runtime.commands.faults import watch

    watch(path)
    types, check = (args.cache_type_k, args.cache_type_v), getattr(args, "check_tensors", False)
    opened = RuntimeBackend(path, n_threads=args.threads, cache_type=types, check_tensors=check)
    backend = stack.enter_context(closing(opened))
    watch(path, backend.model)
    return backend


def _check_counts(args: argparse.Namespace, *names: str) -> None:
    for name in names:
        value, least = getattr(args, name), 4 if name == "ctx_size" else 1
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')}: expected at least {least}, found {value}")


def _progress_line(label: str = "") -> Callable[[TextResult], None]:
    """A line on the terminal that is rewritten after every window; silent when stderr is no terminal."""
    start = time.perf_counter()

    def show(result: TextResult) -> None:
        if sys.stderr.isatty():
            done, total = result.windows, result.planned
            left = (time.perf_counter() - start) / done * (total - done)
            end = "\n" if done == total else ""
            ppl = result.rows[0].score.ppl
            line = f"\r{label}{done}/{total} windows, perplexity {ppl:.3f}, {left:.0f} s left "
            print(line, end=end, file=sys.stderr, flush=True)

    return show


def _say(count: int) -> Callable[[str], None]:
    """Name what is next of `count` steps; silent when stderr is no terminal."""
    steps = iter(range(1, count + 1))

    def show(label: str) -> None:
        if sys.stderr.isatty():
            print(f"tasks at {label} ({next(steps)} of {count})", file=sys.stderr)

    return show
