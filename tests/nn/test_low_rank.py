from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastffn import DenseConfig, DenseFFN, LowRankConfig, LowRankFFN, build
from fastffn.errors import ConfigError
from fastffn.nn.low_rank import product


def test_state_dict_is_the_documented_format() -> None:
    ffn = LowRankFFN(LowRankConfig(d_model=8, d_hidden=20, d_out=6, rank=3, gated=True))
    assert {k: tuple(v.shape) for k, v in ffn.state_dict().items()} == {
        "up.a.weight": (3, 8),
        "up.b.weight": (20, 3),
        "up.b.bias": (20,),
        "gate.a.weight": (3, 8),
        "gate.b.weight": (20, 3),
        "gate.b.bias": (20,),
        "down.a.weight": (3, 20),
        "down.b.weight": (6, 3),
        "down.b.bias": (6,),
    }


def test_formula() -> None:
    ffn = LowRankFFN(LowRankConfig(d_model=8, d_hidden=20, rank=3, activation="relu"))
    x = torch.randn(5, 8)
    up = (x @ ffn.up.a.weight.T) @ ffn.up.b.weight.T + ffn.up.b.bias
    down = (up.relu() @ ffn.down.a.weight.T) @ ffn.down.b.weight.T + ffn.down.b.bias
    torch.testing.assert_close(ffn(x), down)


def test_the_default_rank_is_a_quarter_of_the_width() -> None:
    assert LowRankConfig(d_model=256).resolved().rank == 64
    assert LowRankConfig(d_model=3).resolved().rank == 1


@settings(max_examples=25, deadline=None)
@given(
    d_model=st.integers(2, 24),
    d_hidden=st.integers(2, 40),
    d_out=st.integers(2, 24),
    gated=st.booleans(),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_full_rank_reproduces_dense(d_model, d_hidden, d_out, gated, bias, dtype) -> None:
    widths = {"d_model": d_model, "d_hidden": d_hidden, "d_out": d_out, "gated": gated, "bias": bias}
    dense = DenseFFN(DenseConfig(**widths)).to(dtype)
    rank = min(d_model, d_hidden, d_out)
    # A map wider than the rank on both sides keeps only part of its spectrum: compare where the rank is full.
    ffn = LowRankFFN.from_dense(dense, LowRankConfig(rank=rank))
    for name, linear in (("up", ffn.up), ("down", ffn.down)):
        weight = getattr(dense, name).weight
        if min(weight.shape) == rank:
            torch.testing.assert_close(product(linear.a.weight, linear.b.weight), weight, rtol=1e-4, atol=1e-5)
    if d_out == d_model and d_hidden >= d_model:
        x = torch.randn(7, d_model, dtype=dtype)
        torch.testing.assert_close(ffn(x), dense(x), rtol=1e-4, atol=1e-5)


def test_spectral_start_is_the_best_approximation_of_its_rank() -> None:
    dense = DenseFFN(DenseConfig(d_model=16, d_hidden=40))
    ffn = LowRankFFN.from_dense(dense, LowRankConfig(rank=5))
    s = torch.linalg.svdvals(dense.up.weight.double())
    error = (product(ffn.up.a.weight, ffn.up.b.weight) - dense.up.weight).double().norm()
    torch.testing.assert_close(error, s[5:].norm(), rtol=1e-4, atol=0)
    # Balanced: both factors have the same Gram matrix.
    a, b = ffn.up.a.weight, ffn.up.b.weight
    torch.testing.assert_close(a @ a.T, b.T @ b, rtol=1e-4, atol=1e-5)
    assert torch.equal(ffn.up.b.bias, dense.up.bias)


def test_rescaled_start_has_the_dense_norm() -> None:
    dense = DenseFFN(DenseConfig(d_model=16, d_hidden=40))
    for rescale in (False, True):
        ffn = LowRankFFN.from_dense(dense, LowRankConfig(rank=2, rescale=rescale))
        ratio = float(product(ffn.up.a.weight, ffn.up.b.weight).norm() / dense.up.weight.detach().norm())
        assert (abs(ratio - 1) < 1e-4) is rescale


def test_normal_start_has_the_dense_variance() -> None:
    dense = DenseFFN(DenseConfig(d_model=256, d_hidden=512))
    with torch.no_grad():
        dense.up.weight.normal_(0, 0.02)
    ffn = LowRankFFN.from_dense(dense, LowRankConfig(rank=64, start="normal"))
    deviation = float(product(ffn.up.a.weight, ffn.up.b.weight).std())
    assert deviation == pytest.approx(0.02, rel=0.05)
    assert float(ffn.up.a.weight.detach().std()) == pytest.approx(float(ffn.up.b.weight.detach().std()), rel=0.05)


def test_build_starts_like_a_dense_ffn() -> None:
    ffn = build(LowRankConfig(d_model=64, d_hidden=256, rank=64))
    # torch.nn.Linear: uniform +-1/sqrt(in), variance 1 / (3 in).
    assert float(product(ffn.up.a.weight, ffn.up.b.weight).var()) == pytest.approx(1 / (3 * 64), rel=0.1)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"rank": -4}, "rank is -4"),
        ({"rank": 2.5}, "rank is 2.5"),
        ({"rank": 17, "d_model": 16}, r"min\(in, out\) = 16"),
        ({"rank": 9, "d_model": 16, "d_out": 8}, r"min\(in, out\) = 8"),
        ({"start": "random"}, "spectral, normal"),
    ],
)
def test_bad_fields(fields: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build(LowRankConfig(**({"d_model": 32} | fields)))


def test_product_is_rounded_once() -> None:
    a, b = torch.randn(7, 33).bfloat16(), torch.randn(21, 7).bfloat16()
    exact = b.double() @ a.double()
    assert torch.equal(product(a, b), exact.to(torch.bfloat16))


@pytest.mark.parametrize("gated", [False, True])
def test_frobenius_decay_is_a_gradient_step_on_the_norm_of_the_product(gated: bool) -> None:
    ffn = LowRankFFN(LowRankConfig(d_model=8, d_hidden=20, rank=3, gated=gated)).double()
    expected = {}
    loss = sum(0.5 * (linear.b.weight @ linear.a.weight).square().sum() for linear in ffn._linears().values())
    loss.backward()
    for name, parameter in ffn.named_parameters():
        step = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        expected[name] = parameter.detach() - 0.1 * step
    ffn.decay_product_(0.1)
    for name, parameter in ffn.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], msg=name)


def test_from_dense_takes_no_widths_from_the_config() -> None:
    dense = DenseFFN(DenseConfig(d_model=8, d_hidden=12, activation="relu", dropout=0.25)).to(torch.float64)
    ffn = LowRankFFN.from_dense(dense, LowRankConfig(rank=2, activation="silu"))
    assert dataclasses.asdict(ffn.config) == dataclasses.asdict(dense.config) | {
        "rank": 2,
        "start": "spectral",
        "rescale": False,
    }
    assert ffn.up.a.weight.dtype == torch.float64
