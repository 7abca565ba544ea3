"""How far the C runtime is from the torch reference, on one checkpoint and the file exported from it.

    python tests/benchmarks/parity.py CHECKPOINT FILE TEXT [--windows N] [--greedy N]

For every budget: KL divergence between the two next-token distributions, the share of equal router decisions over
(token, linear) pairs and the first pair of every window where they part, and greedy continuation. The reference sees
the tokens that C generated; where its own choice differs, the gap between its two best logits is printed.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from mobiquant.checkpoint import LINEARS
from mobiquant.evaluation.scoring import log_softmax, make_windows
from mobiquant.reference import ReferenceModel, open_reference
from mobiquant.text import clean_text
from runtime import Model

BUDGETS: tuple[int | float | str, ...] = (2, 4, 6, 8, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, "static:3.5")


@dataclass
class Parity:
    """budget: as `Model.bits` takes it. kld: nats per token. worst_kld: of one token.

    decisions, unequal: (token, linear) pairs. partings: per window the first token, block and linear with an unequal
    depth; whatever follows in that window computes with other weights. greedy, greedy_equal: tokens generated and
    tokens that the reference would choose too. gaps: difference of the reference's two best logits where it would not.
    """

    budget: int | float | str
    kld: float = 0.0
    worst_kld: float = 0.0
    decisions: int = 0
    unequal: int = 0
    partings: list[str] = field(default_factory=list)
    greedy: int = 0
    greedy_equal: int = 0
    gaps: list[float] = field(default_factory=list)

    @property
    def equal_share(self) -> float:
        return 1 - self.unequal / self.decisions


def compare(
    checkpoint: Path,
    file: Path,
    windows: list[np.ndarray],
    greedy: int,
    budgets: tuple[int | float | str, ...] = BUDGETS,
) -> list[Parity]:
    """Compare at every budget on `windows`, int32 token arrays; then `greedy` tokens after the first 8 of the first."""
    reference = open_reference(checkpoint)
    results = []
    with Model(file) as model:
        for budget in budgets:
            result = Parity(budget)
            model.bits = budget
            model.budget.apply(reference)
            klds = [_compare_window(reference, model, tokens, result) for tokens in windows]
            result.kld = float(np.concatenate(klds).mean())
            result.worst_kld = float(np.concatenate(klds).max())
            _compare_greedy(reference, model, windows[0][:8], greedy, result)
            results.append(result)
    return results


def _compare_window(reference: ReferenceModel, model: Model, tokens: np.ndarray, result: Parity) -> np.ndarray:
    model.reset()
    logits = model.eval(tokens, all_logits=True)
    expected = reference.logits(tokens)
    log_probs, expected_log_probs = log_softmax(logits), log_softmax(expected)
    depths, expected_depths = model.depths(0, len(tokens)), reference.depths
    unequal = np.argwhere(depths != expected_depths)
    result.decisions += depths.size
    result.unequal += len(unequal)
    if len(unequal):
        token, block, linear = unequal[0]
        pair = f"{depths[token, block, linear]} for {expected_depths[token, block, linear]}"
        result.partings.append(f"token {token}, block {block}, {LINEARS[linear]}: depth {pair}")
    return (np.exp(expected_log_probs) * (expected_log_probs - log_probs)).sum(1)


def _compare_greedy(reference: ReferenceModel, model: Model, prompt: np.ndarray, count: int, result: Parity) -> None:
    model.reset()
    tokens = list(prompt)
    logits = model.eval(prompt)
    for _ in range(count):
        tokens.append(int(np.argmax(logits)))
        logits = model.eval(tokens[-1:])
    expected = reference.logits(np.array(tokens[:-1]))[len(prompt) - 1 :]
    for chosen, row in zip(tokens[len(prompt) :], expected, strict=True):
        second, best = np.sort(row)[-2:]
        result.greedy += 1
        if int(np.argmax(row)) == chosen:
            result.greedy_equal += 1
        else:
            result.gaps.append(float(best - second))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("file", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--windows", type=int, default=4, help="windows of text (default 4)")
    parser.add_argument("--length", type=int, default=256, help="tokens of a window (default 256)")
    parser.add_argument("--greedy", type=int, default=200, help="tokens to generate (default 200)")
    parser.add_argument("-o", "--output", choices=("text", "json"), default="text")
    options = parser.parse_args()
    with Model(options.file) as model:
        ids = model.tokenize(clean_text(options.text.read_text(encoding="utf-8")), add_bos=False)
        windows = make_windows(ids, "all", options.length, model.tokenizer.bos)[: options.windows]
    results = compare(options.checkpoint, options.file, [window.tokens for window in windows], options.greedy)
    if options.output == "json":
        print(json.dumps([asdict(result) for result in results]))
        return 0
    print("budget            KL (nats)  worst token  equal decisions           greedy equal  gaps where not")
    for result in results:
        kind = f"{result.budget} avg" if isinstance(result.budget, float) else f"{result.budget} bits"
        share = f"{result.equal_share:.6%} of {result.decisions}"
        gaps = ", ".join(f"{gap:.2g}" for gap in result.gaps) or "-"
        greedy = f"{result.greedy_equal}/{result.greedy}"
        print(f"{kind:15}  {result.kld:10.2e}  {result.worst_kld:11.2e}  {share:24}  {greedy:12}  {gaps}")
        for parting in result.partings:
            print(f"                 first unequal depth: {parting}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
