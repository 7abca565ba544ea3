"""What an evaluation found, as JSON and as markdown tables.

JSON: `model`, `kind` (gguf, checkpoint, full precision), `reference`, and two lists. `texts`: file, rule, context,
windows, interrupted, full_precision {ppl, tokens} or null, rows {budget, kind, bits, bits_per_weight, ppl, kl, top1,
tokens}, and baselines in the form of baselines.py. `tasks`: {task, budget, documents, acc, acc_stderr, acc_norm,
acc_norm_stderr, same_answers}. kl is in nats per token, top1, acc and same_answers are shares; null is "not measured".
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mobiquant.evaluation.baselines import Baseline
from mobiquant.evaluation.evaluate import Row, TextResult
from runtime.files import write_atomically


@dataclass(frozen=True)
class TextReport:
    """The result on one text. file: its name, without folders; context: tokens of a window."""

    file: str
    rule: str
    context: int
    result: TextResult
    baselines: Sequence[Baseline] = ()


@dataclass(frozen=True)
class TaskRow:
    """One task at one budget. acc_norm: choices compared by log probability per character; None when the task has none.

    same_answers: share of documents with the reference's answer, None without reference.
    """

    task: str
    budget: str
    documents: int
    acc: float | None = None
    acc_stderr: float | None = None
    acc_norm: float | None = None
    acc_norm_stderr: float | None = None
    same_answers: float | None = None


@dataclass
class Report:
    """One evaluation, filled as it goes."""

    model: str
    kind: str = ""  # known once the model is open
    reference: str | None = None
    texts: list[TextReport] = field(default_factory=list)
    tasks: list[TaskRow] = field(default_factory=list)

    def to_json(self) -> str:
        content = {
            "model": self.model,
            "kind": self.kind,
            "reference": self.reference,
            "texts": [_text_to_dict(text) for text in self.texts],
            "tasks": [asdict(row) for row in self.tasks],
        }
        return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)

    def to_markdown(self) -> str:
        return "\n\n".join([*map(_text_table, self.texts), *_task_tables(self.tasks)])


def write_report(path: Path, report: Report) -> None:
    """Write the JSON, all of it or nothing. Raises OSError."""
    write_atomically(path, f"{report.to_json()}\n".encode())


def _text_to_dict(text: TextReport) -> dict[str, Any]:
    result = text.result
    return {
        "file": text.file,
        "rule": text.rule,
        "context": text.context,
        "windows": result.windows,
        "interrupted": result.interrupted,
        "full_precision": None if result.full is None else {"ppl": result.full.ppl, "tokens": result.full.tokens},
        "rows": [_row_to_dict(row) for row in result.rows],
        "baselines": [asdict(baseline) for baseline in text.baselines],
    }


def _row_to_dict(row: Row) -> dict[str, Any]:
    return {
        "budget": row.precision.name,
        "kind": row.precision.kind,
        "bits": row.bits,
        "bits_per_weight": row.bits_per_weight,
        "ppl": row.score.ppl,
        "kl": row.score.kld,
        "top1": row.score.top1,
        "tokens": row.score.tokens,
    }


def _text_table(text: TextReport) -> str:
    result = text.result
    tokens = result.rows[0].score.tokens
    scored = f"{result.windows} of {result.planned}" if result.interrupted else f"{result.windows}"
    lines = [f"{text.file}: {tokens:,} tokens scored by rule {text.rule}, {scored} windows of {text.context}", ""]
    lines += _table_head("precision", "bits read", "bits per weight", "perplexity", "KL (nats)", "top-1")
    if result.full is not None:
        lines.append(_line("full precision", "", "", f"{result.full.ppl:.2f}", "", ""))
    for row in result.rows:
        figures = (row.bits_per_weight, row.score.ppl, row.score.kld, row.score.top1)
        lines.append(_line(row.precision.label, f"{row.bits:.2f}", *_figures(*figures)))
    for baseline in text.baselines:
        figures = (baseline.bits_per_weight, baseline.ppl, baseline.kl, baseline.top1)
        lines.append(_line(baseline.name, "", *_figures(*figures)))
    return "\n".join(lines)


def _figures(bits_per_weight: float, ppl: float | None, kl: float | None, top1: float | None) -> tuple[str, ...]:
    return (
        f"{bits_per_weight:.2f}",
        "" if ppl is None else f"{ppl:.2f}",
        "" if kl is None else f"{kl:.5f}",
        _percent(top1),
    )


def _task_tables(rows: Sequence[TaskRow]) -> list[str]:
    """A table for each figure, with a line for each budget and a column for each task that has it."""
    titles = {"acc": "accuracy, %", "acc_norm": "accuracy per character, %", "same_answers": "reference's answers, %"}
    measured = {figure: [row for row in rows if getattr(row, figure) is not None] for figure in titles}
    return [_task_table(title, measured[figure], figure) for figure, title in titles.items() if measured[figure]]


def _task_table(title: str, rows: Sequence[TaskRow], figure: str) -> str:
    tasks, budgets = _unique(row.task for row in rows), _unique(row.budget for row in rows)
    found = {(row.task, row.budget): row for row in rows}
    lines = _table_head(title, *tasks)
    for budget in budgets:
        cells = (_task_cell(found.get((task, budget)), figure) for task in tasks)
        lines.append(_line(budget, *cells))
    return "\n".join(lines)


def _task_cell(row: TaskRow | None, figure: str) -> str:
    value = getattr(row, figure, None)
    if value is None:
        return ""
    error = getattr(row, f"{figure}_stderr", None)
    return f"{100 * value:.1f}" if error is None else f"{100 * value:.1f} ± {100 * error:.1f}"


def _table_head(*names: str) -> list[str]:
    return [_line(*names), _line("---", *["---:"] * (len(names) - 1))]


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"


def _unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))
