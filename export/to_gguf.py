"""`python -m export.to_gguf DIR -o FILE`: a calibrated checkpoint becomes one verified GGUF file.

With `--synthetic SHAPE` in place of DIR the file holds seeded random weights, for measuring speed.
"""

from __future__ import annotations

from mobiquant import interrupts

if __name__ == "__main__":  # the imports take a while
    interrupts.end_at_once()

import argparse
import signal
import sys
from pathlib import Path

from export.errors import ExportError
from export.metadata import metadata_fields
from export.plan import plan_tensors
from export.shape import ModelShape
from export.source import CheckpointSource, checkpoint_shape
from export.synthetic import SHAPES, SyntheticSource, synthetic_vocabulary
from export.verify import verify_file
from export.vocab import Vocabulary, read_vocabulary
from export.writer import TensorSource, write_file
from mobiquant.checkpoint import CheckpointError, open_checkpoint
from runtime.files import replacing


def export_checkpoint(folder: Path, target: Path, name: str | None = None) -> None:
    """Write the checkpoint in `folder` to the GGUF file `target`; `name` defaults to the folder's name.

    Raises ExportError or CheckpointError; `target` is then as it was before.
    """
    checkpoint = open_checkpoint(folder)
    shape = checkpoint_shape(checkpoint)
    vocabulary = read_vocabulary(folder, shape.vocab_size)
    _export(target, name or folder.resolve().name, shape, vocabulary, CheckpointSource(checkpoint, shape))


def export_synthetic(shape: ModelShape, target: Path, name: str) -> None:
    """Write a file of seeded random weights of `shape` to `target`. Raises ExportError."""
    _export(target, name, shape, synthetic_vocabulary(), SyntheticSource(shape))


def _export(target: Path, name: str, shape: ModelShape, vocabulary: Vocabulary, source: TensorSource) -> None:
    if target.is_dir():
        raise ExportError(f"{target}: expected the name of a file, found a folder")
    plan = plan_tensors(shape)
    fields = metadata_fields(name, shape, vocabulary)
    try:
        with replacing(target) as temporary:
            write_file(temporary, fields, plan, source)
            verify_file(temporary, fields, plan, source)
    except OSError as error:
        raise ExportError(str(error)) from error


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m export.to_gguf", description=__doc__.splitlines()[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "checkpoint", nargs="?", type=Path, metavar="DIR", help="folder that `mobiquant calibrate` wrote"
    )
    names = ", ".join(SHAPES)
    source.add_argument("--synthetic", choices=list(SHAPES), metavar="SHAPE", help=f"random weights: {names}")
    parser.add_argument("-o", "--output", required=True, type=Path, metavar="FILE", help="the GGUF file to write")
    parser.add_argument("--name", help="model name in the file (default: the folder's name, or the shape's)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status: 0, 1 on an error, 130 when interrupted."""
    options = _parse(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that the temporary file is removed
    try:
        if options.synthetic:
            export_synthetic(SHAPES[options.synthetic], options.output, options.name or options.synthetic)
        else:
            export_checkpoint(options.checkpoint, options.output, options.name)
    except (ExportError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted; no file was written", file=sys.stderr)
        return 130
    print(f"{options.output}: {options.output.stat().st_size:,} bytes, verified")
    return 0


if __name__ == "__main__":
    sys.exit(interrupts.run(main))
