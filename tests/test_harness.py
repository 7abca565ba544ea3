"""lm-evaluation-harness over this project's models: its three kinds of requests, local tasks, its own command line."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tiny import TINY

pytest.importorskip("lm_eval")

from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager

from export.to_gguf import export_synthetic
from mobiquant.cli import main
from mobiquant.evaluation.harness import MobiQuantLM
from mobiquant.evaluation.scoring import log_softmax
from mobiquant.evaluation.tasks import LOCAL_TASKS, load_tasks
from runtime import Model

ROOT = Path(__file__).parent.parent
CONTEXT = TINY.context_length
QUESTION = {"query": "Question: is it\n", "choices": ["yes", "no", "who knows"], "gold": 1}
CHOOSE = {"context_options": ["The cat met the dog so the cat", "The cat met the dog so the dog"]} | {
    "continuation": "ran.",
    "gold": 0,
}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("harness") / "random.gguf"
    export_synthetic(TINY, path, "random")
    return path


@pytest.fixture(scope="module")
def lm(file: Path) -> MobiQuantLM:
    return MobiQuantLM(file, threads=1)


@pytest.fixture(scope="module")
def tasks_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every local task with two documents."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, task in LOCAL_TASKS.items():
        lines = [QUESTION, QUESTION | {"gold": 2}] if task.prompt else [CHOOSE, CHOOSE | {"gold": 1}]
        suffix = "_first2" if name == "hellaswag" else ""
        (folder / f"{name}{suffix}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def model(file: Path) -> Iterator[Model]:
    with Model(file, n_threads=1) as opened:
        yield opened


def ask(lm: MobiQuantLM, method: str, *arguments: tuple) -> list:
    return getattr(lm, method)([SimpleNamespace(args=request) for request in arguments], disable_tqdm=True)


def log_prob(model: Model, tokens: list[int], first: int) -> float:
    """Log probability of tokens[first:] after those before, from all logits of one evaluation."""
    model.reset()
    log_probs = log_softmax(model.eval(tokens[:-1], all_logits=True))
    return sum(log_probs[position - 1, tokens[position]] for position in range(first, len(tokens)))


def test_is_known_to_the_harness_and_takes_its_model_arguments(file: Path) -> None:
    assert get_model("mobiquant") is MobiQuantLM
    arguments = f"path={file},bits=3.0,threads=1,max_length=32"
    opened = MobiQuantLM.create_from_arg_string(arguments, {"batch_size": 1, "device": None})
    assert opened.max_length == 32
    with pytest.raises(ValueError, match="budget '3': bits: expected one of"):
        MobiQuantLM.create_from_arg_string(f"path={file},bits=3")
    with pytest.raises(ValueError, match="model_args: expected path="):
        MobiQuantLM.create_from_arg_string("bits=3.0")


def test_loglikelihood_is_the_sum_of_log_probabilities(lm: MobiQuantLM, model: Model) -> None:
    pairs = [("once upon", " a time"), ("once upon", " it"), ("once more ", "x"), ("", "alone")]
    for (context, continuation), (total, _) in zip(pairs, ask(lm, "loglikelihood", *pairs), strict=True):
        tokens = model.tokenize(context + continuation)
        assert tokens[0] == model.tokenizer.bos
        # Spaces at the end of a context belong to the continuation.
        first = len(model.tokenize(context.rstrip()))
        assert total == pytest.approx(log_prob(model, tokens, first), rel=1e-12)


def test_greedy_continuations_are_recognised(lm: MobiQuantLM) -> None:
    (text,) = ask(lm, "generate_until", ("once", {"max_gen_toks": 3, "until": []}))
    (_, same), (_, other) = ask(lm, "loglikelihood", ("once", text), ("once", "zq"))
    assert (same, other) == (True, False)


def test_answers_do_not_depend_on_the_requests_before(file: Path) -> None:
    pairs = [("a question", f" {answer}") for answer in ("one", "two", "or three")] + [("another", " one")]
    together = ask(MobiQuantLM(file, bits=3.0, threads=1), "loglikelihood", *pairs)
    alone = [ask(MobiQuantLM(file, bits=3.0, threads=1), "loglikelihood", pair)[0] for pair in reversed(pairs)]
    assert together == alone[::-1]


def test_choices_of_a_question_share_its_cache(lm: MobiQuantLM) -> None:
    native = lm._backend.model
    before = native.stats.tokens
    ask(lm, "loglikelihood", *(("q" * 60, answer) for answer in ("yes", "no", "up")))
    assert native.stats.tokens - before < 61 + 3 * 4


def test_long_contexts_lose_their_beginning(lm: MobiQuantLM, model: Model) -> None:
    context = "abcdefgh" * 20
    ((total, _),) = ask(lm, "loglikelihood", (context, " end"))
    tokens = model.tokenize(context + " end")[-(CONTEXT + 1) :]
    assert total == pytest.approx(log_prob(model, tokens, len(tokens) - 4), rel=1e-12)
    with pytest.raises(ValueError, match=f"continuation: expected at most {CONTEXT} tokens, found 160"):
        ask(lm, "loglikelihood", ("x", context))


def test_rolling_predicts_every_token_once(lm: MobiQuantLM, model: Model) -> None:
    short, long = "a short text", "0123456789" * 13
    found = ask(lm, "loglikelihood_rolling", (short,), (long,))
    tokens, bos = model.tokenize(long, add_bos=False), model.tokenizer.bos
    whole = log_prob(model, [bos, *model.tokenize(short, add_bos=False)], 1)
    # The second window is as long as the context allows and predicts what the first left.
    parts = log_prob(model, [bos, *tokens[:CONTEXT]], 1)
    parts += log_prob(model, tokens[-(CONTEXT + 1) :], 2 * CONTEXT - len(tokens) + 1)
    assert found == pytest.approx([whole, parts], rel=1e-12)


def test_generation_ends_at_a_stop_string_or_the_limit(lm: MobiQuantLM) -> None:
    (free,) = ask(lm, "generate_until", ("once", {"max_gen_toks": 30, "until": []}))
    stop = free[10:12]
    (stopped,) = ask(lm, "generate_until", ("once", {"max_gen_toks": 30, "until": ["\x00never", stop]}))
    assert stopped == free[: free.index(stop)]
    (short,) = ask(lm, "generate_until", ("once", {"max_gen_toks": 3, "until": []}))
    assert len(lm.tok_encode(short, add_special_tokens=False)) <= 3 and free.startswith(short)
    sampled = {"max_gen_toks": 8, "do_sample": True, "temperature": 2.0, "until": []}
    first, second = (ask(lm, "generate_until", ("once", sampled)) for _ in range(2))
    assert first == second != [free[: len(first[0])]]
    (long,) = ask(lm, "generate_until", ("y" * 200, {"max_gen_toks": 10, "until": []}))
    assert long


def test_folders_answer_as_transformers_does(tiny_model: Path) -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    lm = MobiQuantLM(tiny_model)
    pairs = [("kul dem", " lon"), ("kul dem", " ia ned"), ("kul", " dem")]
    exact = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    for (context, continuation), (total, _) in zip(pairs, ask(lm, "loglikelihood", *pairs), strict=True):
        tokens, first = lm.tok_encode(context + continuation), len(lm.tok_encode(context))
        with torch.no_grad():
            log_probs = exact(torch.tensor([tokens])).logits[0].log_softmax(-1)
        expected = sum(log_probs[i - 1, tokens[i]].item() for i in range(first, len(tokens)))
        assert total == pytest.approx(expected, abs=1e-3)


# Tasks


def test_local_tasks_use_the_prompts_of_the_harness(tasks_dir: Path) -> None:
    tasks = load_tasks(list(LOCAL_TASKS), tasks_dir)
    for name in ("arc_easy", "arc_challenge", "boolq", "piqa"):
        document = tasks[name].task_docs[0]
        assert tasks[name].doc_to_text(document).endswith("\nAnswer:")
        assert (tasks[name].doc_to_choice(document), tasks[name].doc_to_target(document)) == (QUESTION["choices"], 1)
    assert tasks["piqa"].doc_to_text(tasks["piqa"].task_docs[0]) == "Question: is it\nAnswer:"
    document = tasks["winogrande"].task_docs[1]
    assert tasks["winogrande"].doc_to_text(document) == 1
    assert tasks["winogrande"].doc_to_target(document) == "ran."


def test_evaluate_reports_tasks_at_every_budget(
    capfd: pytest.CaptureFixture[str], lm: MobiQuantLM, file: Path, tasks_dir: Path
) -> None:
    options = ("--tasks", "arc_easy,hellaswag,winogrande", "--tasks-dir", tasks_dir, "--budgets", "2,8")
    status = main([str(option) for option in ("evaluate", file, *options, "-o", "json")])
    content = json.loads(capfd.readouterr().out)
    rows = {(row["task"], row["budget"]): row for row in content["tasks"]}
    assert status == 0 and content["texts"] == []
    assert set(rows) == {(t, b) for t in ("arc_easy", "hellaswag", "winogrande") for b in ("2 uniform", "8 uniform")}
    assert all(row["documents"] == 2 and row["same_answers"] is None for row in rows.values())

    prompt = f"{QUESTION['query']}\nAnswer:"
    totals = [total for total, _ in ask(lm, "loglikelihood", *((prompt, f" {c}") for c in QUESTION["choices"]))]
    per_character = [total / len(choice) for total, choice in zip(totals, QUESTION["choices"], strict=True)]
    row = rows["arc_easy", "8 uniform"]
    # The two documents differ in the right answer only: 1 and 2.
    assert row["acc"] == (np.argmax(totals) in (1, 2)) / 2
    assert row["acc_norm"] == (np.argmax(per_character) in (1, 2)) / 2
    # The same sentence with either choice right.
    assert rows["winogrande", "8 uniform"]["acc"] == 0.5 and rows["winogrande", "8 uniform"]["acc_norm"] is None


def test_answers_are_compared_with_the_reference(
    capfd: pytest.CaptureFixture[str], tiny_model: Path, tasks_dir: Path
) -> None:
    options = ("--tasks", "piqa", "--tasks-dir", tasks_dir, "--limit", 1, "--reference", tiny_model)
    assert main([str(option) for option in ("evaluate", tiny_model, *options)]) == 0
    out = capfd.readouterr().out
    assert out.count("| full precision |") == 3 and "reference's answers, %" in out
    assert out.rstrip().endswith("| full precision | 100.0 |")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "expected one document a line, found nothing"),
        ("{\n", "line 1: expected query, choices and gold"),
        ('{"query": "a", "choices": ["b"]}\n', "line 1: expected query, choices and gold: KeyError"),
        ('{"query": "a", "choices": ["b"], "gold": 1}\n', "line 1: expected query, choices and gold: IndexError"),
        ('{"query": "a", "choices": ["b"], "gold": -1}\n', "line 1: expected query, choices and gold, found"),
    ],
)
def test_malformed_task_files_are_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "boolq.jsonl").write_text(content)
    with pytest.raises(ValueError, match=rf"boolq\.jsonl: {message}"):
        load_tasks(["boolq"], tmp_path)


def test_the_command_line_of_the_harness_runs_a_file(file: Path, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text((json.dumps(QUESTION) + "\n") * 2)
    (tmp_path / "mine.yaml").write_text(
        f"task: mine\ndataset_path: json\ndataset_kwargs: {{data_files: {{validation: {tmp_path}/data.jsonl}}}}\n"
        'validation_split: validation\noutput_type: multiple_choice\ndoc_to_text: "{{query}}"\n'
        "doc_to_choice: choices\ndoc_to_target: gold\nmetric_list: [{metric: acc}]\n"
    )
    options = ("--model", "mobiquant", "--model_args", f"path={file},bits=3.0", "--tasks", "mine")
    done = subprocess.run(
        [sys.executable, "-m", "mobiquant.evaluation.harness", *options, "--include_path", tmp_path],
        cwd=ROOT,
        env=os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"\|mine *\|.*\|acc *\|", done.stdout), done.stdout


def test_tasks_of_a_file_need_no_torch(file: Path, tasks_dir: Path) -> None:
    options = ["evaluate", str(file), "--tasks", "winogrande", "--tasks-dir", str(tasks_dir), "--budgets", "3.0"]
    code = f"import sys; from mobiquant.cli import main; main({options!r}); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "| 3.0 routed | 50.0 ± " in done.stdout


def test_unknown_tasks_are_named(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, file: Path, tasks_dir: Path, tmp_path: Path
) -> None:
    # Reading the harness's thousands of tasks takes seconds; none is as good as many here.
    empty = partial(TaskManager, include_path=tmp_path, include_defaults=False)
    monkeypatch.setattr("mobiquant.evaluation.tasks.TaskManager", empty)
    assert main(["evaluate", str(file), "--tasks", "piqa,no_such", "--tasks-dir", str(tasks_dir)]) == 1
    last = capfd.readouterr().err.splitlines()[-1]
    assert last == f"error: --tasks: no_such: neither in {tasks_dir} nor known to lm_eval; see `lm_eval ls tasks`"
