"""The console command `mobiquant`.

Owns the flags of `calibrate` and how errors and Ctrl-C end a command. The commands that judge a model are added by
mobiquant.evaluation.cli, those that run a GGUF file by runtime.commands.cli. Heavy imports happen inside a command:
the device side has no torch.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mobiquant import __version__
from mobiquant.config import CalibrationSettings
from mobiquant.text import read_text
from mobiquant.torch_setup import prepare_torch
from runtime.errors import MobiQuantError

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
    except (ImportError, MobiQuantError, OSError, ValueError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1


def build_parser() -> argparse.ArgumentParser:
    from mobiquant.evaluation import cli as evaluation_cli
    from runtime.commands import cli as runtime_cli

    parser = argparse.ArgumentParser(
        prog="mobiquant", description="Run language models at any average precision from 2 to 8 bits, from one file."
    )
    parser.add_argument("--version", action="version", version=f"mobiquant {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_calibrate(subparsers)
    evaluation_cli.add_commands(subparsers)
    runtime_cli.add_commands(subparsers)
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
    parser.add_argument(
        "--activations",
        choices=("cpu", "disk"),
        default="cpu",
        help="keep hidden states between blocks in memory, or in DIR (%(default)s)",
    )
    parser.add_argument("--restart", action="store_true", help="throw away what an earlier run left in DIR")
    parser.set_defaults(func=_calibrate)


def _calibrate(args: argparse.Namespace) -> int:
    prepare_torch()
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
        calibrate(open_source(args.model), args.output, text, settings, args.restart, args.activations)
    except KeyboardInterrupt:
        print(f"interrupted: the same command goes on from the blocks in {args.output}", file=sys.stderr)
        return 130
    print(f"{args.output}: calibrated; next: python -m export.to_gguf {args.output} -o FILE.gguf")
    return 0
