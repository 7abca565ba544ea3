"""`mobiquant evaluate` and `perplexity`: the figures, the tables, the picture, interruption, and every refusal."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from export.to_gguf import export_checkpoint  # noqa: E402
from mobiquant.cli import main  # noqa: E402
from mobiquant.evaluation.backends import Backend, open_backend  # noqa: E402
from mobiquant.evaluation.baselines import Baseline, read_baselines  # noqa: E402
from mobiquant.evaluation.evaluate import FULL, Precision, score_windows, text_windows  # noqa: E402
from mobiquant.evaluation.scoring import Window  # noqa: E402
from runtime.budget import Budget  # noqa: E402

SHARED = Path(__file__).parents[1].parent / "shared"
BUDGETS = ("2", "3.0", "8")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Path:
    """The checkpoint of conftest as a GGUF file."""
    path = tmp_path_factory.mktemp("evaluate") / "tiny.gguf"
    export_checkpoint(tiny_checkpoint, path)
    return path


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory, tiny_text: str) -> Path:
    path = tmp_path_factory.mktemp("text") / "tiny.txt"
    path.write_text(tiny_text, encoding="utf-8")
    return path


@pytest.fixture
def backend(file: Path) -> Iterator[Backend]:
    with closing(open_backend(file, n_threads=1)) as opened:
        yield opened


@pytest.fixture
def exact(tiny_model: Path) -> Iterator[Backend]:
    with closing(open_backend(tiny_model)) as opened:
        yield opened


def precisions(*names: str) -> list[Precision]:
    return [Precision.parse(name) for name in names]


def run(capfd: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Status, stdout and stderr of one command."""
    capfd.readouterr()
    status = main([str(argument) for argument in arguments])
    return status, *capfd.readouterr()


def expect_error(capfd: pytest.CaptureFixture[str], message: str, *arguments: object) -> None:
    status, out, err = run(capfd, *arguments)
    assert (status, out) == (1, "")
    last = err.splitlines()[-1]  # after transformers' own progress
    assert re.match(f"error: .*{message}", last), err


# Figures


class Fixed:
    """A backend that predicts the same distribution everywhere: `other` at 2 bits, `logits` otherwise."""

    kind, n_ctx, scale_bits, router_bits, bits_read = "gguf", 8, 0.25, 0.04, 0.0

    def __init__(self, logits: list[float], other: list[float]) -> None:
        self._known = {True: other, False: logits}

    def set_budget(self, budget: Budget | None) -> None:
        self._row = self._known[budget is not None and budget.bits == 2]
        self.bits_read = 16.0 if budget is None else budget.bits

    def predict(self, tokens: np.ndarray, first: int) -> Iterator[np.ndarray]:
        rows = np.tile(np.float32(self._row), (len(tokens) - first, 1))
        yield from np.array_split(rows, 2)


def test_figures_are_those_computed_by_hand() -> None:
    # Full precision: 1/2, 1/4, 1/4. At 2 bits: 1/4, 1/2, 1/4.
    model = Fixed(np.log([2, 1, 1]).tolist(), np.log([1, 2, 1]).tolist())
    windows = [Window(np.array([0, 1, 1, 2], np.int32), 1), Window(np.array([0, 1, 0], np.int32), 1)]
    result = score_windows(model, windows, precisions("2", "4.0"), model)
    two, four = result.rows
    # Targets 1 1 2 1 0 have probabilities 1/2 1/2 1/4 1/2 1/4 at 2 bits, 1/4 1/4 1/4 1/4 1/2 at 4.
    assert two.score.ppl == pytest.approx(2 ** (7 / 5))
    assert four.score.ppl == pytest.approx(2 ** (9 / 5)) == result.full.ppl
    # 1/2 log(1/2 / 1/4) + 1/4 log(1/4 / 1/2) = log(2) / 4, and the most likely token differs everywhere.
    assert two.score.kld == pytest.approx(np.log(2) / 4) and two.score.top1 == 0
    assert four.score.kld == pytest.approx(0, abs=1e-7) and four.score.top1 == 1
    assert (two.bits, two.bits_per_weight) == (2, 2.25)
    assert (four.bits, four.bits_per_weight) == (4, pytest.approx(4.29))


def test_a_file_and_its_checkpoint_give_the_same_table(
    backend: Backend, exact: Backend, tiny_checkpoint: Path, tiny_text: str
) -> None:
    def table(model: Backend) -> list[list[float]]:
        windows = text_windows(model, tiny_text, "llama.cpp", count=4)
        rows = score_windows(model, windows, precisions(*BUDGETS), exact).rows
        return [[row.bits, row.bits_per_weight, row.score.ppl, row.score.kld, row.score.top1] for row in rows]

    with closing(open_backend(tiny_checkpoint)) as checkpoint:
        # Torch's own attention adds in another order than the runtime.
        np.testing.assert_allclose(table(backend), table(checkpoint), rtol=0.03, atol=1e-4)
        sizes = (checkpoint.scale_bits, checkpoint.router_bits)
    assert sizes == (backend.scale_bits, backend.router_bits)


