"""Sampling follows llama.cpp's filters and order: checked against a plain loop over a dictionary."""

from __future__ import annotations

import math

import numpy as np
import pytest

from runtime.sampling import Sampler, SamplingSettings, candidates, penalize

LOGITS = np.random.default_rng(3).normal(0, 1.5, 60).astype(np.float32)


def plain_distribution(logits: np.ndarray, recent: list[int], settings: SamplingSettings) -> dict[int, float]:
    """Token -> probability, one step of the chain after the other, as one would write it by hand."""
    scores = {token: float(value) for token, value in enumerate(logits)}
    for token in set(recent):
        scores[token] = (
            scores[token] / settings.repeat_penalty if scores[token] > 0 else scores[token] * settings.repeat_penalty
        )
    kept = sorted(scores, key=lambda token: -scores[token])[: settings.top_k or len(scores)]

    def probabilities(tokens: list[int], temperature: float = 1.0) -> dict[int, float]:
        weights = {token: math.exp((scores[token] - scores[tokens[0]]) / temperature) for token in tokens}
        return {token: weight / sum(weights.values()) for token, weight in weights.items()}

    total, nucleus = 0.0, []
    for token, probability in probabilities(kept).items():
        nucleus.append(token)
        total += probability
        if total >= settings.top_p:
            break
    most = probabilities(nucleus)
    kept = [token for token in nucleus if most[token] >= settings.min_p * most[nucleus[0]]]
    return probabilities(kept, settings.temperature)


@pytest.mark.parametrize(
    "settings",
    [
        SamplingSettings(),
        SamplingSettings(temperature=1.5, top_k=5, top_p=1, min_p=0),
        SamplingSettings(temperature=0.3, top_k=0, top_p=0.6, min_p=0),
        SamplingSettings(temperature=1.0, top_k=0, top_p=1, min_p=0.2, repeat_penalty=1.4),
        SamplingSettings(temperature=2.0, top_k=0, top_p=1, min_p=0, repeat_penalty=0.8),
    ],
)
def test_draws_follow_the_distribution_of_the_plain_chain(settings: SamplingSettings) -> None:
    recent = [int(LOGITS.argmax()), int(LOGITS.argmin()), 7, 7]
    expected = plain_distribution(LOGITS, recent, settings)
    assert set(candidates(penalize(LOGITS, recent, settings.repeat_penalty), settings)) == set(expected)
    draws = 4000
    sampler = Sampler(SamplingSettings(**{**vars(settings), "seed": 1}))
    counts = np.bincount([sampler.sample(LOGITS, recent) for _ in range(draws)], minlength=len(LOGITS))
    for token, count in enumerate(counts):
        probability = expected.get(token, 0.0)
        # Five standard deviations of a binomial count; exactly 0 for what the filters removed.
        assert abs(count - draws * probability) <= 5 * math.sqrt(draws * probability * (1 - probability)) + 1e-9


def test_temperature_zero_is_greedy_after_the_penalty() -> None:
    best, second = (int(token) for token in np.argsort(-LOGITS)[:2])
    assert Sampler(SamplingSettings(temperature=0)).sample(LOGITS) == best
    assert Sampler(SamplingSettings(temperature=0, repeat_penalty=10)).sample(LOGITS, [best]) == second


def test_penalty_looks_at_the_last_n_tokens_only() -> None:
    best = int(LOGITS.argmax())
    settings = SamplingSettings(temperature=0, repeat_penalty=10, last_n=3)
    assert Sampler(settings).sample(LOGITS, [best, 1, 2, 3]) == best
    assert Sampler(settings).sample(LOGITS, [0, best, 2, 3]) != best


def test_same_seed_gives_the_same_tokens_and_another_seed_does_not() -> None:
    def draw(seed: int) -> list[int]:
        sampler = Sampler(SamplingSettings(temperature=2, seed=seed))
        return [sampler.sample(LOGITS) for _ in range(50)]

    assert draw(5) == draw(5)
    assert draw(5) != draw(6)


def test_equal_logits_at_the_cut_keep_exactly_k() -> None:
    settings = SamplingSettings(top_k=3, top_p=1, min_p=0)
    assert candidates(np.zeros(10), settings).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("top_p", 1.1),
        ("min_p", -1),
        ("repeat_penalty", 0),
        ("seed", -1),
    ],
)
def test_setting_outside_its_range_is_named(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected"):
        SamplingSettings(**{name: value})
