"""Sampling follows llama.cpp's filters and order: checked against a plain loop over a dictionary."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from runtime.sampling import Sampler, SamplingSettings, add_bias, candidates, penalize

LOGITS = np.random.default_rng(3).normal(0, 1.5, 60).astype(np.float32)


def plain_distribution(logits: np.ndarray, recent: list[int], settings: SamplingSettings) -> dict[int, float]:
    """Token -> probability, one step of the chain after the other, as one would write it by hand."""
    scores = {token: float(value) + settings.logit_bias.get(token, 0) for token, value in enumerate(logits)}
    for token in set(recent):
        scores[token] = (
            scores[token] / settings.repeat_penalty if scores[token] > 0 else scores[token] * settings.repeat_penalty
        )
        scores[token] -= recent.count(token) * settings.frequency_penalty + settings.presence_penalty

    def probabilities(tokens: list[int], temperature: float = 1.0) -> dict[int, float]:
        weights = {token: math.exp((scores[token] - scores[tokens[0]]) / temperature) for token in tokens}
        return {token: weight / sum(weights.values()) for token, weight in weights.items()}

    def shortest(order: list[int], shares: dict[int, float], enough: Callable[[float], bool]) -> list[int]:
        total, found = 0.0, []
        for token in order:
            found.append(token)
            total += shares[token]
            if enough(total):
                break
        return found

    kept = sorted(scores, key=lambda token: -scores[token])[: settings.top_k or len(scores)]
    shares = probabilities(kept)
    entropy = -sum(share * math.log(share) for share in shares.values() if share > 0)
    if settings.typical_p < 1:
        order = sorted((t for t in kept if shares[t] > 0), key=lambda token: abs(-math.log(shares[token]) - entropy))
        typical = shortest(order, shares, lambda total: total > settings.typical_p)
        kept = [token for token in kept if token in typical]
    if settings.top_p < 1:
        kept = shortest(kept, probabilities(kept), lambda total: total >= settings.top_p)
    most = probabilities(kept)
    kept = [token for token in kept if most[token] >= settings.min_p * most[kept[0]]]
    return probabilities(kept, settings.temperature)


@pytest.mark.parametrize(
    "settings",
    [
        SamplingSettings(),
        SamplingSettings(temperature=1.5, top_k=5, top_p=1, min_p=0),
        SamplingSettings(temperature=0.3, top_k=0, top_p=0.6, min_p=0),
        SamplingSettings(temperature=1.0, top_k=0, top_p=1, min_p=0.2, repeat_penalty=1.4),
        SamplingSettings(temperature=2.0, top_k=0, top_p=1, min_p=0, repeat_penalty=0.8),
        SamplingSettings(temperature=1.0, top_k=0, top_p=1, min_p=0, frequency_penalty=0.7),
        SamplingSettings(temperature=1.0, top_k=0, top_p=1, min_p=0, presence_penalty=1.5, repeat_penalty=1.1),
        SamplingSettings(temperature=1.0, top_k=0, top_p=1, min_p=0, typical_p=0.5),
        SamplingSettings(temperature=0.7, top_k=30, top_p=0.9, min_p=0.1, typical_p=0.8),
        SamplingSettings(temperature=1.0, top_k=5, logit_bias={3: 4.0, int(LOGITS.argmax()): -math.inf}),
    ],
)
def test_draws_follow_the_distribution_of_the_plain_chain(settings: SamplingSettings) -> None:
    recent = [int(LOGITS.argmax()), int(LOGITS.argmin()), 7, 7]
    expected = plain_distribution(LOGITS, recent, settings)
    assert set(candidates(penalize(add_bias(LOGITS, settings.logit_bias), recent, settings), settings)) == set(expected)
    draws = 4000
    sampler = Sampler(SamplingSettings(**{**vars(settings), "seed": 1}))
    counts = np.bincount([sampler.sample(LOGITS, recent) for _ in range(draws)], minlength=len(LOGITS))
    for token, count in enumerate(counts):
        probability = expected.get(token, 0.0)
        # Five standard deviations of a binomial count; exactly 0 for what the filters removed.
        assert abs(count - draws * probability) <= 5 * math.sqrt(draws * probability * (1 - probability)) + 1e-9


def test_mirostat_follows_a_plain_loop() -> None:
    tau, eta, seed = 3.0, 0.2, 11
    sampler = Sampler(SamplingSettings(mirostat_mode=2, mirostat_tau=tau, mirostat_eta=eta, temperature=0.9, seed=seed))
    drawn = [sampler.sample(LOGITS) for _ in range(200)]

    random, mu, expected = np.random.default_rng(seed), 2 * tau, []
    weights = [math.exp((float(value) - float(LOGITS.max())) / 0.9) for value in LOGITS]
    shares = {token: weight / sum(weights) for token, weight in enumerate(weights)}
    order = sorted(shares, key=lambda token: -shares[token])
    for _ in drawn:
        kept = [token for token in order if -math.log2(shares[token]) <= mu] or order[:1]
        total, threshold = sum(shares[token] for token in kept), random.random()
        reached = np.cumsum([shares[token] / total for token in kept])
        token = kept[min(int((reached <= threshold).sum()), len(kept) - 1)]
        expected.append(token)
        mu -= eta * (-math.log2(shares[token] / total) - tau)
    assert drawn == expected
    assert len(set(drawn)) > 10


def test_mirostat_holds_the_surprise_it_is_asked_for() -> None:
    shares = np.exp(LOGITS) / np.exp(LOGITS).sum()
    for tau in (1.5, 3.0):
        sampler = Sampler(SamplingSettings(mirostat_mode=2, mirostat_tau=tau, temperature=1, seed=0))
        surprise = -np.log2(shares[[sampler.sample(LOGITS) for _ in range(2000)]])
        # What is left after the cut is renormalised, so a little less surprising than by the whole distribution.
        assert tau <= surprise.mean() < tau + 0.75


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
        ("typical_p", 2),
        ("frequency_penalty", math.inf),
        ("mirostat_mode", 1),
        ("mirostat_eta", -1),
        ("logit_bias", {5: math.nan}),
    ],
)
def test_setting_outside_its_range_is_named(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected"):
        SamplingSettings(**{name: value})


def test_bias_of_a_token_outside_the_vocabulary_is_named() -> None:
    with pytest.raises(ValueError, match="logit_bias: expected token ids from 0 to 59, found 60"):
        Sampler(SamplingSettings(logit_bias={60: 1.0})).sample(LOGITS)
