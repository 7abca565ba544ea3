"""Write malformed files made from FILE into FOLDER, `CLASS.SEED.gguf`, SEEDS of each class (default 2)."""

from __future__ import annotations

import sys
from pathlib import Path

from malformed import CLASSES, make


def main(file: str, folder: str, seeds: str = "2") -> None:
    good, target = Path(file).read_bytes(), Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    for kind in CLASSES:
        for seed in range(int(seeds)):
            (target / f"{kind.name}.{seed}.gguf").write_bytes(make(good, kind, seed)[0])


if __name__ == "__main__":
    main(*sys.argv[1:])
