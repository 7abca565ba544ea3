"""The commands as a user meets them: output, figures, and every error as one line with status 1."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
from tiny import TINY

from export.to_gguf import export_synthetic
from mobiquant.cli import main

ROOT = Path(__file__).parent.parent
# A context so long that a generation does not end by itself before Ctrl-C.
SHAPE = replace(TINY, context_length=100_000, tied=False)
FIGURES = re.compile(
    r"prompt \d+ tokens, [\d.]+ tok/s; generation \d+ tokens, [\d.]+ tok/s; "
    r"average bits (?P<bits>[\d.]+); (?P<megabytes>[\d.]+) MB read per token\n"
)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("cli") / "random.gguf"
    export_synthetic(SHAPE, target, "random")
    return target


def run(capfd: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Status, stdout and stderr of one command."""
    try:
        status = main([str(argument) for argument in arguments])
    except SystemExit as exit_:  # argparse leaves so
        status = int(exit_.code or 0)
    out, err = capfd.readouterr()
    return status, out, err


def expect_error(capfd: pytest.CaptureFixture[str], message: str, *arguments: object) -> None:
    status, out, err = run(capfd, *arguments)
    assert (status, out) == (1, "")
    assert err.count("\n") == 1
    assert re.match(f"error: .*{message}", err), err


def test_run_streams_text_and_ends_with_figures(capfd: pytest.CaptureFixture[str], path: Path) -> None:
    status, out, err = run(capfd, "run", "-m", path, "-p", "hi", "-n", 20, "--temp", 1.5, "--seed", 2, "--avg-bits", 3)
    assert status == 0 and out.strip()
    figures = FIGURES.fullmatch(err)
    assert figures and 2 <= float(figures["bits"]) <= 4
    assert run(capfd, "run", "-m", path, "-p", "hi", "-n", 20, "--temp", 1.5, "--seed", 2, "--avg-bits", 3)[1] == out


def test_fewer_bits_read_fewer_bytes(capfd: pytest.CaptureFixture[str], path: Path) -> None:
    def megabytes(bits: int) -> float:
        figures = FIGURES.fullmatch(run(capfd, "run", "-m", path, "-p", "hi", "-n", 4, "--bits", bits)[2])
        assert figures and float(figures["bits"]) == bits
        return float(figures["megabytes"])

    assert megabytes(2) < megabytes(4) < megabytes(6) < megabytes(8)


def test_run_reads_the_prompt_from_a_file(capfd: pytest.CaptureFixture[str], path: Path, tmp_path: Path) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_bytes("grüße".encode())
    options = ("-n", 10, "--temp", 0)
    from_file = run(capfd, "run", "-m", path, "-f", prompt, *options)
    assert from_file[:2] == run(capfd, "run", "-m", path, "-p", "grüße", *options)[:2]


def test_control_c_ends_with_the_figures(path: Path) -> None:
    command = [sys.executable, "-m", "mobiquant", "run", "-m", str(path), "-p", "hi", "-n", "0", "--temp", "2"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.read(1)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert FIGURES.fullmatch(err), err


def test_info_says_what_is_in_the_file_and_what_runs_it(capfd: pytest.CaptureFixture[str], path: Path) -> None:
    status, out, _ = run(capfd, "info", path)
    assert status == 0
    rows = dict(re.split(r"  +", line, maxsplit=1) for line in out.splitlines())
    weights = 2 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 128 * 256)
    assert rows["parameters"].startswith(f"{weights + 2 * 272 * 128 + 5 * 128:,}, of which {weights:,}")
    assert re.match(r"2\.\d+ at 2 bits, 4\.\d+ at 4 bits, 6\.\d+ at 6 bits, 8\.\d+ at 8 bits", rows["bits per weight"])
    assert rows["tokenizer"] == "257 tokens, begin 256 (added to prompts), end none, no chat template"
    assert rows["kernels"].count("active") == 1 and "scalar" in rows["kernels"]


