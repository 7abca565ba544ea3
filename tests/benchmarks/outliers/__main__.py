"""Which tokens are outliers at each precision, how the set changes with it, and what the routers do about it.

    python -m tests.benchmarks.outliers CHECKPOINT MODEL TEXT [--windows 8] [--picture FILE.svg] [--page FILE.md]

CHECKPOINT is what MODEL, a full-precision folder, was calibrated to; TEXT was not calibrated on. Prints the tables of
docs/outliers.md; --page replaces those in the page, between its two marks; --picture draws (needs the extra `plot`).
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import numpy as np

from mobiquant.evaluation.scoring import make_windows
from mobiquant.source import open_source
from mobiquant.text import clean_text, read_text

from .analysis import token_kind
from .measure import measure
from .report import report

BEGIN_MARK, END_MARK = "<!-- tables -->", "<!-- end of tables -->"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.outliers", description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    parser.add_argument("model", metavar="MODEL", help="the full-precision folder or hub id")
    parser.add_argument("text", type=Path, metavar="TEXT")
    parser.add_argument("--windows", type=int, default=8, metavar="N", help="of the model's context (%(default)s)")
    parser.add_argument("--picture", type=Path, metavar="FILE", help=".svg or .png")
    parser.add_argument("--page", type=Path, metavar="FILE", help="a page whose tables are replaced")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(%(default)s)")
    try:
        run(parser.parse_args())
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def run(options: argparse.Namespace) -> None:
    """Measure, print, and write what was asked for. Raises ValueError and its subclasses, or OSError."""
    source = open_source(options.model)
    tokenizer, context = source.tokenizer(), source.context_length
    ids = tokenizer.encode(clean_text(read_text(options.text)), add_special_tokens=False).ids
    windows = make_windows(ids, "all", context, source.config.bos_token_id)[: options.windows]
    whole = [window.tokens for window in windows if len(window.tokens) == context]
    if not whole:
        raise ValueError(f"{options.text}: expected {context} tokens, found {len(ids)}")
    measured = measure(options.checkpoint, source, np.stack(whole), options.device)
    pieces = [tokenizer.decode([int(token)], skip_special_tokens=False) for token in measured.tokens]
    tables = report(measured, pieces, np.array([token_kind(piece) for piece in pieces]))
    print(tables)
    if options.page is not None:
        replace_tables(options.page, tables)
    if options.picture is not None:
        from .picture import draw

        draw(measured, pieces, options.picture)


def replace_tables(page: Path, tables: str) -> None:
    """Put `tables` between the marks of the page. Raises ValueError when it has not got them."""
    text = page.read_text(encoding="utf-8")
    if text.count(BEGIN_MARK) != 1 or text.count(END_MARK) != 1:
        raise ValueError(f"{page}: expected one {BEGIN_MARK} and one {END_MARK}")
    before, rest = text.split(BEGIN_MARK)
    temporary = page.with_name(page.name + ".tmp")
    temporary.write_text(f"{before}{BEGIN_MARK}\n\n{tables}\n\n{END_MARK}{rest.split(END_MARK)[1]}", encoding="utf-8")
    os.replace(temporary, page)


if __name__ == "__main__":
    sys.exit(main())
