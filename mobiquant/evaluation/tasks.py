"""Zero-shot tasks through lm-evaluation-harness: from local JSON lines, or by the harness's own names from the hub.

A local file is TASK.jsonl or TASK_*.jsonl. Each line holds `query`, `choices` and `gold`, the right choice's index; for
winogrande `context_options`, `continuation` and `gold`. Prompts are the harness's own for these tasks, and it
computes acc and acc_norm, so the figures are those of its tasks as far as the lines are the same.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager

from mobiquant.evaluation.backends import Backend
from mobiquant.evaluation.harness import MobiQuantLM
from mobiquant.evaluation.report import TaskRow
from runtime.budget import Budget

_FILTER = "none"  # the harness's name for answers taken as they are


@dataclass(frozen=True)
class LocalTask:
    """How a line becomes a question. prompt: of a line with `query`; None: the choices are contexts of one
    continuation. normalized: whether the harness reports acc_norm for the task."""

    prompt: Callable[[str], str] | None
    normalized: bool = True


LOCAL_TASKS = {
    "arc_easy": LocalTask(lambda query: f"{query}\nAnswer:"),
    "arc_challenge": LocalTask(lambda query: f"{query}\nAnswer:"),
    "boolq": LocalTask(lambda query: f"{query.removeprefix('Passage: ')}\nAnswer:", normalized=False),
    "hellaswag": LocalTask(lambda query: query),
    "piqa": LocalTask(lambda query: f"{query.rstrip()}\nAnswer:"),
    "winogrande": LocalTask(None, normalized=False),
}


@dataclass(frozen=True)
class Answers:
    """What a model answered in one task. chosen: index of the most likely choice of each document, int [documents]."""

    acc: float | None
    acc_stderr: float | None
    acc_norm: float | None
    acc_norm_stderr: float | None
    chosen: np.ndarray


def load_tasks(names: list[str], folder: Path | None) -> dict[str, Task]:
    """The tasks by name, each from `folder` where it has the task's file, else from the hub.

    Raises ValueError for a task that nobody knows, that is no multiple choice, or whose data cannot be had.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    files = {name: file for name in names if folder and (file := _task_file(name, folder))}
    remote = [name for name in names if name not in files]
    tasks = _load_remote(remote, folder) if remote else {}
    tasks |= {name: _local_task(name, file) for name, file in files.items()}
    return {name: tasks[name] for name in names}


def answer(backend: Backend, budget: Budget | None, tasks: Mapping[str, Task], limit: int | None) -> dict[str, Answers]:
    """Let a model answer the first `limit` documents (all when None) of every task."""
    model = MobiQuantLM(backend=backend)
    backend.set_budget(budget)
    found = evaluate(lm=model, task_dict={"tasks": dict(tasks)}, limit=limit)
    return {name: _answers(found["results"][name], found["samples"][name]) for name in tasks}


def task_row(task: str, budget: str, answers: Answers, reference: Answers | None) -> TaskRow:
    """The figures of a report; `reference`: full precision's answers to the same documents."""
    same = None if reference is None else float((answers.chosen == reference.chosen).mean())
    return TaskRow(
        task,
        budget,
        len(answers.chosen),
        answers.acc,
        answers.acc_stderr,
        answers.acc_norm,
        answers.acc_norm_stderr,
        same,
    )


def _answers(figures: Mapping[str, Any], samples: list[dict[str, Any]]) -> Answers:
    ordered = sorted(samples, key=lambda sample: sample["doc_id"])
    chosen = [np.argmax([logprob for logprob, _ in sample["filtered_resps"]]) for sample in ordered]
    values = (figures.get(f"{metric},{_FILTER}") for metric in ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr"))
    # The harness writes "N/A" where an error cannot be estimated, as from one document.
    return Answers(*(value if isinstance(value, float) else None for value in values), np.array(chosen))


def _task_file(name: str, folder: Path) -> Path | None:
    if name not in LOCAL_TASKS:
        return None
    candidates = [folder / f"{name}.jsonl", *sorted(folder.glob(f"{name}_*.jsonl"))]
    return next((file for file in candidates if file.is_file()), None)


def _local_task(name: str, file: Path) -> Task:
    task = LOCAL_TASKS[name]
    documents = _read_documents(file, task)
    metrics = ("acc", "acc_norm") if task.normalized else ("acc",)
    config = {
        "task": name,
        "custom_dataset": lambda **_: {"validation": Dataset.from_list(documents)},
        "validation_split": "validation",
        "output_type": "multiple_choice",
        "num_fewshot": 0,
        "doc_to_text": _prompt_of(task.prompt) if task.prompt else _gold,
        "doc_to_choice": "choices" if task.prompt else "context_options",
        "doc_to_target": _gold if task.prompt else "continuation",
        "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in metrics],
    }
    return ConfigurableTask(config=config)


def _prompt_of(prompt: Callable[[str], str]) -> Callable[[Mapping[str, Any]], str]:
    return lambda document: prompt(document["query"])


def _gold(document: Mapping[str, Any]) -> int:
    return document["gold"]


def _read_documents(file: Path, task: LocalTask) -> list[dict[str, Any]]:
    text, choices = ("query", "choices") if task.prompt else ("continuation", "context_options")
    documents = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            document = json.loads(line)
            valid = isinstance(document[text], str) and document[choices][document["gold"]] and document["gold"] >= 0
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(f"{file}: line {number}: expected {text}, {choices} and gold: {error!r}") from error
        if not valid:
            raise ValueError(f"{file}: line {number}: expected {text}, {choices} and gold, found {line:.80}")
        documents.append({text: document[text], choices: document[choices], "gold": document["gold"]})
    if not documents:
        raise ValueError(f"{file}: expected one document a line, found nothing")
    return documents


def _load_remote(names: list[str], folder: Path | None) -> dict[str, Task]:
    manager = TaskManager()
    where = "" if folder is None else f"neither in {folder} nor "
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise ValueError(f"--tasks: {', '.join(unknown)}: {where or 'not '}known to lm_eval; see `lm_eval ls tasks`")
    try:
        tasks = manager.load(names)["tasks"]
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"--tasks {','.join(names)}: the data cannot be had from the hub: {reason}") from error
    for name in names:
        if name not in tasks or tasks[name].OUTPUT_TYPE != "multiple_choice":
            raise ValueError(f"--tasks {name}: expected one multiple-choice task, found another kind or a group")
    return tasks
