"""Flags that several commands share, what they open, and how an error ends a command."""

from __future__ import annotations

import argparse
import functools
import math
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.budget import DEPTH_BITS, parse_bits
from runtime.errors import MobiQuantError

if TYPE_CHECKING:
    from runtime.model import Model
    from runtime.sampling import SamplingSettings


def one_line_errors(command: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
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


def bits_option(text: str) -> int | str:
    """The value of --bits: 2, 4, 6, 8 or static:X, as Model takes it."""
    try:
        return parse_bits(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Which file to open and how to run it."""
    group = parser.add_argument_group("model")
    source = group.add_mutually_exclusive_group(required=True)
    source.add_argument("-m", "--model", type=Path, metavar="FILE", help="GGUF file")
    source.add_argument(
        "-hf",
        "--hf-repo",
        metavar="USER/MODEL",
        help="download from the Hugging Face hub; append :FILE.gguf when it has several",
    )
    budget = group.add_mutually_exclusive_group()
    budget.add_argument(
        "--bits",
        type=bits_option,
        metavar="B",
        help="one precision for all tokens: 2, 4, 6 or 8, or static:X with one per linear (the highest)",
    )
    budget.add_argument("--avg-bits", type=float, metavar="X", help="average precision from 2 to 8, routed by token")
    group.add_argument("--output-bits", type=int, choices=DEPTH_BITS, help="precision of the output head")
    group.add_argument("-c", "--ctx-size", type=int, default=0, metavar="N", help="tokens of context (the model's)")
    group.add_argument("-t", "--threads", type=int, metavar="N", help="threads (one per physical core)")
    group.add_argument(
        "-b", "--batch-size", type=int, default=512, metavar="N", help="prompt tokens computed together (%(default)s)"
    )
    add_cache_options(group)
    group.add_argument("--kernel", help="kernels to use, see `mobiquant info`; also $MOBIQUANT_KERNEL")
    group.add_argument(
        "--device",
        choices=("auto", "cuda", "cpu"),
        help="where to run: the GPU, the CPU, or the GPU where it can be used (auto)",
    )
    group.add_argument(
        "-ngl",
        "--gpu-layers",
        type=int,
        metavar="N",
        help="as in llama.cpp: 0 is --device cpu, anything else --device cuda; all blocks go to the GPU or none",
    )
    group.add_argument("--partial", action="store_true", help="accept a file cut after its last base slice")
    group.add_argument("--no-mmap", action="store_true", help="read the file into memory instead of mapping it")


def device_option(args: argparse.Namespace) -> str:
    """What --device and -ngl ask for together. Raises ValueError when they disagree."""
    asked = None if args.gpu_layers is None else "cpu" if args.gpu_layers == 0 else "cuda"
    if asked and args.device and asked != args.device:
        raise ValueError(f"-ngl {args.gpu_layers} is --device {asked}, found --device {args.device} beside it")
    return args.device or asked or "auto"


def add_cache_options(group: argparse._ActionsContainer) -> None:
    """How keys and values are kept: llama.cpp's flags."""
    for flags, which in (("-ctk --cache-type-k", "keys"), ("-ctv --cache-type-v", "values")):
        group.add_argument(
            *flags.split(), choices=("f16", "q8_0"), default="f16", help=f"of {which} in the cache (f16)"
        )


def open_model(args: argparse.Namespace) -> Model:
    """The model that the flags of `add_model_options` ask for."""
    from runtime.model import Model

    path = args.model
    if path is None:
        from runtime.hub import download

        repository, _, filename = args.hf_repo.partition(":")
        path = download(repository, filename or None)
    try:
        return Model(
            path,
            n_ctx=args.ctx_size,
            n_threads=args.threads,
            n_batch=args.batch_size,
            kernel=args.kernel,
            cache_type=(args.cache_type_k, args.cache_type_v),
            bits=args.bits,
            avg_bits=args.avg_bits,
            output_bits=args.output_bits,
            allow_partial=args.partial,
            mmap=not args.no_mmap,
            device=device_option(args),
        )
    except MobiQuantError as error:
        if error.status != "MQ_ERR_TRUNCATED" or args.partial:
            raise
        raise MobiQuantError(f"{error}; try --partial", error.status) from error


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """How the next token is chosen: llama.cpp's names and defaults."""
    group = parser.add_argument_group("sampling")
    group.add_argument("--temp", type=float, default=0.8, metavar="X", help="temperature (%(default)s); 0: most likely")
    group.add_argument(
        "--top-k", type=int, default=40, metavar="N", help="keep the N most likely (%(default)s); 0: off"
    )
    group.add_argument(
        "--top-p", type=float, default=0.95, metavar="X", help="keep the most likely up to this total (%(default)s)"
    )
    group.add_argument(
        "--min-p", type=float, default=0.05, metavar="X", help="drop what is below this share of the best (%(default)s)"
    )
    group.add_argument(
        "--typical",
        type=float,
        default=1.0,
        metavar="X",
        help="keep the most typical up to this total (%(default)s: off)",
    )
    group.add_argument(
        "--repeat-last-n", type=int, default=64, metavar="N", help="tokens the penalties look at (%(default)s)"
    )
    group.add_argument(
        "--repeat-penalty", type=float, default=1.0, metavar="X", help="divide repeated logits (%(default)s: off)"
    )
    group.add_argument(
        "--presence-penalty", type=float, default=0.0, metavar="X", help="subtract once if repeated (%(default)s: off)"
    )
    group.add_argument(
        "--frequency-penalty", type=float, default=0.0, metavar="X", help="subtract per repetition (%(default)s: off)"
    )
    group.add_argument(
        "-l", "--logit-bias", type=_bias, action="append", default=[], metavar="ID±X", help="as 29871+1.5 or 15043-inf"
    )
    group.add_argument("--mirostat", type=int, choices=(0, 2), default=0, help="in place of the filters (%(default)s)")
    group.add_argument("--mirostat-ent", type=float, default=5.0, metavar="X", help="surprise in bits (%(default)s)")
    group.add_argument("--mirostat-lr", type=float, default=0.1, metavar="X", help="rate of correction (%(default)s)")
    group.add_argument("-s", "--seed", type=int, default=-1, help="of the draws (%(default)s: a new one each time)")


def sampling_settings(args: argparse.Namespace) -> SamplingSettings:
    """What the flags of `add_sampling_options` ask for. Raises ValueError for a number outside its range."""
    from runtime.sampling import SamplingSettings

    return SamplingSettings(
        temperature=args.temp,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        typical_p=args.typical,
        repeat_penalty=args.repeat_penalty,
        presence_penalty=args.presence_penalty,
        frequency_penalty=args.frequency_penalty,
        last_n=args.repeat_last_n,
        logit_bias=dict(args.logit_bias),
        mirostat_mode=args.mirostat,
        mirostat_tau=args.mirostat_ent,
        mirostat_eta=args.mirostat_lr,
        seed=None if args.seed < 0 else args.seed,
    )


def _bias(text: str) -> tuple[int, float]:
    match = re.fullmatch(r"(\d+)([+-](?:inf|\d+(?:\.\d*)?))", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"expected a token id with + or - and a number, as 29871+1.5, found {text!r}")
    return int(match[1]), -math.inf if match[2] == "-inf" else float(match[2])
