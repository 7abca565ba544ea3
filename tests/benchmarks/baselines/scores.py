"""How far a quantised model is from full precision on the texts, and the entries that this makes.

The same sums as mobiquant.evaluation.scoring's, computed where the model is: on a GPU a hundred times faster.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from mobiquant.evaluation.scoring import Score, Window

from ..dense import DenseModel, token_divergence


@dataclass(frozen=True)
class Entry:
    """One point of the comparison. bits_per_weight: of the block linears, scales and offsets counted; kl: mean nats per
    token from full precision; ppl: perplexity; top1: share of tokens with full precision's most likely successor; text:
    file name; rule: of mobiquant.evaluation.scoring."""

    name: str
    bits_per_weight: float
    kl: float
    ppl: float
    top1: float
    text: str
    rule: str


class ScoredText:
    """The windows of one text, and full precision's hidden states over them, from which its logits are cheap."""

    def __init__(self, name: str, rule: str, windows: list[Window], model: DenseModel):
        """model: still with its own weights."""
        self.name, self.rule = name, rule
        self._windows = windows
        progress = tqdm(windows, desc=f"full precision, {name}", unit="window", leave=False)
        self._exact = [_scored_hidden(model, window).cpu() for window in progress]

    def score(self, model: DenseModel, label: str) -> Score:
        """The model as it is now against full precision."""
        total = Score()
        progress = tqdm(self._windows, desc=f"{label}, {self.name}", unit="window", leave=False)
        for window, exact in zip(progress, self._exact, strict=True):
            expected, found = model.log_probs(exact), model.log_probs(_scored_hidden(model, window))
            add_window(total, found, torch.from_numpy(window.targets).to(found.device), expected)
        return total

    def entry(self, model: DenseModel, label: str, bits_per_weight: float) -> Entry:
        score = self.score(model, label)
        assert score.kld is not None and score.top1 is not None
        return Entry(label, bits_per_weight, score.kld, score.ppl, score.top1, self.name, self.rule)


def add_window(score: Score, found: Tensor, targets: Tensor, expected: Tensor) -> None:
    """Count n tokens. found, expected: log probabilities float64 [n, vocab]; targets: int [n]."""
    score.nll -= found.gather(1, targets.long()[:, None]).sum().item()
    score.tokens += len(targets)
    score.reference_tokens += len(targets)
    score.kld_sum += token_divergence(expected, found).sum().item()
    score.top1_sum += int((found.argmax(1) == expected.argmax(1)).sum())


def _scored_hidden(model: DenseModel, window: Window) -> Tensor:
    return model.hidden(window.tokens)[window.first_scored - 1 : -1]


def table(entries: list[Entry]) -> str:
    """A markdown table, one line a model, perplexity, KL and top-1 for every text."""
    texts = list(dict.fromkeys((entry.text, entry.rule) for entry in entries))
    found = {(entry.name, entry.text, entry.rule): entry for entry in entries}
    heads = [f"{part}, {text} ({rule})" for text, rule in texts for part in ("ppl", "KL", "top-1")]
    lines = ["| " + " | ".join(("weights", "bits per weight", *heads)) + " |", "|" + " --- |" * (2 + len(heads))]
    for name, bits in dict.fromkeys((entry.name, entry.bits_per_weight) for entry in entries):
        cells = [name, f"{bits:.2f}"]
        for text, rule in texts:
            entry = found[name, text, rule]
            cells += [f"{entry.ppl:.2f}", f"{entry.kl:.4g}", f"{100 * entry.top1:.1f} %"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
