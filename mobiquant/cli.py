"""The console command `mobiquant`.

Owns the flags of `calibrate` and `perplexity` and how errors and Ctrl-C end a command. The commands that run a GGUF
file are added by runtime.cli. Heavy imports happen inside a command: the device side has no torch.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from pathlib import Path

from mobiquant import __version__
from mobiquant.config import CalibrationSettings
from mobiquant.scoring import RULES, format_result
from mobiquant.text import read_text

_DEMO_TEXT = Path(__file__).parent / "demo" / "calibration.txt"


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 1 after an error, 2 for wrong usage, 130 after Ctrl-C."""
    args = build_parser().parse_args(arguments)
    try:
        return args.func(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 1
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1


def build_parser() -> argparse.ArgumentParser:
    from runtime.cli import add_commands

    parser = argparse.ArgumentParser(
        prog="mobiquant", description="Run language models at any average precision from 2 to 8 bits, from one file."
    )
    parser.add_argument("--version", action="version", version=f"mobiquant {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_calibrate(subparsers)
    _add_perplexity(subparsers)
    add_commands(subparsers)
    return parser


def _add_calibrate(subparsers: argparse._SubParsersAction) -> None:
    defaults = CalibrationSettings()
    parser = subparsers.add_parser(
        "calibrate",
        help="turn a full-precision model into slices and routers",
        description="Calibrate a Hugging Face model into a checkpoint folder for `python -m export.to_gguf`. Every "
        "finished block is saved: after Ctrl-C the same command goes on.",
    )
    parser.add_argument("model", metavar="MODEL", help="a folder or hub id")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="the checkpoint folder")
    parser.add_argument("--text", type=Path, metavar="FILE", help="calibration text (default: the bundled one)")
    parser.add_argument("--recipe", default=defaults.recipe, help="best or paper (%(default)s)")
    parser.add_argument("--samples", type=int, default=defaults.samples, metavar="N", help="windows (%(default)s)")
    parser.add_argument("--seq-len", type=int, metavar="N", help="tokens per window (model's context, at most 2048)")
    parser.add_argument(
        "--batch", type=int, default=defaults.batch, metavar="N", help="windows at a time (%(default)s)"
    )
    best = parser.add_argument_group("recipe best")
    best.add_argument(
        "--distill-steps", type=int, default=defaults.distill_steps, metavar="N", help="of the base slice (%(default)s)"
    )
    best.add_argument(
        "--distill-batch", type=int, default=defaults.distill_batch, metavar="N", help="windows per step (%(default)s)"
    )
    paper = parser.add_argument_group("recipe paper")
    paper.add_argument("--epochs", type=int, default=defaults.epochs, metavar="N", help="per stage (%(default)s)")
    parser.add_argument("-s", "--seed", type=int, default=defaults.seed, metavar="S", help="(%(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda", "auto"), default=defaults.device, help="(%(default)s)")
    parser.add_argument("--restart", action="store_true", help="throw away what an earlier run left in DIR")
    parser.set_defaults(func=_calibrate)


def _add_perplexity(subparsers: argparse._SubParsersAction) -> None:
    from runtime.options import bits_option

    parser = subparsers.add_parser(
        "perplexity",
        help="score a model on a text",
        description="Perplexity of a .gguf file with this runtime, or of a checkpoint or model folder with torch.",
    )
    parser.add_argument("-m", "--model", type=Path, required=True, metavar="X", help="a .gguf file or a folder")
    parser.add_argument("-f", "--file", type=Path, required=True, metavar="TEXT", help="the text to score")
    precision = parser.add_mutually_exclusive_group()
    precision.add_argument(
        "--bits", type=bits_option, metavar="B", help="2, 4, 6, 8 or static:X, for all tokens alike (default: full)"
    )
    precision.add_argument("--avg-bits", type=float, metavar="A", help="routed: average bits per weight, 2 to 8")
    parser.add_argument("--rule", choices=RULES, default=RULES[0], help="which tokens are scored (%(default)s)")
    parser.add_argument("--windows", type=int, metavar="N", help="score the first N windows only")
    parser.add_argument("-c", "--ctx-size", type=int, metavar="N", help="tokens of a window (default: the rule's)")
    parser.add_argument("-t", "--threads", type=int, metavar="N", help="threads (default: one per physical core)")
    parser.add_argument("--reference", type=Path, metavar="DIR", help="full-precision folder: adds kld and top1")
    parser.add_argument("-o", "--output", choices=("text", "json"), default="text", help="(%(default)s)")
    parser.set_defaults(func=_perplexity)


def _calibrate(args: argparse.Namespace) -> int:
    _prepare_torch()
    from mobiquant.calibrate import calibrate
    from mobiquant.source import open_source

    settings = CalibrationSettings(
        recipe=args.recipe,
        samples=args.samples,
        seq_len=args.seq_len,
        epochs=args.epochs,
        batch=args.batch,
        distill_steps=args.distill_steps,
        distill_batch=args.distill_batch,
        seed=args.seed,
        device=args.device,
    )
    if args.text is None and not _DEMO_TEXT.is_file():
        raise ValueError("--text: expected a file: the bundled text comes with the source tree, not with the package")
    text = read_text(args.text or _DEMO_TEXT)
    try:
        calibrate(open_source(args.model), args.output, text, settings, args.restart)
    except KeyboardInterrupt:
        print(f"interrupted: the same command goes on from the blocks in {args.output}", file=sys.stderr)
        return 130
    print(f"{args.output}: calibrated; next: python -m export.to_gguf {args.output} -o FILE.gguf")
    return 0


def _perplexity(args: argparse.Namespace) -> int:
    if args.windows is not None and args.windows < 1:
        raise ValueError(f"--windows: expected at least 1, found {args.windows}")
    if args.ctx_size is not None and args.ctx_size < 4:
        raise ValueError(f"--ctx-size: expected at least 4, found {args.ctx_size}")
    if args.threads is not None and args.threads < 1:
        raise ValueError(f"--threads: expected at least 1, found {args.threads}")
    if not args.model.is_dir():
        from runtime.cli import perplexity

        return perplexity(args)
    _prepare_torch()
    import torch

    from mobiquant.evaluate import Evaluation, evaluate
    from runtime.budget import Budget

    if args.threads is not None:
        torch.set_num_threads(args.threads)

    budget = Budget.requested(args.bits, args.avg_bits)
    static_bits = budget.bits if budget and budget.static else None
    depth = budget.depth if budget and not (budget.routed or budget.static) else None
    evaluation = Evaluation(args.rule, depth, args.avg_bits, args.windows, args.ctx_size, static_bits)
    result = evaluate(args.model, read_text(args.file), evaluation, args.reference)
    print(format_result(result, args.output))
    return 0


def _prepare_torch() -> None:
    """Check that torch is there, and set what must be set before it is imported."""
    if any(importlib.util.find_spec(name) is None for name in ("torch", "transformers", "safetensors", "tqdm")):
        raise ValueError("torch or its companions are not installed: pip install 'mobiquant[calibrate]'")
    # Threads that wait in busy loops make a step fifty times slower as soon as another process wants one of the cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
