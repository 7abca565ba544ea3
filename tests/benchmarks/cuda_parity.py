"""The GPU against the CPU on one file and real text: logits, depths, and greedy generation repeated.

    python tests/benchmarks/cuda_parity.py FILE.gguf TEXT [--windows N] [--repeats N]

Both evaluate the same windows; NMSE is the squared difference of the logits over their squares. The generation is
compared with the CPU's and repeated: the hash names what every repeat gave. The exit status is 0 when all is equal.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mobiquant.evaluation.scoring import make_windows
from mobiquant.text import clean_text
from runtime import Model
from runtime.budget import Budget

BUDGETS = ("2", "3.0", "4", "6", "8")
_PROMPT = 20  # tokens of the first window before a generation


@dataclass
class Parity:
    """error, power: sums of squares. tokens, tokens_equal: rows of logits, and those equal bit for bit. depths,
    depths_equal: (token, linear) pairs. hashes: of the generations, each with the logits after it."""

    budget: str
    error: float = 0.0
    power: float = 0.0
    tokens: int = 0
    tokens_equal: int = 0
    depths: int = 0
    depths_equal: int = 0
    greedy_equal: bool = False
    hashes: set[str] = field(default_factory=set)

    @property
    def exact(self) -> bool:
        counts = self.tokens_equal == self.tokens and self.depths_equal == self.depths
        return counts and self.greedy_equal and len(self.hashes) == 1


def compare(cpu: Model, gpu: Model, budget: str, windows: list[np.ndarray], greedy: int, repeats: int) -> Parity:
    result = Parity(budget)
    for model in (cpu, gpu):
        model.budget = Budget.parse(budget)
    for tokens in windows:
        logits, depths = [], []
        for model in (cpu, gpu):
            model.reset()
            logits.append(model.eval(tokens, all_logits=True))
            depths.append(model.depths(0, len(tokens)))
        expected, found = logits
        result.error += float(np.square(found.astype(np.float64) - expected).sum())
        result.power += float(np.square(expected.astype(np.float64)).sum())
        result.tokens += len(tokens)
        result.tokens_equal += int((found.view(np.uint32) == expected.view(np.uint32)).all(axis=1).sum())
        result.depths += depths[0].size
        result.depths_equal += int((depths[0] == depths[1]).sum())
    prompt = windows[0][:_PROMPT]
    expected = generate(cpu, prompt, greedy)
    result.hashes = {generate(gpu, prompt, greedy) for _ in range(repeats)}
    result.greedy_equal = result.hashes == {expected}
    return result


def generate(model: Model, prompt: np.ndarray, count: int) -> str:
    """The hash of `count` greedy tokens after `prompt`, their logits and depths, each token in a pass of its own."""
    model.reset()
    logits, digest = model.eval(prompt), hashlib.sha256()
    for _ in range(count):
        token = int(np.argmax(logits))
        logits = model.eval([token])
        digest.update(token.to_bytes(4, "little") + logits.tobytes())
    digest.update(model.depths(0, model.position).tobytes())
    return digest.hexdigest()[:12]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--windows", type=int, default=4, help="windows of text (default 4)")
    parser.add_argument("--length", type=int, default=0, help="tokens of a window (default: the model's context)")
    parser.add_argument("--greedy", type=int, default=64, help="tokens to generate (default 64)")
    parser.add_argument("--repeats", type=int, default=100, help="generations to compare (default 100)")
    parser.add_argument("--budgets", default=",".join(BUDGETS), help="as `mobiquant evaluate` takes them")
    options = parser.parse_args()
    exact = True
    with Model(options.file, device="cpu") as cpu, Model(options.file, device="cuda") as gpu:
        ids = cpu.tokenize(clean_text(options.text.read_text(encoding="utf-8")), add_bos=False)
        length = options.length or cpu.n_ctx
        windows = [window.tokens for window in make_windows(ids, "all", length, cpu.tokenizer.bos)[: options.windows]]
        print(f"{gpu.device_note} against {cpu.kernel}: {len(windows)} windows of up to {length} tokens, "
              f"{options.repeats} generations of {options.greedy} tokens")  # fmt: skip
        print("| budget | NMSE of logits | tokens equal bit for bit | depths equal | generations | as the CPU's |")
        print("| --- | --- | --- | --- | --- | --- |")
        for budget in options.budgets.split(","):
            result = compare(cpu, gpu, budget, windows, options.greedy, options.repeats)
            exact = exact and result.exact
            hashes = f"{len(result.hashes)} different: {', '.join(sorted(result.hashes)[:3])}"
            print(f"| {budget} | {result.error / result.power:.2e} | {result.tokens_equal} of {result.tokens} | "
                  f"{result.depths_equal / result.depths:.4%} of {result.depths} | {hashes} | "
                  f"{'yes' if result.greedy_equal else 'no'} |", flush=True)  # fmt: skip
    return 0 if exact else 1


if __name__ == "__main__":
    sys.exit(main())
