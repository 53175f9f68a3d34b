"""The `int8` kind: what rounding leaves of a dense FFN, where gradients go, and where it is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fastffn
from fastffn import DenseConfig, DenseFFN
from fastffn.convert.budget.search import _brief
from fastffn.convert.report import cost
from fastffn.errors import KindError
from fastffn.nn import Int8Config, Int8FFN
from fastffn.train.config import PretrainConfig
from tests.conftest import tiny_gpt2_config

GATED = DenseConfig(d_model=96, d_hidden=160, gated=True, bias=False, activation="silu")


@pytest.mark.parametrize("config", [DenseConfig(d_model=96, d_hidden=160, d_out=40), GATED])
def test_each_weight_is_within_half_a_step_and_outputs_are_near(config: DenseConfig) -> None:
    dense = DenseFFN(config).eval()
    ffn = Int8FFN.from_dense(dense, Int8Config())
    for name in config.linear_maps():
        weight, own = getattr(dense, name).weight, getattr(ffn, name)
        assert own.weight.dtype == torch.int8
        torch.testing.assert_close(own.scale, weight.detach().abs().amax(1) / 127)
        away = (own.weight * own.scale[:, None] - weight).abs()
        assert (away <= 0.501 * own.scale[:, None]).all()
    x = torch.randn(50, 96)
    with torch.no_grad():
        y, expected = ffn(x), dense(x)
    # Steps of 1/127 of the largest weight of a row, their errors uniform.
    assert 0 < (y - expected).norm() / expected.norm() < 0.02


def test_nothing_is_trained_and_a_gradient_reaches_x() -> None:
    ffn = fastffn.build(Int8Config(d_model=20, d_hidden=30, gated=True, activation="silu"))
    assert list(ffn.parameters()) == [] and len(ffn.state_dict()) == 9
    x = torch.randn(5, 20, requires_grad=True)
    merged = ffn.merge()
    torch.testing.assert_close(ffn(x), merged(x))
    (found,) = torch.autograd.grad(ffn(x).square().sum(), x)
    (expected,) = torch.autograd.grad(merged(x).square().sum(), x)
    torch.testing.assert_close(found, expected)
    assert not ffn(x.detach()).requires_grad


def test_merging_gives_weights_that_learn_again() -> None:
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel(tiny_gpt2_config())
    fastffn.convert(model, Int8Config())
    merged = fastffn.merge(model)
    assert all(parameter.requires_grad for parameter in merged.transformer.h[0].mlp.parameters())
    frozen = GPT2LMHeadModel(tiny_gpt2_config()).requires_grad_(False)
    fastffn.convert(frozen, Int8Config())
    assert not any(parameter.requires_grad for parameter in fastffn.merge(frozen).parameters())


@pytest.mark.parametrize("config", [DenseConfig(d_model=96, d_hidden=160, d_out=40), GATED])
def test_int8_weights_are_counted(config: DenseConfig) -> None:
    dense = cost(config.resolved())
    assert cost(Int8Config().fitted_to(config)) == dense
    assert _brief(Int8Config()) == "int8"


def test_pre_training_it_is_refused() -> None:
    with pytest.raises(KindError, match=r"'int8' cannot be trained.*fastffn convert MODEL OUT --ffn int8"):
        PretrainConfig(ffn="int8")


def test_recovering_it_is_refused(tmp_path: Path) -> None:
    from transformers import GPT2LMHeadModel

    from fastffn.train.distill.models import choose_trainable

    model = GPT2LMHeadModel(tiny_gpt2_config())
    fastffn.convert(model, Int8Config())
    with pytest.raises(KindError, match="of kind int8, whose weights do not learn"):
        choose_trainable(model, "all")


def test_recovering_it_is_refused_before_anything_is_done(tmp_path: Path) -> None:
    from transformers import GPT2LMHeadModel

    from fastffn.train.distill.models import find_pair

    GPT2LMHeadModel(tiny_gpt2_config()).save_pretrained(tmp_path / "teacher")
    model = GPT2LMHeadModel.from_pretrained(tmp_path / "teacher")
    fastffn.convert(model, Int8Config())
    model.save_pretrained(tmp_path / "student")
    with pytest.raises(KindError, match="of kind int8, whose weights do not learn"):
        find_pair(tmp_path / "student", tmp_path / "teacher")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tokens_of_another_dtype_as_under_fsdp_with_mixed_precision(dtype: torch.dtype) -> None:
    ffn = fastffn.build(Int8Config(d_model=20, d_hidden=30))
    x = torch.randn(5, 20)
    for given in (x.to(dtype), x.to(dtype).requires_grad_()):
        y = ffn(given)
        assert y.dtype == dtype
        torch.testing.assert_close(y.float(), ffn(x), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_are_rounded_to_steps_of_the_scale_that_is_kept(dtype: torch.dtype) -> None:
    dense = DenseFFN(DenseConfig(d_model=96, d_hidden=160)).to(dtype)
    ffn = Int8FFN.from_dense(dense, Int8Config())
    scale, weight = ffn.up.scale.double()[:, None], dense.up.weight.double()
    # The last step may be missing: a scale that was rounded down does not reach the largest weight.
    reached = weight.abs() <= 127 * scale
    assert ((ffn.up.weight * scale - weight).abs() <= 0.501 * scale)[reached].all()
    assert reached.double().mean() > 0.98
