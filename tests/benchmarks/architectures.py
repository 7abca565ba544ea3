"""How near every architecture is to transformers, as a table: the tiny models of tests/architectures.py.

python tests/benchmarks/architectures.py
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from architectures import CASES, block_logits, exact_logits, make, relative
from benchmarks.parity import compare

from runtime import Model

DEMO_TEXT = Path(__file__).parents[2] / "mobiquant" / "demo" / "calibration.txt"
BUDGETS = (2, 8, 3.0)


def main() -> None:
    text = DEMO_TEXT.read_text(encoding="utf-8")[:40000]
    print("| model | blocks | runtime's arithmetic | C at 8 bits | top-1 equal | C = reference, greedy tokens |")
    print("| --- | --- | --- | --- | --- | --- |")
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            made = make(case, Path(folder), text)
            with Model(made.file, bits=8) as model:
                logits = model.eval(made.tokens, all_logits=True)
            errors = [
                relative(found(made.source, made.tokens), made.expected) for found in (block_logits, exact_logits)
            ]
            results = compare(made.checkpoint, made.file, [made.tokens], 32, BUDGETS)
        full, exact = (f"{error:.1e}" for error in errors)
        same = (logits.argmax(-1) == made.expected.argmax(-1)).sum()
        bits = all(result.kld == 0 and result.unequal == 0 for result in results)
        greedy = f"{sum(r.greedy_equal for r in results)} of {sum(r.greedy for r in results)}"
        print(
            f"| {case.name} | {full} | {exact} | {relative(logits, made.expected):.3f} | {same} of {len(logits)} "
            f"| {'yes' if bits else 'no'}, {greedy} |"
        )


if __name__ == "__main__":
    main()
