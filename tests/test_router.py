"""Routers: the stored formula, freezing, gates, size rule and threshold tables."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from mobiquant.activations import quantize_activations  # noqa: E402
from mobiquant.config import default_budgets  # noqa: E402
from mobiquant.recipes.gains import Examples, fit_router  # noqa: E402
from mobiquant.router import (  # noqa: E402
    TrainableRouter,
    interpolate_threshold,
    router_hidden_size,
    spending_cut,
    straight_through_gates,
)

BUDGETS = default_budgets()


@pytest.fixture
def router() -> TrainableRouter:
    generator = torch.Generator().manual_seed(0)
    router = TrainableRouter(columns=200, linears=2, hidden_size=5, generator=generator)
    with torch.no_grad():
        router.head.normal_(generator=generator)
        router.head_bias.normal_(generator=generator)
        router.hidden_bias.normal_(generator=generator)
    return router


def inputs(tokens: int = 64) -> torch.Tensor:
    return torch.randn(tokens, 200, generator=torch.Generator().manual_seed(1)) * 3


def test_stored_scores_follow_the_formula_of_the_format(router):
    stored, x = router.freeze(len(BUDGETS)), quantize_activations(inputs())
    parts = {name: getattr(stored, name).double().numpy() for name in ("hidden", "hidden_scale", "hidden_bias", "head")}
    values = x.dequantized().double().numpy()
    rms = np.sqrt((values**2).sum(1, keepdims=True) / 200 + 1e-12)
    a = np.maximum(0, parts["hidden_scale"] * (values @ parts["hidden"].T) / rms + parts["hidden_bias"])
    expected = np.einsum("th,leh->tle", a, parts["head"][..., :5]) + parts["head"][..., 5] * np.log2(rms)[:, None]
    expected += stored.head_bias.double().numpy()
    np.testing.assert_allclose(stored.scores(x).numpy(), expected, rtol=1e-4, atol=1e-4)


def test_freezing_changes_no_score(router):
    x = quantize_activations(inputs())
    torch.testing.assert_close(router(x.dequantized()), router.freeze(2).scores(x), rtol=1e-4, atol=1e-4)


def test_a_spending_cut_spends_what_was_asked(router):
    stored, x, weights = router.freeze(len(BUDGETS)), quantize_activations(inputs(2048)), [3, 1]
    scores = [stored.scores(x)[:, linear] for linear in range(2)]
    for bits in (2.5, 3.3, 4.0, 5.7, 7.2):
        stored.threshold.fill_(spending_cut(scores, weights, bits))
        depths = stored.depths(x, bits, BUDGETS).double().mean(0)
        assert 2 * (depths[0] * 3 + depths[1]) / 4 == pytest.approx(bits, abs=0.03)


def test_interpolation_meets_the_table_at_its_entries():
    threshold = torch.randn(2, 3, len(BUDGETS), generator=torch.Generator().manual_seed(3))
    for index in (1, 17, 30):
        torch.testing.assert_close(interpolate_threshold(threshold, BUDGETS[index], BUDGETS), threshold[..., index])
    middle = (BUDGETS[4] + BUDGETS[5]) / 2
    expected = (threshold[..., 4] + threshold[..., 5]) / 2
    torch.testing.assert_close(interpolate_threshold(threshold, middle, BUDGETS), expected)


def test_gates_are_binary_monotone_and_carry_a_gradient():
    scores = torch.tensor([[1.0, -1.0, 2.0], [1.0, 1.0, 1.0]], requires_grad=True)
    gates = straight_through_gates(scores, cut=0.0, temperature=1.0)
    assert gates.tolist() == [[1, 0, 0], [1, 1, 1]]
    gates[0, 0].backward()
    assert scores.grad[0, 0] == pytest.approx(torch.sigmoid(torch.tensor(1.0)).item() * (1 - 0.7310586), rel=1e-4)


def test_fitted_scores_find_which_tokens_gain(router):
    x = quantize_activations(inputs(4000)).dequantized()
    truth = torch.stack([torch.exp2(2 * torch.relu(x[:, :1] / 3) - shift) for shift in (10.0, 14.0, 18.0)], 2)
    noise = torch.rand(truth.shape, generator=torch.Generator().manual_seed(4)) * 2
    examples = Examples(x, (truth * noise).expand(-1, 2, -1))
    fit_router(router, examples, 2e-2, torch.Generator().manual_seed(5))
    scores = router(x).detach()[:, 0]
    for index in range(3):
        assert np.corrcoef(scores[:, index], truth[:, 0, index].log2())[0, 1] > 0.8
    torch.testing.assert_close(torch.exp2(scores).mean(0), examples.gains[:, 0].mean(0), rtol=1e-3, atol=0)


def test_hidden_size_keeps_routers_below_two_per_cent():
    def points(width: int, kv: int, feed_forward: int) -> list[list[tuple[int, int]]]:
        return [
            [(width, width), (kv, width), (kv, width)],
            [(width, width)],
            [(feed_forward, width), (feed_forward, width)],
            [(width, feed_forward)],
        ]

    assert router_hidden_size(points(2048, 512, 8192)) == 16
    # tale-6m: 221,184 bytes of base slice, 1,536 bytes of routers per hidden unit.
    assert router_hidden_size(points(256, 128, 768)) == 2
    assert router_hidden_size(points(16, 16, 16)) == 1