def test_predictions_do_not_depend_on_what_was_cached(backend: Backend, exact: Backend) -> None:
    random = np.random.default_rng(2)
    beginning = random.integers(2, 300, 20)
    sequences = [np.int32([*beginning[:keep], *random.integers(2, 300, 30)]) for keep in (20, 20, 7, 0)]
    routed = Budget.parse("3.0")
    for model, budget, tolerance in ((backend, None, 0), (backend, routed, 0), (exact, None, 1e-4)):
        warm, cold = [], []
        model.set_budget(budget)
        for tokens in sequences:
            warm += model.predict(tokens, 25)
        for tokens in sequences:
            model.set_budget(budget)
            cold += model.predict(tokens, 25)
        np.testing.assert_allclose(np.concatenate(warm), np.concatenate(cold), rtol=0, atol=tolerance)


def test_long_windows_are_scored_in_blocks_alike(
    backend: Backend, tiny_text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows = text_windows(backend, tiny_text, "all", count=2)
    (whole,) = score_windows(backend, windows, [FULL]).rows
    assert whole.score.tokens == 2 * 63
    monkeypatch.setattr("mobiquant.evaluation.backends._BLOCK", 11)
    (parts,) = score_windows(backend, windows, [FULL]).rows
    assert parts.score.nll == pytest.approx(whole.score.nll, rel=1e-12)


def test_interrupted_loop_keeps_whole_windows_for_every_budget(backend: Backend, tiny_text: str) -> None:
    windows = text_windows(backend, tiny_text, "all", count=5)

    def stop_in_the_third(result) -> None:
        if result.windows == 2:
            backend.predict = interrupt

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    result = score_windows(backend, windows, precisions(*BUDGETS), None, stop_in_the_third)
    assert result.interrupted and result.windows == 2
    assert {row.score.tokens for row in result.rows} == {2 * 63}
    with pytest.raises(KeyboardInterrupt):
        score_windows(backend, windows, precisions(*BUDGETS))


def test_full_precision_tale_46m_scores_the_published_anchor() -> None:
    folder, text = SHARED / "models" / "tale-46m", SHARED / "text" / "heldout_anchor.txt"
    if not folder.is_dir():
        pytest.skip(f"needs {folder}")
    with closing(open_backend(folder)) as model:
        windows = text_windows(model, text.read_text(encoding="utf-8"), "llama.cpp")
        (row,) = score_windows(model, windows, [FULL]).rows
    assert (row.score.tokens, row.bits) == (32 * 511, 16)
    assert row.score.ppl == pytest.approx(22.433, abs=6e-4)


# Commands


def test_evaluate_writes_table_json_and_picture(
    capfd: pytest.CaptureFixture[str], file: Path, tiny_model: Path, text_file: Path, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    baselines = tmp_path / "others.json"
    baselines.write_text(
        '[{"name": "GPTQ 2", "bits_per_weight": 2.25, "kl": 0.7, "text": "tiny.txt"},'
        ' {"name": "GPTQ 2", "bits_per_weight": 2.25, "kl": 0.9, "text": "other.txt"},'
        ' {"name": "RTN 3", "bits_per_weight": 3.25, "kl": 0.2, "ppl": 9.5, "top1": 0.75}]'
    )
    result, picture = tmp_path / "result.json", tmp_path / "quality.svg"
    options = ("--text", text_file, "--windows", 2, "--budgets", ",".join(BUDGETS), "--reference", tiny_model)
    files = ("--output", result, "--plot", picture, "--baselines", baselines)
    status, out, _ = run(capfd, "evaluate", file, *options, *files)
    assert status == 0
    rows = [line.split(" | ") for line in out.splitlines() if line.startswith("| ")]
    names = ["full precision", "2 uniform", "3.0 routed", "8 uniform", "GPTQ 2", "RTN 3"]
    assert [row[0] for row in rows[2:]] == [f"| {name}" for name in names]
    content = json.loads(result.read_text())
    assert list(content) == ["model", "kind", "reference", "texts", "tasks"]
    assert (content["kind"], content["tasks"]) == ("gguf", [])
    (text,) = content["texts"]
    assert (text["file"], text["rule"], text["context"], text["windows"]) == ("tiny.txt", "all", 64, 2)
    assert text["full_precision"]["tokens"] == 126
    assert {baseline["name"]: baseline["kl"] for baseline in text["baselines"]} == {"GPTQ 2": 0.7, "RTN 3": 0.2}
    for row, kind in zip(text["rows"], ("uniform", "routed", "uniform"), strict=True):
        assert list(row) == ["budget", "kind", "bits", "bits_per_weight", "ppl", "kl", "top1", "tokens"]
        assert row["kind"] == kind and row["tokens"] == 126 and row["bits_per_weight"] > row["bits"]
    assert text["rows"][0]["kl"] > text["rows"][2]["kl"] > 0
    drawn = picture.read_text()
    assert drawn.startswith("<?xml") and "</svg>" in drawn
    assert json.loads(run(capfd, "evaluate", file, *options, "-o", "json")[1])["texts"][0]["rows"] == text["rows"]


def test_png_of_perplexity_when_there_is_no_reference(
    capfd: pytest.CaptureFixture[str], file: Path, text_file: Path, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "quality.png"
    options = ("--text", text_file, text_file, "--windows", 1, "--budgets", "2,8", "--plot", picture)
    assert run(capfd, "evaluate", file, *options)[0] == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_full_precision_model_has_one_row(capfd: pytest.CaptureFixture[str], tiny_model: Path, text_file: Path) -> None:
    options = ("--text", text_file, "--windows", 1)
    (row,) = json.loads(run(capfd, "evaluate", tiny_model, *options, "-o", "json")[1])["texts"][0]["rows"]
    assert (row["budget"], row["kind"], row["bits"], row["kl"]) == ("full", "full", 32.0, None)
    expect_error(capfd, "for a budget, found full precision", "evaluate", tiny_model, *options, "--budgets", "4")


def test_perplexity_is_the_same_score(
    capfd: pytest.CaptureFixture[str], file: Path, tiny_model: Path, text_file: Path
) -> None:
    common = ("--windows", 2, "--reference", tiny_model, "-o", "json")
    single = json.loads(run(capfd, "perplexity", "-m", file, "-f", text_file, "--avg-bits", 3, *common)[1])
    table = json.loads(run(capfd, "evaluate", file, "--text", text_file, "--budgets", "3.0", *common)[1])
    (row,) = table["texts"][0]["rows"]
    assert list(single) == ["ppl", "tokens", "avg_bits", "kld", "top1"]
    assert list(single.values()) == [row["ppl"], row["tokens"], row["bits"], row["kl"], row["top1"]]


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "expected --text or --tasks, found neither"),
        (("--text", "none.txt"), r"none\.txt"),
        (("--text", "TEXT", "--budgets", "3"), "budget '3': bits: expected one of 2, 4, 6, 8, found 3"),
        (("--text", "TEXT", "--budgets", "9.0"), "budget '9.0': average bits: expected a number from 2 to 8, found 9"),
        (("--text", "TEXT", "--budgets", "4,many"), "budget 'many': "),
        (("--text", "TEXT", "--windows", 0), "--windows: expected at least 1, found 0"),
        (("--text", "TEXT", "-c", 65), "context: expected at most 64 tokens, the model's, found 65"),
        (("--text", "TEXT", "--reference", "none"), "none"),
        (("--text", "TEXT", "--plot", "x.pdf"), r"--plot: expected a name ending in \.svg or \.png, found x\.pdf"),
        (("--tasks", "boolq", "--plot", "x.svg"), "--plot: expected --text as well"),
        (("--text", "TEXT", "--output", "none/x.json"), "expected a folder none, found none"),
        (("--tasks", "boolq", "--tasks-dir", "none"), "--tasks-dir: expected a folder, found none at none"),
        (("--text", "TEXT", "--baselines", "none.json"), r"none\.json"),
    ],
)
def test_what_cannot_be_is_named(
    capfd: pytest.CaptureFixture[str], file: Path, text_file: Path, options: tuple[object, ...], message: str
) -> None:
    pytest.importorskip("lm_eval")
    arguments = (text_file if option == "TEXT" else option for option in options)
    expect_error(capfd, message, "evaluate", file, *arguments)


