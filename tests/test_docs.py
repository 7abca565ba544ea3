"""The documentation is true: its Python examples run, and the features it claims have the tests that it names."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import TINY

from export.to_gguf import export_synthetic

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def examples(page: Path) -> list[str]:
    """The Python blocks of a page, in order."""
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the file that the examples open."""
    export_synthetic(replace(TINY, context_length=512), tmp_path / "model.gguf", "random")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_python_examples_run_one_after_another(folder: Path) -> None:
    *runtime, checkpoint = examples(DOCS / "python.md")
    assert len(runtime) > 8 and "mobiquant.transformers" in checkpoint
    namespace: dict[str, object] = {}
    for example in runtime:
        exec(compile(example, "docs/python.md", "exec"), namespace)


def test_transformers_example_runs(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    monkeypatch.chdir(tmp_path)
    exec(compile(examples(DOCS / "python.md")[-1], "docs/python.md", "exec"), {})


def test_readme_example_runs(folder: Path) -> None:
    (folder / "model.gguf").rename(folder / "llama.gguf")
    for example in examples(ROOT / "README.md"):
        exec(compile(example, "README.md", "exec"), {})


@pytest.fixture
def server(folder: Path) -> Iterator[int]:
    pytest.importorskip("uvicorn", reason="needs mobiquant[server]")
    command = [sys.executable, "-m", "mobiquant", "serve", "-m", str(folder / "model.gguf"), "--port", "0"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    yield int(process.stderr.readline().rpartition(":")[2].split("/")[0])
    process.terminate()
    process.wait(timeout=20)


def test_server_example_runs(server: int) -> None:
    pytest.importorskip("openai", reason="needs mobiquant[test]")
    (example,) = examples(DOCS / "server.md")
    assert "127.0.0.1:8080" in example
    exec(compile(example.replace("8080", str(server)), "docs/server.md", "exec"), {})


def test_every_feature_claimed_names_a_test_that_exists() -> None:
    rows = re.findall(r"^\|([^|]+)\|([^|]+)\|.*\|([^|]+)\|$", (DOCS / "features.md").read_text(), re.MULTILINE)
    claimed = [(feature.strip(), test.strip()) for feature, ours, test in rows if ours.strip() == "yes"]
    assert len(claimed) > 30
    defined: dict[str, set[str]] = {}
    for file in (ROOT / "tests").glob("test_*.py"):
        functions = (node.name for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef))
        defined[file.stem] = {name for name in functions if name.startswith("test_")}
    for feature, test in claimed:
        match = re.fullmatch(r"`(test_\w+)::(test_\w+)`", test)
        assert match, f"{feature}: expected `file::test`, found {test}"
        assert match[2] in defined.get(match[1], ()), f"{feature}: no such test: {test}"


def test_every_security_promise_names_tests_that_exist() -> None:
    rows = re.findall(r"^\| (?!promise|---)(.+?) \| (.+) \|$", (ROOT / "SECURITY.md").read_text(), re.MULTILINE)
    assert len(rows) > 12
    for promise, tests in rows:
        files = re.findall(r"`(?:python -m )?(tests[/.][\w./]+)", tests)
        assert files, f"{promise}: expected a test, found none"
        for file in files:
            path = file if "/" in file else file.replace(".", "/") + ".py"
            assert (ROOT / path).exists(), f"{promise}: no such file: {path}"
