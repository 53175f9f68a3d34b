"""Factorised kinds made from a dense FFN and tokens that it meets."""

from __future__ import annotations

import pytest
import torch

from fastffn import BlockConfig, DenseConfig, LowRankConfig
from fastffn.nn import DenseFFN
from fastffn.registry import kind_of
from tests.nn.start.test_least_squares import uneven

D, H = 24, 48
KINDS = [LowRankConfig(rank=6), BlockConfig(blocks=4), BlockConfig(blocks=4, rank=3)]


def dense_ffn(**fields) -> DenseFFN:
    return DenseFFN(DenseConfig(**({"d_model": D, "d_hidden": H, "activation": "silu"} | fields)))


@pytest.mark.parametrize("config", KINDS)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_tokens_make_the_start_better_where_they_are(config, gated: bool, bias: bool) -> None:
    dense = dense_ffn(gated=gated, bias=bias)
    rows = uneven(1500, D) * 0.05 + 0.2
    shown, held_out = rows[:1000], rows[1000:]
    module = kind_of(config).module
    wanted = dense(held_out).detach()

    def error(ffn) -> float:
        return float((ffn(held_out).detach() - wanted).square().mean() / wanted.var())

    assert error(module.from_dense(dense, config, shown)) < 0.7 * error(module.from_dense(dense, config))


@pytest.mark.parametrize("config", [LowRankConfig(rank=D), BlockConfig(blocks=1)])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", [3, 200])
def test_full_rank_reproduces_the_dense_output(config, gated: bool, bias: bool, tokens: int) -> None:
    dense = dense_ffn(gated=gated, bias=bias)
    ffn = kind_of(config).module.from_dense(dense, config, torch.randn(tokens, D))
    x = torch.randn(50, D)
    torch.testing.assert_close(ffn(x), dense(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("config", KINDS)
def test_dtype_mode_and_the_dense_ffn_stay(config) -> None:
    dense = dense_ffn().to(torch.bfloat16).eval()
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    ffn = kind_of(config).module.from_dense(dense, config, torch.randn(100, D, dtype=torch.bfloat16))
    assert {p.dtype for p in ffn.parameters()} == {torch.bfloat16}
    assert not ffn.training and all(p.requires_grad for p in ffn.parameters())
    assert all(torch.equal(before[name], value) for name, value in dense.state_dict().items())


def test_a_random_start_does_not_look_at_tokens() -> None:
    dense, config = dense_ffn(), LowRankConfig(rank=4, start="normal")
    torch.manual_seed(0)
    one = kind_of(config).module.from_dense(dense, config, torch.randn(9, D))
    assert torch.equal(one.up.b.bias, dense.up.bias)
    product = one.up.b.weight @ one.up.a.weight
    assert abs(float((product.std() / dense.up.weight.std()).detach()) - 1) < 0.3