def test_missing_matplotlib_is_one_error(
    capfd: pytest.CaptureFixture[str], file: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    message = r"matplotlib is not installed: pip install 'mobiquant\[evaluate\]'"
    expect_error(capfd, message, "evaluate", file, "--text", text_file, "--plot", "x.svg")
    message = r"lm_eval is not installed: pip install 'mobiquant\[evaluate\]'"
    expect_error(capfd, message, "evaluate", file, "--tasks", "boolq")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "expected JSON"),
        ("{}", "expected a list of baselines, found dict"),
        ("[1]", "entry 0: expected an object, found int"),
        ('[{"name": "A", "bits_per_weight": 2}, {"name": "B"}]', "entry 1: bits_per_weight: expected a number"),
        ('[{"name": "A", "bits_per_weight": 2, "kl": "low"}]', "entry 0: kl: expected a number, found 'low'"),
        ('[{"name": " ", "bits_per_weight": 2}]', "entry 0: name: expected at least one word"),
    ],
)
def test_malformed_baselines_are_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "others.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=rf"others\.json: {message}"):
        read_baselines(path)


def test_baselines_of_the_repository_are_readable() -> None:
    points = read_baselines(Path(__file__).parent / "benchmarks" / "llama_quants.json")
    assert len(points) == 12 and {point.method for point in points} == {"llama.cpp"}
    assert points[0] == Baseline(
        "llama.cpp IQ2_XS", 2.33, 0.2523, 28.48, 0.709, text="heldout_anchor.txt", rule="llama.cpp"
    )
    assert points[0].label == "IQ2_XS"
    assert not points[0].belongs_to("heldout.txt", "llama.cpp")