def test_environment_chooses_the_kernels(
    capfd: pytest.CaptureFixture[str], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOBIQUANT_KERNEL", "scalar")
    assert "scalar (active, asked for by MOBIQUANT_KERNEL)" in run(capfd, "info", path)[1]
    monkeypatch.setenv("MOBIQUANT_KERNEL", "abacus")
    expect_error(capfd, "kernel: 'abacus'", "run", "-m", path, "-p", "hi")


def test_perplexity_is_one_json_object(capfd: pytest.CaptureFixture[str], path: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("some text to score " * 10)
    command = ("perplexity", "-m", path, "-f", text, "-o", "json")
    status, out, _ = run(capfd, *command, "--bits", 4)
    result = json.loads(out)
    assert status == 0
    assert (result["tokens"], result["avg_bits"], result["bits"]) == (190, 4.0, 4)
    assert 100 < result["ppl"] < 1000  # random weights over 272 tokens
    assert 2 < json.loads(run(capfd, *command, "--avg-bits", 3)[1])["avg_bits"] < 4


def test_partial_file_is_refused_until_asked_for(capfd: pytest.CaptureFixture[str], path: Path, tmp_path: Path) -> None:
    reader = gguf.GGUFReader(path)
    third = next(tensor for tensor in reader.tensors if tensor.name == "blk.0.attn_q.slice3")
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(path.read_bytes()[: third.data_offset])
    expect_error(capfd, r"cut\.gguf: .*slice3", "run", "-m", cut, "-p", "hi")
    status, _, err = run(capfd, "run", "-m", cut, "-p", "hi", "-n", 3, "--partial")
    assert status == 0 and "average bits 4.00" in err
    message = "bits: expected at most 4, what .* holds, found 8"
    expect_error(capfd, message, "run", "-m", cut, "-p", "hi", "--partial", "--bits", 8)
    assert "2 of 4 slices usable" in run(capfd, "info", cut)[1]


def test_unusable_file_is_named(capfd: pytest.CaptureFixture[str], path: Path, tmp_path: Path) -> None:
    expect_error(capfd, r"missing\.gguf", "run", "-m", tmp_path / "missing.gguf", "-p", "hi")
    other = tmp_path / "other.gguf"
    other.write_text("not a model")
    expect_error(capfd, r"other\.gguf: not a GGUF file", "info", other)
    other.write_bytes(path.read_bytes()[:5000])
    expect_error(capfd, r"other\.gguf", "info", other)
    writer = gguf.GGUFWriter(other, "llama")
    writer.add_uint32("llama.block_count", 1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    expect_error(capfd, r"other\.gguf: .*general\.architecture.*llama", "info", other)


def test_prompt_longer_than_the_context_gives_both_numbers(capfd: pytest.CaptureFixture[str], path: Path) -> None:
    expect_error(capfd, "at most 8 tokens, the context, found 12", "run", "-m", path, "-c", 8, "-p", "hello world")


def test_prompt_that_cannot_be_read_is_named(capfd: pytest.CaptureFixture[str], path: Path, tmp_path: Path) -> None:
    expect_error(capfd, r"none\.txt", "run", "-m", path, "-f", tmp_path / "none.txt")
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"ab\xff")
    expect_error(capfd, "expected UTF-8, found byte 0xff at 2", "run", "-m", path, "-f", binary)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--avg-bits", 9), "average bits: expected a number from 2 to 8, found 9"),
        (("--avg-bits", "nan"), "average bits: expected a number from 2 to 8, found nan"),
        (("--temp", -1), "temperature: expected"),
        (("--top-p", 2), "top_p: expected"),
        (("-b", 0), "n_batch: expected at least 1"),
        (("-t", -1), "n_threads: expected"),
    ],
)
def test_option_outside_its_range_is_named(
    capfd: pytest.CaptureFixture[str], path: Path, options: tuple[object, ...], message: str
) -> None:
    expect_error(capfd, message, "run", "-m", path, "-p", "hi", *options)


@pytest.mark.parametrize(
    "arguments",
    [
        ("run", "-m", "x.gguf"),
        ("run", "-m", "x", "-p", "a", "--bits", "3"),
        ("run", "-m", "x", "-p", "a", "--bits", "2", "--avg-bits", "3"),
    ],
)
def test_wrong_usage_has_status_2(capfd: pytest.CaptureFixture[str], arguments: tuple[str, ...]) -> None:
    status, _, err = run(capfd, *arguments)
    assert status == 2 and "error:" in err


def test_reader_that_leaves_early_is_no_error(path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "mobiquant", "run", "-m", str(path), "-p", "hi", "-n", "50", "--temp", "2"]
    done = subprocess.run(command, cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr


def test_bench_measures_every_case_and_names_its_figures_like_llama_bench(
    capfd: pytest.CaptureFixture[str], path: Path
) -> None:
    options = ("-p", 16, "-n", 4, "-t", "1,2", "-r", 2, "--bits", "2,8", "--avg-bits", 3, "-o", "json")
    status, out, _ = run(capfd, "bench", "-m", path, *options)
    rows = json.loads(out)
    assert status == 0
    cases = {(row["n_threads"], row["bits"], row["test"]) for row in rows}
    assert cases == {(t, bits, test) for t in (1, 2) for bits in ("2", "8", "3 avg") for test in ("pp16", "tg4")}
    for row in rows:
        assert len(row["samples_ts"]) == 2 and 0 < row["avg_ts"] <= row["best_ts"] == max(row["samples_ts"])
        assert (row["gb_per_s"] is None) == (row["n_gen"] == 0)
    read = {row["bits"]: row["bytes_per_token"] for row in rows if row["n_gen"]}
    assert read["2"] < read["3 avg"] < read["8"]


def test_bench_measures_behind_a_context_and_with_an_int8_cache(capfd: pytest.CaptureFixture[str], path: Path) -> None:
    options = ("-p", 0, "-n", 4, "-d", "0,32", "-t", 1, "-r", 1, "--bits", 2, "-ctk", "q8_0", "-o", "json")
    status, out, _ = run(capfd, "bench", "-m", path, *options)
    rows = json.loads(out)
    assert status == 0
    assert [(row["test"], row["n_depth"], row["type_k"], row["type_v"]) for row in rows] == [
        ("tg4", 0, "q8_0", "f16"),
        ("tg4 @ d32", 32, "q8_0", "f16"),
    ]
    expect_error(capfd, "500000 tokens do not fit", "bench", "-m", path, "-d", 500000)


def test_bench_refuses_a_bad_budget_or_count(capfd: pytest.CaptureFixture[str], path: Path) -> None:
    expect_error(capfd, "bits: expected 2, 4, 6, 8 or static:X, found '3'", "bench", "-m", path, "--bits", 3)
    expect_error(capfd, "--repetitions: expected at least 1, found 0", "bench", "-m", path, "-r", 0)
