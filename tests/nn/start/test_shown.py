"""What every kind's start out of tokens does alike."""

from __future__ import annotations

import copy

import pytest
import torch

from fastffn import DenseConfig, LeafTreeConfig, MoEConfig, NeuronTreeConfig
from fastffn.errors import ConfigError, DtypeError, KindError, ShapeError
from fastffn.nn import FFN, DenseFFN, FFNConfig
from fastffn.registry import kind_of

D, H, O = 12, 40, 7  # noqa: E741
CONFIGS = [
    MoEConfig(experts=4, active=2, shared=8),
    MoEConfig(experts=3, active=1),
    LeafTreeConfig(depth=2, leaf_width=10, shared=6),
    LeafTreeConfig(depth=0, leaf_width=10),
    NeuronTreeConfig(depth=2, trees=2, shared=5),
    NeuronTreeConfig(depth=3, trees=1),
]
CASES = [pytest.param(config, id=f"{kind_of(config).name}-{i}") for i, config in enumerate(CONFIGS)]


def dense_ffn(**fields) -> DenseFFN:
    return DenseFFN(DenseConfig(**({"d_model": D, "d_hidden": H, "d_out": O} | fields)))


def start(dense: DenseFFN, config: FFNConfig, inputs: torch.Tensor | None) -> FFN:
    return kind_of(config).module.from_dense(dense, config, inputs)


def error(ffn: FFN, dense: DenseFFN, x: torch.Tensor) -> float:
    """Squared error in evaluation, of the variance of what is wanted."""
    with torch.no_grad():
        wanted = dense(x)
        return float((copy.deepcopy(ffn).eval()(x) - wanted).square().mean() / wanted.var(0).mean())


@pytest.mark.parametrize("config", CASES)
@pytest.mark.parametrize("gated", [False, True])
def test_better_than_a_random_module(config: FFNConfig, gated: bool) -> None:
    if gated and not hasattr(config, "gated"):
        pytest.skip(f"{kind_of(config).name} has no gated form")
    dense, x = dense_ffn(gated=gated, activation="silu"), torch.randn(2500, D)
    ffn = start(dense, config, x[:2000])
    fresh = kind_of(config).module(ffn.config)
    assert error(ffn, dense, x[2000:]) < min(0.9, 0.6 * error(fresh, dense, x[2000:]))


@pytest.mark.parametrize("config", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("training", [False, True])
def test_dtype_mode_and_the_dense_ffn_stay(config: FFNConfig, dtype: torch.dtype, training: bool) -> None:
    dense = dense_ffn().to(dtype).train(training).requires_grad_(False)
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    ffn = start(dense, config, torch.randn(100, D, dtype=dtype))
    assert {p.dtype for p in ffn.parameters()} == {dtype} and {p.device.type for p in ffn.parameters()} == {"cpu"}
    assert all(part.training == training for part in ffn.modules())
    assert all(p.requires_grad and p.grad is None and p.is_leaf for p in ffn.parameters())
    assert dense.training == training
    assert all(torch.equal(before[name], value) for name, value in dense.state_dict().items())
    assert ffn(torch.randn(3, D, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("config", CASES)
@pytest.mark.parametrize("tokens", [3, 300])
def test_the_same_twice_whatever_random_numbers_come_next(config: FFNConfig, tokens: int) -> None:
    dense, x = dense_ffn(), torch.randn(tokens, D)
    torch.manual_seed(1)
    one = start(dense, config, x)
    drawn = torch.rand(3)
    torch.manual_seed(2)
    other = start(dense, config, x)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())
    torch.manual_seed(1)
    assert torch.equal(torch.rand(3), drawn)


@pytest.mark.parametrize("config", CASES)
def test_the_callers_grad_mode_and_inputs_do_not_matter(config: FFNConfig) -> None:
    dense, x = dense_ffn(), torch.randn(50, D)
    wanted = start(dense, config, x).state_dict()
    with torch.no_grad():
        without = start(dense, config, x).state_dict()
    before = x.clone()
    tracked = start(dense, config, x.requires_grad_()).state_dict()
    assert torch.equal(x, before) and x.grad is None and dense.up.weight.grad is None
    for found in (without, tracked):
        assert all(torch.equal(value, found[name]) for name, value in wanted.items())


@pytest.mark.parametrize("config", CASES)
@pytest.mark.parametrize("case", ["one token", "constant tokens", "two kinds of token", "zeros"])
def test_what_few_tokens_show_is_kept(config: FFNConfig, case: str) -> None:
    """The dense outputs of the tokens are the module's too: its biases, or the neurons that it has, can hold them."""
    dense = dense_ffn()
    seen = {"one token": 1, "two kinds of token": 2}.get(case, 1)
    kinds_of_token = torch.zeros(1, D) if case == "zeros" else 3 * torch.randn(seen, D)
    x = kinds_of_token if case == "one token" else kinds_of_token.repeat(50, 1)
    ffn = start(dense, config, x)
    assert all(p.isfinite().all() for p in ffn.parameters())
    with torch.no_grad():
        wanted = dense(kinds_of_token)
        assert (ffn.eval()(kinds_of_token) - wanted).norm() < 0.3 * (wanted.norm() + 0.1)
        # Elsewhere it stays an FFN of about the same size.
        y = torch.randn(200, D)
        assert ffn(y).norm() < 10 * dense(y).norm()


@pytest.mark.parametrize("config", CASES)
def test_an_outlier_does_not_spoil_the_others(config: FFNConfig) -> None:
    dense, x = dense_ffn(), torch.randn(2500, D)
    spoilt = x[:2000].clone()
    spoilt[7] *= 1e4
    ffn = start(dense, config, spoilt)
    assert all(p.isfinite().all() for p in ffn.parameters())
    assert error(ffn, dense, x[2000:]) < 1


@pytest.mark.parametrize("config", CASES)
def test_inputs_that_are_not_usable(config: FFNConfig) -> None:
    dense, name = dense_ffn(), kind_of(config).name
    for inputs in (None, torch.zeros(0, D)):
        with pytest.raises(KindError, match=rf"'{name}' takes its start from tokens.*got none.*calibration"):
            start(dense, config, inputs)
    with pytest.raises(ShapeError, match=rf"\[5, {D + 1}\].*d_model={D}"):
        start(dense, config, torch.randn(5, D + 1))
    with pytest.raises(DtypeError, match=r"int64.*floating-point"):
        start(dense, config, torch.zeros(5, D, dtype=torch.int64))


@pytest.mark.parametrize("config", [MoEConfig, LeafTreeConfig, NeuronTreeConfig])
def test_a_shared_part_of_more_neurons_than_there_are(config: type[FFNConfig]) -> None:
    with pytest.raises(ConfigError, match=f"shared is {H + 1}; the dense FFN has only {H} neurons"):
        start(dense_ffn(), config(shared=H + 1), torch.randn(9, D))
