"""The analysis of outlier tokens: its measures on made-up numbers, and the whole script on a tiny checkpoint."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
from benchmarks.outliers import __main__ as script
from benchmarks.outliers.analysis import (
    by_decile,
    mean_bits,
    oracle_depths,
    outliers,
    rank_correlation,
    shares_kept,
    shuffled_depths,
    spent_cost,
    token_kind,
)
from benchmarks.outliers.measure import BUDGETS, Measured, measure

from mobiquant.source import open_source

TOKENS, LINEARS = 2000, 14


@pytest.fixture
def made_up() -> Measured:
    """Costs that fall with depth by a factor of their own for every token and linear; random depths."""
    random = np.random.default_rng(0)
    first = random.lognormal(0, 2, (LINEARS, 1, TOKENS))
    fall = np.cumprod(np.concatenate((np.ones_like(first), random.uniform(0.01, 0.5, (LINEARS, 3, TOKENS))), 1), 1)
    cost = (first * fall).astype(np.float32)
    return Measured(
        tokens=random.integers(0, 50, TOKENS),
        linears=[f"linear {index}" for index in range(LINEARS)],
        weights=np.arange(1, LINEARS + 1) * 128,
        output=np.ones((LINEARS, TOKENS), np.float32),
        error=cost,
        control_error=cost,
        cost=cost,
        divergence=cost.sum(0),
        control_divergence=cost.sum(0),
        depths=random.integers(1, 5, (len(BUDGETS), TOKENS, LINEARS)).astype(np.uint8),
        routed=cost[:3, 0],
    )


def test_outliers_are_the_largest_twentieth() -> None:
    values = np.random.default_rng(0).permutation(1000)
    assert np.array_equal(outliers(values), values >= 950)


def test_shares_kept_compare_depths_and_on_the_diagonal_the_control() -> None:
    random = np.random.default_rng(0)
    first, second = random.random((2, 20_000))
    kept = shares_kept(np.stack((first, 2 * first, second)), np.stack((second, first, second)))
    assert kept[0, 1] == kept[1, 0] == 1
    assert kept[0, 2] == pytest.approx(0.05, abs=0.02)
    assert kept[0, 0] == pytest.approx(0.05, abs=0.02)
    assert kept[1, 1] == kept[2, 2] == 1


def test_rank_correlation_is_spearmans() -> None:
    values = np.random.default_rng(0).random(500)
    assert rank_correlation(values, np.exp(values)) == pytest.approx(1)
    assert rank_correlation(values, -(values**3)) == pytest.approx(-1)
    # By hand: mean ranks 1.5, 1.5, 3, 4 against 1, 2, 3, 4.
    assert rank_correlation(np.array([5, 5, 6, 7]), np.array([1, 2, 3, 4])) == pytest.approx(4.5 / np.sqrt(4.5 * 5))


def test_deciles_follow_the_given_order() -> None:
    order = np.random.default_rng(0).permutation(100)
    assert np.array_equal(by_decile(order.astype(float), order), np.arange(10) * 10 + 4.5)


def test_shuffling_keeps_what_every_linear_reads(made_up: Measured) -> None:
    depths = made_up.depths[0]
    shuffled = shuffled_depths(depths)
    assert not np.array_equal(shuffled, depths)
    assert np.array_equal(np.sort(shuffled, axis=0), np.sort(depths, axis=0))


@pytest.mark.parametrize("bits", [2.5, 3.0, 4.0])
def test_a_router_that_knows_spends_what_is_asked_and_beats_random_tokens(made_up: Measured, bits: float) -> None:
    depths = oracle_depths(made_up, bits)
    spent = 2 * (depths @ made_up.weights).mean() / made_up.weights.sum()
    assert spent == pytest.approx(bits, abs=0.02)
    assert spent_cost(made_up, depths) < 0.7 * spent_cost(made_up, shuffled_depths(depths))


def test_mean_bits_count_weights(made_up: Measured) -> None:
    made_up.depths[:] = 1
    made_up.depths[0, :, -1] = 4
    bits = mean_bits(made_up)
    assert np.allclose(bits[1:], 2)
    assert np.allclose(bits[0], 2 + 6 * LINEARS / sum(range(1, LINEARS + 1)))


def test_kinds_of_tokens() -> None:
    kinds = [token_kind(piece) for piece in ("<|begin_of_text|>", ".\n\n", " 1,2", " -", " sea", "ing")]
    assert kinds == [
        "begin of text",
        "line break",
        "digits",
        "punctuation",
        "start of a word",
        "inside a word or after a mark",
    ]


def test_errors_shrink_with_depth_and_routing_reads_more_when_asked(tiny_checkpoint: Path, tiny_model: Path) -> None:
    windows = np.random.default_rng(0).integers(2, 320, (2, 48))
    windows[:, 0] = 0
    measured = measure(tiny_checkpoint, open_source(str(tiny_model)), windows, "cpu")
    for values in (measured.error, measured.control_error, measured.cost):
        assert values.shape == (14, 4, 96)
        assert (np.diff(values.mean((0, 2))) < 0).all()
    for values in (measured.divergence, measured.control_divergence):
        assert values.shape == (4, 96)
        assert (values > -1e-9).all() and (np.diff(values.mean(1)) < 0).all()
    assert (np.diff(mean_bits(measured).mean(1)) > 0).all()


def test_the_script_draws_and_replaces_the_tables_of_the_page(
    tiny_checkpoint: Path, tiny_model: Path, tiny_text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    text, page, picture = (tmp_path / name for name in ("text.txt", "page.md", "picture.svg"))
    text.write_text(tiny_text, encoding="utf-8")
    page.write_text(f"Before.\n{script.BEGIN_MARK}\nold\n{script.END_MARK}\nAfter.\n", encoding="utf-8")
    arguments = [str(path) for path in (tiny_checkpoint, tiny_model, text)]
    arguments += ["--windows", "4", "--page", str(page), "--picture", str(picture)]
    written = []
    for _ in range(2):
        monkeypatch.setattr("sys.argv", ["outliers", *arguments])
        assert script.main() == 0
        written.append((page.read_bytes(), picture.read_bytes()))
    assert written[0] == written[1]
    content = page.read_text(encoding="utf-8")
    assert content.startswith("Before.\n") and content.endswith("\nAfter.\n")
    assert "old" not in content.split() and content.count("| divergence of the whole model |") == 1
    page.write_text("no marks", encoding="utf-8")
    with pytest.raises(ValueError, match=r"page\.md: expected one <!-- tables -->"):
        script.replace_tables(page, "")
