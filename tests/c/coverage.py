"""`python tests/c/coverage.py BUILD SOURCES`: the lines of SOURCES that programs built with --coverage in BUILD ran."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path


def lines_of(build: Path, sources: Path) -> dict[str, dict[int, bool]]:
    """Of every source file, its lines that hold code, and whether one of the programs ran them."""
    found: dict[str, dict[int, bool]] = defaultdict(dict)
    for data in build.resolve().glob("*.gcda"):
        command = ["gcov", "--json-format", "--stdout", str(data)]
        text = subprocess.run(command, capture_output=True, check=True).stdout
        text = gzip.decompress(text) if text.startswith(b"\x1f\x8b") else text
        for file in json.loads(text)["files"]:
            path = Path(file["file"]).resolve()
            if path.parent == sources.resolve() and path.suffix in (".c", ".h"):
                for line in file["lines"]:
                    ran = found[path.name].get(line["line_number"], False)
                    found[path.name][line["line_number"]] = ran or line["count"] > 0
    return found


def main(build: str, sources: str) -> None:
    found = lines_of(Path(build), Path(sources))
    total = ran = 0
    for name, lines in sorted(found.items()):
        total, ran = total + len(lines), ran + sum(lines.values())
        missed = [str(line) for line, hit in sorted(lines.items()) if not hit]
        print(f"{name:20} {sum(lines.values()):5} of {len(lines):5}  not run: {' '.join(missed) or 'none'}")
    print(f"{sources}: {ran} of {total} lines, {100 * ran / total:.1f} %")


if __name__ == "__main__":
    main(*sys.argv[1:])
