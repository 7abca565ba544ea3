"""Static baselines of one model: full precision, round-to-nearest and GPTQ per width, scored as the nested file is.

    python -m tests.benchmarks.baselines MODEL --texts DIR -o baselines.json [--samples 128] [--windows N]

DIR holds `calibration.txt`, which GPTQ alone reads, and the texts of TEXTS. Embedding and head stay as they are. Prints
a table and writes the list of entries that `mobiquant evaluate --baselines` draws. A run that was stopped goes on with
the next baseline.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer
from torch import Tensor

from mobiquant.config import MAX_SEQ_LEN
from mobiquant.data import calibration_windows
from mobiquant.evaluation.scoring import default_window, make_windows
from mobiquant.models import linear_shapes
from mobiquant.source import open_source
from mobiquant.text import clean_text, read_text

from ..dense import DenseModel
from .gptq import gptq_weights
from .grid import bits_per_weight
from .rtn import round_to_nearest
from .scores import Entry, ScoredText, table

# File, rule of mobiquant.evaluation.scoring, windows.
TEXTS = (("heldout_anchor.txt", "llama.cpp", 32), ("heldout.txt", "all", 64), ("wikitext2_valid_tokens.txt", "all", 32))
CALIBRATION = "calibration.txt"
WIDTHS = {"RTN": (2, 3, 4, 6, 8), "GPTQ": (2, 3, 4)}
_FULL_PRECISION = ("full precision", 16.0)


@dataclass(frozen=True)
class Settings:
    """samples: GPTQ's calibration windows; windows: at most so many of every text; device: cpu or cuda."""

    samples: int = 128
    windows: int | None = None
    seed: int = 0
    device: str = "cpu"


def run(model: str, texts: Path, output: Path, settings: Settings) -> list[Entry]:
    """Score every baseline of `model`, a folder or hub id, and write `output`.

    Raises ValueError and its subclasses, or OSError, on unusable input.
    """
    source = open_source(model)
    dense = DenseModel(source.path, settings.device)
    seq_len = min(source.context_length, MAX_SEQ_LEN)
    calibration_text, tokenizer = read_text(texts / CALIBRATION), source.tokenizer()
    samples = calibration_windows(calibration_text, tokenizer, dense.bos, settings.samples, seq_len, settings.seed)
    methods: dict[str, Callable[[int], dict[str, Tensor]]] = {
        "RTN": lambda bits: {name: round_to_nearest(weight, bits) for name, weight in dense.originals.items()},
        "GPTQ": lambda bits: gptq_weights(source, samples.training, bits, settings.device),
    }
    made_by = {"model": source.fingerprint(), "texts": str(texts.resolve()), **dataclasses.asdict(settings)}
    journal = _Journal(output, made_by)
    scored = [_open_text(tokenizer, texts / name, rule, count, settings, dense) for name, rule, count in TEXTS]
    if not journal.has(_FULL_PRECISION[0]):
        journal.add([text.entry(dense, *_FULL_PRECISION) for text in scored])
    for method, widths in WIDTHS.items():
        for bits in widths:
            name = f"{method} {bits}"
            if not journal.has(name):
                dense.set_weights(methods[method](bits))
                size = bits_per_weight(linear_shapes(source.config).values(), bits)
                journal.add([text.entry(dense, name, size) for text in scored])
    return journal.finish()


def _open_text(
    tokenizer: Tokenizer, path: Path, rule: str, count: int, settings: Settings, dense: DenseModel
) -> ScoredText:
    ids = tokenizer.encode(clean_text(read_text(path)), add_special_tokens=False).ids
    windows = make_windows(ids, rule, default_window(rule, dense.context), dense.bos)
    return ScoredText(path.name, rule, windows[: min(count, settings.windows or count)], dense)


class _Journal:
    """The entries made so far. Until all are there they lie beside the output, with the settings that made them."""

    def __init__(self, output: Path, settings: dict[str, object]):
        self._output = output
        self._partial = output.with_name(output.name + ".partial")
        self._settings = settings
        self._entries: list[Entry] = []
        if self._partial.is_file():
            content = json.loads(self._partial.read_text(encoding="utf-8"))
            if content["settings"] == settings:
                self._entries = [Entry(**entry) for entry in content["entries"]]

    def has(self, name: str) -> bool:
        return any(entry.name == name for entry in self._entries)

    def add(self, entries: list[Entry]) -> None:
        self._entries += entries
        self._write(self._partial, {"settings": self._settings, "entries": self._plain()})

    def finish(self) -> list[Entry]:
        self._write(self._output, self._plain())
        self._partial.unlink(missing_ok=True)
        return self._entries

    def _plain(self) -> list[dict[str, object]]:
        return [dataclasses.asdict(entry) for entry in self._entries]

    @staticmethod
    def _write(path: Path, content: object) -> None:
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(temporary, path)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.baselines", description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a full-precision folder or hub id")
    parser.add_argument("--texts", type=Path, required=True, metavar="DIR", help="where the texts are")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="the list of entries, JSON")
    parser.add_argument("--samples", type=int, default=Settings.samples, metavar="N", help="for GPTQ (%(default)s)")
    parser.add_argument("--windows", type=int, metavar="N", help="score at most N windows of a text (32, 64, 32)")
    parser.add_argument("-s", "--seed", type=int, default=Settings.seed, metavar="S", help="(%(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=Settings.device, help="(%(default)s)")
    options = parser.parse_args()
    settings = Settings(options.samples, options.windows, options.seed, options.device)
    try:
        entries = run(options.model, options.texts, options.output, settings)
    except KeyboardInterrupt:
        print("interrupted: the same command goes on with the next baseline", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(table(entries))
    return 0


if __name__ == "__main__":
    sys.exit(main())
