"""Whatever a file claims: one error with a name that says file, key or tensor, what was expected and what was found."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
from malformed import CLASSES, Malformed, Parts, make
from tiny import TINY

from export.errors import ExportError
from export.limits import MAX_VOCAB_SIZE
from export.to_gguf import export_synthetic
from mobiquant.cli import main
from runtime import MobiQuantError, Model
from runtime.native import NativeModel

SEEDS = 8
# verify opens what is left of a cut file, and says so in its own words.
CUT = {"cut_in_tensor_data", "size_beyond_the_file"}
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


@pytest.fixture
def good_path(good: bytes, tmp_path: Path) -> Path:
    target = tmp_path / "good.gguf"
    target.write_bytes(good)
    return target


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


def test_no_file_is_written_that_the_reader_would_refuse() -> None:
    with pytest.raises(ExportError, match="vocab_size: expected 1 to 1048576, found 1048577"):
        replace(TINY, vocab_size=MAX_VOCAB_SIZE + 1)


# mobiquant verify


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.name)
def test_verify_finds_every_class(
    good: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: Malformed
) -> None:
    path = tmp_path / f"{kind.name}.gguf"
    data, pattern = make(good, kind, SEEDS)
    path.write_bytes(data)
    assert main(["verify", str(path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith(f"{path}: ") for line in lines)
    if kind.name not in CUT:
        assert any(re.search(pattern, line) for line in lines), lines


def test_verify_of_a_good_file_says_what_was_read(good_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(good_path)]) == 0
    expected = rf"{good_path}: good: \d+ tensors, checksums equal, tokenizer and chat template work\n"
    assert re.fullmatch(expected, capsys.readouterr().out)


def test_verify_goes_on_after_a_finding(good: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = Parts.of(good)
    parts.checksums_follow = False
    for name in ("blk.0.attn_q.slice1", "blk.1.ffn_down.slice4", "output_norm.weight"):
        parts.tensor(name).data[0] ^= 1
    path = tmp_path / "three.gguf"
    path.write_bytes(parts.build())
    assert main(["verify", str(path)]) == 1
    assert re.findall(r"tensor '([\w.]+)'", capsys.readouterr().out) == [
        "blk.0.attn_q.slice1",
        "blk.1.ffn_down.slice4",
        "output_norm.weight",
    ]


def test_file_without_checksums_opens_and_is_checked_for_its_numbers(
    good: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = Parts.of(good)
    parts.keys.remove(parts.key("mobiquant.checksums"))
    path = tmp_path / "older.gguf"
    path.write_bytes(parts.build())
    assert main(["verify", str(path)]) == 0
    assert "no checksums in it" in capsys.readouterr().out
    parts.tensor("output_norm.weight").data[:4] = b"\0\0\xc0\x7f"
    path.write_bytes(parts.build())
    with pytest.raises(MobiQuantError, match=r"output_norm\.weight.*expected finite numbers, found nan"):
        Model(path, check_tensors=True)


def test_check_tensors_is_a_flag_of_the_commands(
    good: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kind = next(kind for kind in CLASSES if kind.name == "scale_not_a_number")
    path = tmp_path / "nan.gguf"
    path.write_bytes(make(good, kind, 0)[0])
    assert main(["run", "-m", str(path), "-p", "a", "-n", "1", "--check-tensors"]) == 1
    assert "expected finite numbers" in capsys.readouterr().err
    text = tmp_path / "text.txt"
    text.write_text("some text " * 20)
    assert main(["perplexity", "-m", str(path), "-f", str(text), "--check-tensors"]) == 1
    assert "expected finite numbers" in capsys.readouterr().err


def test_checksums_are_the_crc32_of_tensors_and_metadata(good: bytes) -> None:
    parts = Parts.of(good)
    stored = np.frombuffer(parts.key("mobiquant.checksums").value[12:], np.uint32)
    metadata = bytearray(parts.metadata())
    end = metadata.index(b"mobiquant.checksums") + len("mobiquant.checksums") + 16 + stored.nbytes
    metadata[end - 4 : end] = bytes(4)
    assert stored.tolist() == [*(crc32(tensor.data) for tensor in parts.tensors), crc32(metadata)]
