from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fastffn
from fastffn import DenseFFN, LowRankConfig, LowRankFFN
from fastffn.convert.match import family_of, fastffn_modules
from fastffn.errors import ConfigError, ConversionError


def test_full_rank_keeps_the_logits(gpt2, tokens) -> None:
    before = gpt2(tokens).logits
    report = fastffn.convert(gpt2, LowRankConfig(rank=24))
    assert [layer.path for layer in report.layers] == ["transformer.h.0.mlp", "transformer.h.1.mlp"]
    assert all(isinstance(block.mlp, LowRankFFN) for block in gpt2.transformer.h)
    torch.testing.assert_close(gpt2(tokens).logits, before, rtol=1e-4, atol=1e-4)


def test_a_low_rank_changes_the_logits(gpt2, tokens) -> None:
    before = gpt2(tokens).logits
    fastffn.convert(gpt2, LowRankConfig(rank=1))
    assert (gpt2(tokens).logits - before).abs().max() > 1e-2


def test_report(gpt2) -> None:
    before = sum(p.numel() for p in gpt2.parameters())
    report = fastffn.convert(gpt2, LowRankConfig(rank=4), filter=lambda path: ".1." in path)
    assert [layer.kind for layer in report.layers] == ["left as it was", "low_rank"]
    saved = sum(layer.parameters_before - layer.parameters_after for layer in report.layers)
    assert sum(p.numel() for p in gpt2.parameters()) == before - saved
    assert "transformer.h.1.mlp: low_rank" in str(report)
    assert "transformer.h.0.mlp: left as it was (not selected)" in str(report)
    assert isinstance(gpt2.transformer.h[1].mlp, LowRankFFN)
    assert not isinstance(gpt2.transformer.h[0].mlp, LowRankFFN)


def test_settings_are_read_off_the_model() -> None:
    from transformers import GPT2LMHeadModel

    from tests.conftest import tiny_gpt2_config

    model = GPT2LMHeadModel(tiny_gpt2_config(n_inner=50, activation_function="relu", resid_pdrop=0.25))
    fastffn.convert(model, LowRankConfig(rank=3, activation="silu", dropout=0.0))
    config = model.transformer.h[0].mlp.config
    assert (config.d_model, config.d_hidden, config.d_out) == (24, 50, 24)
    assert (config.activation, config.dropout, config.bias, config.gated) == ("relu", 0.25, True, False)


def test_merge_undoes_convert(gpt2, tokens) -> None:
    original_keys = list(gpt2.state_dict())
    classes = [type(module) for module in gpt2.modules()]
    fastffn.convert(gpt2, LowRankConfig(rank=5))
    factorised = gpt2(tokens).logits
    assert fastffn.merge(gpt2) is gpt2
    assert list(gpt2.state_dict()) == original_keys
    assert [type(module) for module in gpt2.modules()] == classes
    torch.testing.assert_close(gpt2(tokens).logits, factorised, rtol=1e-4, atol=1e-5)
    assert not any("fastffn" in str(value).lower() for value in vars(gpt2).values())
    assert not hasattr(gpt2.config, "quantization_config")
    assert not hasattr(gpt2, "hf_quantizer")


def test_merged_weights_learn(gpt2, tokens) -> None:
    fastffn.convert(gpt2, LowRankConfig(rank=5))
    fastffn.merge(gpt2)
    gpt2(input_ids=tokens, labels=tokens).loss.backward()
    assert gpt2.transformer.h[0].mlp.c_fc.weight.grad.abs().sum() > 0


def test_merge_without_a_hugging_face_model() -> None:
    model = nn.Sequential(nn.Linear(6, 8), LowRankFFN(LowRankConfig(d_model=8, rank=2)))
    x = torch.randn(3, 6)
    before = model(x)
    fastffn.merge(model)
    assert isinstance(model[1], DenseFFN)
    torch.testing.assert_close(model(x), before)
    assert isinstance(fastffn.merge(LowRankFFN(LowRankConfig(d_model=8, rank=2))), DenseFFN)


def test_frozen_stays_frozen(gpt2) -> None:
    gpt2.transformer.h[0].mlp.requires_grad_(False)
    fastffn.convert(gpt2, LowRankConfig(rank=5))
    trainable = [all(p.requires_grad for p in block.mlp.parameters()) for block in gpt2.transformer.h]
    assert trainable == [False, True]
    assert not any(p.requires_grad for p in gpt2.transformer.h[0].mlp.parameters())
    fastffn.merge(gpt2)
    assert [p.requires_grad for p in gpt2.transformer.h[0].mlp.parameters()] == [False] * 4
    assert [p.requires_grad for p in gpt2.transformer.h[1].mlp.parameters()] == [True] * 4


def test_half_and_float_go_on_working(gpt2, tokens) -> None:
    fastffn.convert(gpt2, LowRankConfig(rank=5))
    assert gpt2.half().transformer.h[0].mlp.up.a.weight.dtype == torch.float16
    assert gpt2.float().transformer.h[0].mlp.up.a.weight.dtype == torch.float32
    assert torch.isfinite(copy.deepcopy(gpt2)(tokens).logits).all()


def test_nothing_to_merge(gpt2) -> None:
    with pytest.raises(ConversionError, match="holds no FastFFN module"):
        fastffn.merge(gpt2)


def test_twice_is_refused(gpt2) -> None:
    fastffn.convert(gpt2, LowRankConfig(rank=5))
    with pytest.raises(ConversionError, match=r"fastffn\.merge"):
        fastffn.convert(gpt2, LowRankConfig(rank=5))


def test_unknown_families_are_named() -> None:
    with pytest.raises(ConversionError, match="gpt2"):
        fastffn.convert(nn.Linear(3, 3), LowRankConfig(rank=1))


def test_no_ffn_selected(gpt2) -> None:
    with pytest.raises(ConversionError, match="found 2, of which the filter took none"):
        fastffn.convert(gpt2, LowRankConfig(rank=1), filter=lambda path: False)


def test_a_wrong_rank_leaves_the_model_as_it_was(gpt2, tokens) -> None:
    before = gpt2(tokens).logits
    with pytest.raises(ConfigError, match=r"min\(in, out\) = 24"):
        fastffn.convert(gpt2, LowRankConfig(rank=25))
    assert torch.equal(gpt2(tokens).logits, before)
    assert not list(fastffn_modules(gpt2))


def test_family_layout_is_a_round_trip(gpt2) -> None:
    family = family_of(gpt2.config)
    path = "transformer.h.0.mlp"
    mlp, dense = gpt2.get_submodule(path), family.to_dense(gpt2, path)
    x = torch.randn(3, 24)
    torch.testing.assert_close(dense(x), mlp(x))
    family.put_back(gpt2, path, dense)
    back = gpt2.get_submodule(path)
    assert back is not mlp
    assert {k: v.tolist() for k, v in back.state_dict().items()} == {k: v.tolist() for k, v in mlp.state_dict().items()}
