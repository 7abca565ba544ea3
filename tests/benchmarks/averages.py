"""How well routed averages hold: bits read against bits asked for, per text and length of window.

python tests/benchmarks/averages.py FILE TEXT... [--context 1024,256] [--windows 16]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from mobiquant.evaluation.scoring import make_windows
from mobiquant.text import clean_text
from runtime import Model

AVERAGES = (2.5, 3.0, 3.5, 4.0, 5.0)


def bits_read(model: Model, windows: list[np.ndarray]) -> np.ndarray:
    """Average bits of every window, each from an empty cache."""
    spent = []
    for tokens in windows:
        model.reset()
        before = model.stats
        model.eval(tokens)
        spent.append((model.stats - before).average_bits)
    return np.array(spent)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--context", default="1024,256", help="tokens of a window (default %(default)s)")
    parser.add_argument("--windows", type=int, default=16, help="windows per text (default %(default)s)")
    options = parser.parse_args()
    print("| text | tokens | asked | read on average | worst window |\n| --- | --- | --- | --- | --- |")
    with Model(options.file) as model:
        for path in options.texts:
            ids = model.tokenize(clean_text(path.read_text(encoding="utf-8")), add_bos=False)
            for context in map(int, options.context.split(",")):
                windows = make_windows(ids, "all", context, model.tokenizer.bos)[: options.windows]
                for asked in AVERAGES:
                    model.bits = asked
                    spent = bits_read(model, [window.tokens for window in windows])
                    worst = spent[np.argmax(abs(spent - asked))]
                    print(f"| {path.name} | {context} | {asked:g} | {spent.mean():.3f} | {worst - asked:+.3f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
