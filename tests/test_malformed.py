"""Whatever a file claims: one error with a name that says file, key or tensor, what was expected and what was found."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from malformed import CLASSES, Malformed, Parts, make
from tiny import TINY

from export.to_gguf import export_synthetic
from runtime import MobiQuantError, Model
from runtime.native import NativeModel

SEEDS = 8
SHAPE = replace(TINY, static_order=tuple(range(14)) * 3)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    target = tmp_path_factory.mktemp("good") / "good.gguf"
    export_synthetic(SHAPE, target, "good")
    return target.read_bytes()


def use(path: Path, found: str) -> None:
    """Do what must find the fault."""
    if found == "open":
        NativeModel(path, allow_partial=False, mmap=True).close()
        return
    with Model(path, check_tensors=found == "check", n_ctx=8, n_threads=1) as model:
        if found == "tokenizer":
            model.tokenize("text")
        elif found == "template":
            model.chat.encode([{"role": "user", "content": "text"}])


def by_python(kind: Malformed) -> bool:
    return kind.status == "ValueError"


def test_an_unchanged_file_is_put_together_again_as_it_was(good: bytes) -> None:
    assert Parts.of(good).build() == good


def test_there_are_enough_classes_and_none_twice() -> None:
    names = Counter(kind.name for kind in CLASSES)
    assert len(names) >= 60
    assert set(names.values()) == {1}


@pytest.mark.parametrize("kind", [kind for kind in CLASSES if kind.found != "verify"], ids=lambda kind: kind.name)
def test_every_class_has_its_own_error(good: bytes, tmp_path: Path, kind: Malformed) -> None:
    for seed in range(SEEDS):
        data, pattern = make(good, kind, seed)
        path = tmp_path / f"{kind.name}.{seed}.gguf"
        path.write_bytes(data)
        with pytest.raises(ValueError if by_python(kind) else MobiQuantError, match=pattern) as caught:
            use(path, kind.found)
        if not by_python(kind):
            assert caught.value.status == kind.status, caught.value
        assert kind.found == "template" or str(path) in str(caught.value)
        path.unlink()
