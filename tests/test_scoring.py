"""Scoring rules and the Score accumulator."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mobiquant.evaluation.scoring import Score, make_windows
from mobiquant.text import clean_text

BOS = 0


def test_rule_all_scores_every_token_once():
    ids = np.arange(1, 24)
    windows = make_windows(ids, "all", 8, BOS)
    assert [len(window.tokens) for window in windows] == [8, 8, 8, 3]
    assert all(window.tokens[0] == BOS and window.tokens.dtype == np.int32 for window in windows)
    np.testing.assert_array_equal(np.concatenate([window.targets for window in windows]), ids)


def test_rule_llama_cpp_scores_the_second_half_of_full_windows():
    first, second = make_windows(np.arange(1, 19), "llama.cpp", 8, BOS)
    # The text is bos 1 2 .. 18; the first token of each window is overwritten.
    assert first.tokens.tolist() == [BOS, 1, 2, 3, 4, 5, 6, 7]
    assert second.tokens.tolist() == [BOS, 9, 10, 11, 12, 13, 14, 15]
    assert first.targets.tolist() == [5, 6, 7]


@pytest.mark.parametrize(
    ("ids", "rule", "context", "message"),
    [
        ([1] * 9, "half", 8, "rule: expected one of all, llama.cpp, found 'half'"),
        ([1] * 9, "all", 3, "context: expected at least 4 tokens, found 3"),
        ([], "all", 8, "text: expected enough tokens"),
        ([1] * 5, "llama.cpp", 8, "text: expected enough tokens for one window of 8"),
        ([[1]], "all", 8, "token_ids: expected one dimension"),
    ],
)
def test_unusable_input_is_refused(ids, rule, context, message):
    with pytest.raises(ValueError, match=message):
        make_windows(ids, rule, context, BOS)


def test_uniform_logits_have_the_vocabulary_as_perplexity():
    score = Score()
    score.add(np.full((6, 50), 3.0, np.float32), np.arange(6))
    assert score.ppl == pytest.approx(50)
    assert score.to_dict(4.0) == {"ppl": pytest.approx(50), "tokens": 6, "avg_bits": 4.0}


def test_divergence_is_that_of_the_distributions():
    reference = np.log(np.array([[0.5, 0.25, 0.25]], np.float32))
    logits = np.log(np.array([[0.25, 0.5, 0.25]], np.float32))
    score = Score()
    score.add(logits, np.array([1]), reference)
    score.add(reference + 7, np.array([1]), reference)
    assert score.kld == pytest.approx(0.25 * np.log(2) / 2, rel=1e-5)
    assert score.top1 == 0.5
    assert score.ppl == pytest.approx(np.exp((np.log(2) + np.log(4)) / 2), rel=1e-5)


def test_parts_add_up_to_the_whole():
    random = np.random.default_rng(0)
    logits, reference = random.normal(size=(2, 20, 30)).astype(np.float32)
    targets = random.integers(0, 30, 20)
    whole, parts = Score(), Score()
    whole.add(logits, targets, reference)
    for start in range(0, 20, 7):
        part = slice(start, start + 7)
        parts.add(logits[part], targets[part], reference[part])
    assert parts.to_dict(2.0) == pytest.approx(whole.to_dict(2.0))


def test_bad_logits_are_refused():
    with pytest.raises(ValueError, match="logits: expected finite numbers"):
        Score().add(np.array([[0.0, np.nan]], np.float32), np.array([0]))
    with pytest.raises(ValueError, match=r"targets: expected shape \(1,\), found \(2,\)"):
        Score().add(np.zeros((1, 4), np.float32), np.array([0, 1]))


def test_separator_lines_are_removed():
    assert clean_text("one\n<|endoftext|>\ntwo\n<|endoftext|>\n") == "one\n\ntwo\n\n"
    assert clean_text("one\n<|endoftext|>") == "one"


def test_device_side_modules_do_not_import_torch():
    modules = "mobiquant, mobiquant.packing, mobiquant.evaluation.scoring, mobiquant.config, mobiquant.cli"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=False).returncode == 0
