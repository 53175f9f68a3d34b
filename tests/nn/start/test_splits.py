from __future__ import annotations

import pytest
import torch

from fastffn.nn.start.splits import Decision, Splitter

D = 20


def rows(tokens: int) -> torch.Tensor:
    """Tokens with a large mean, whose inputs differ in size."""
    return torch.randn(tokens, D) * torch.logspace(-2, 2, D) + 30 * torch.randn(D)


def goes_right(x: torch.Tensor, decision: Decision) -> torch.Tensor:
    return x @ decision.weight + decision.bias >= 0


@pytest.mark.parametrize("tokens", [60, 400, 2000])
def test_parts_planted_halves(tokens: int) -> None:
    x = rows(tokens + 1000)
    direction = torch.randn(D) / x.std(0)
    scores = x @ direction
    side = scores > scores.median()
    needs = torch.where(side[:, None], torch.randn(5), torch.randn(5)) + 0.3 * torch.randn(len(x), 5)
    decision = Splitter(x[:tokens])(torch.arange(tokens), needs[:tokens])
    agree = (goes_right(x[tokens:], decision) == side[tokens:]).float().mean()
    assert max(agree, 1 - agree) > (0.75 if tokens < 100 else 0.9)


def test_scores_have_deviation_one_and_halves() -> None:
    x, needs = rows(501), torch.randn(501, 3)
    weight, bias, scores = Splitter(x)(torch.arange(501), needs)
    torch.testing.assert_close(x @ weight + bias, scores, rtol=1e-3, atol=1e-3)
    assert float(scores.std()) == pytest.approx(1, rel=0.01)
    assert 249 <= int((scores >= 0).sum()) <= 252


def test_few_tokens_are_led_by_all() -> None:
    """Four tokens do not tell 20 directions: what varies most overall has the say."""
    x = rows(1000)
    split = Splitter(x)
    decision = split(torch.arange(4), torch.randn(4, 3))
    scores = x @ decision.weight + decision.bias
    assert 0.1 < float(scores.std()) < 10
    assert goes_right(x[:4], decision).sum() in (2, 3)  # the median itself may go either way


@pytest.mark.parametrize(
    "case", ["no token", "one token", "seven identical tokens", "identical needs", "all identical", "all zero"]
)
def test_nothing_to_part(case: str) -> None:
    x = rows(300)
    if case.startswith("seven"):
        x[:7] = x[0].clone()
    elif case.startswith("all"):
        x[:] = 0.0 if case == "all zero" else x[0].clone()
    tokens = torch.arange({"no token": 0, "one token": 1, "seven identical tokens": 7}.get(case, 300))
    needs = torch.ones(len(tokens), 3) if case == "identical needs" else torch.randn(len(tokens), 3)
    decision = Splitter(x)(tokens, needs)
    assert len(decision.scores) == len(tokens) and not any(part.any() for part in decision)


def test_the_same_twice() -> None:
    x, needs = rows(300), torch.randn(300, 3)
    one, other = (Splitter(x)(torch.arange(300), needs) for _ in range(2))
    assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
