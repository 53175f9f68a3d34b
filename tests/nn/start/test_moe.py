from __future__ import annotations

import pytest
import torch

from fastffn import DenseConfig, MoEConfig, MoEFFN
from fastffn.nn import DenseFFN
from fastffn.nn.start import moe as start

D, H = 12, 41


def dense_ffn(**fields) -> DenseFFN:
    return DenseFFN(DenseConfig(**({"d_model": D, "d_hidden": H, "d_out": 7, "activation": "silu"} | fields)))


def by_topic(tokens: int) -> tuple[DenseFFN, torch.Tensor]:
    """A dense FFN of four groups of neurons, each for the tokens of one topic."""
    dense, topics = dense_ffn(d_hidden=40, activation="relu"), 4 * torch.eye(D)[:4]
    with torch.no_grad():
        owner = torch.arange(40) % 4
        dense.up.weight.add_(topics[owner])
        dense.up.bias.fill_(-8.0)
    return dense, topics[torch.randint(4, (tokens,))] + 0.5 * torch.randn(tokens, D)


@pytest.mark.parametrize("shared", [0, 5])
@pytest.mark.parametrize("width", [None, 14])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", [2, 300])
def test_all_experts_together_are_the_dense_ffn(shared, width, gated, bias, tokens) -> None:
    """Also where the neurons do not divide by the experts, or the experts have room for more."""
    dense = dense_ffn(gated=gated, bias=bias)
    config = MoEConfig(experts=4, active=4, shared=shared, expert_width=width)
    ffn = MoEFFN.from_dense(dense, config, torch.randn(tokens, D))
    assert ffn.config.expert_width == (width or -(-(H - shared) // 4))
    assert (ffn.config.weighting, ffn.config.gated, ffn.config.bias) == ("sum", gated, bias)
    x = torch.randn(50, D)
    torch.testing.assert_close(ffn.eval()(x), dense(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("active", [1, 2])
def test_topics_find_their_neurons(active: int) -> None:
    dense, x = by_topic(3000)
    ffn = MoEFFN.from_dense(dense, MoEConfig(experts=4, active=active), x[:2000]).eval()
    y, wanted = ffn(x[2000:]), dense(x[2000:])
    assert float(((y - wanted).square().mean() / wanted.var()).detach()) < 0.02


def test_groups_and_router_are_worth_their_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against groups of neurons as they come, and against a random router."""
    dense, x = by_topic(3000)
    config = MoEConfig(experts=4, active=1)

    def error() -> float:
        ffn = MoEFFN.from_dense(dense, config, x[:2000]).eval()
        return float((ffn(x[2000:]) - dense(x[2000:])).square().mean().detach())

    best = error()
    with monkeypatch.context() as patch:
        patch.setattr(start, "balanced_groups", lambda contribution, groups: torch.arange(40).view(groups, -1))
        assert best < 0.5 * error()
    with monkeypatch.context() as patch:
        patch.setattr(start, "fit_router", lambda inputs, gain, active: torch.randn(4, D))
        assert best < 0.5 * error()


def test_narrow_experts_hold_the_neurons_that_do_most() -> None:
    dense, x = dense_ffn(d_hidden=40), torch.randn(500, D)
    with torch.no_grad():
        dense.down.weight[:, 10:] *= 1e-4
    ffn = MoEFFN.from_dense(dense, MoEConfig(experts=2, active=2, shared=4, expert_width=3), x).eval()
    found = torch.cat((ffn.shared.up.weight, ffn.expert_up_weight.flatten(0, 1)))
    torch.testing.assert_close(found.sort(0).values, dense.up.weight[:10].sort(0).values)
    torch.testing.assert_close(ffn(x), dense(x), rtol=1e-2, atol=1e-2)


def test_more_experts_than_neurons() -> None:
    dense, x = dense_ffn(d_hidden=3), torch.randn(500, D)
    ffn = MoEFFN.from_dense(dense, MoEConfig(experts=5, active=5), x).eval()
    torch.testing.assert_close(ffn(x), dense(x), rtol=1e-3, atol=1e-4)
    # Nothing is left for the experts where the shared part holds all.
    ffn = MoEFFN.from_dense(dense, MoEConfig(experts=2, active=1, shared=3), x).eval()
    torch.testing.assert_close(ffn(x), dense(x), rtol=1e-3, atol=1e-4)
