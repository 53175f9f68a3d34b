"""Every family: its FFNs are found, converted, and given back as they were, in memory and on disk."""

from __future__ import annotations

import json

import pytest
import torch

import fastffn
from fastffn import BlockConfig, DenseConfig, LowRankConfig
from fastffn.convert.families import families
from fastffn.convert.match import family_ffns, family_of, fastffn_modules
from fastffn.convert.merge_command import merge_and_compare
from tests.convert.models import KIN, MODELS, D, H, first_output, make

ALL = [*MODELS, *KIN]


def test_all_model_types_have_a_model_here() -> None:
    types = {model_type for family in families() for model_type in family.ffn_classes}
    assert types == {make(name).config.model_type for name in ALL}


@pytest.mark.parametrize("name", ALL)
def test_layout(name) -> None:
    model = make(name)
    family = family_of(model.config)
    paths = [path for path, _ in family_ffns(model, family)]
    assert len(paths) == 2
    before, states = first_output(model), model.state_dict()
    classes = [type(module) for module in model.modules()]
    for path in paths:
        dense = family.to_dense(model, path)
        assert (dense.config.d_model, dense.config.d_hidden, dense.config.d_out) == (D, H, D)
        assert set(family.parameters(model, path)) == {key for key, _ in dense.named_parameters()}
        family.put_in(model, path, dense.eval())
    # Nothing but the dense kind computes now.
    assert len(list(fastffn_modules(model))) == 2 and not list(family_ffns(model, family))
    torch.testing.assert_close(first_output(model), before, rtol=1e-4, atol=1e-5)
    for path in paths:
        family.put_back(model, path, model.get_submodule(path))
    assert [type(module) for module in model.modules()] == classes
    assert list(model.state_dict()) == list(states)
    assert all(torch.equal(value, states[key]) for key, value in model.state_dict().items())
    assert torch.equal(first_output(model), before)


@pytest.mark.parametrize("name", ["bert", "llama-biases"])
def test_the_dense_kind_shares_memory(name) -> None:
    model = make(name)
    family = family_of(model.config)
    path = next(path for path, _ in family_ffns(model, family))
    dense, own = family.to_dense(model, path), family.parameters(model, path)
    assert all(parameter.data_ptr() == own[key].data_ptr() for key, parameter in dense.named_parameters())


def test_settings_are_read_off_the_model() -> None:
    found = {name: make(name) for name in ("bert", "electra", "llama-tied", "llama-biases", "gemma")}
    for model in found.values():
        fastffn.convert(model, LowRankConfig(rank=3, dropout=0.5))
    configs = {name: next(fastffn_modules(model))[1].config for name, model in found.items()}
    assert {name: (c.activation, c.bias, c.gated, c.dropout) for name, c in configs.items()} == {
        "bert": ("gelu", True, False, 0.0),
        "electra": ("relu", True, False, 0.0),
        "llama-tied": ("silu", False, True, 0.0),
        "llama-biases": ("silu", True, True, 0.0),
        "gemma": ("gelu_pytorch_tanh", False, True, 0.0),
    }


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("config", [LowRankConfig(rank=D), BlockConfig(blocks=2), DenseConfig()], ids=repr)
def test_convert_and_merge(name, config) -> None:
    model = make(name)
    before, keys = first_output(model), list(model.state_dict())
    classes = [type(module) for module in model.modules()]
    fastffn.convert(model, config)
    converted = first_output(model)
    if not isinstance(config, BlockConfig):  # at full rank the same function, up to rounding
        torch.testing.assert_close(converted, before, rtol=1e-3, atol=1e-4)
    else:
        assert not torch.allclose(converted, before, rtol=1e-3, atol=1e-4)
    fastffn.merge(model)
    torch.testing.assert_close(first_output(model), converted, rtol=1e-3, atol=1e-4)
    assert list(model.state_dict()) == keys
    assert [type(module) for module in model.modules()] == classes
    assert not hasattr(model.config, "quantization_config") and not hasattr(model, "hf_quantizer")


@pytest.mark.parametrize("name", MODELS)
def test_merge_on_disk(name, tmp_path) -> None:
    from transformers import AutoConfig

    model = make(name)
    fastffn.convert(model, LowRankConfig(rank=5), filter=lambda path: ".1." in path)
    model.save_pretrained(tmp_path / "in")
    result = merge_and_compare(tmp_path / "in", tmp_path / "out")
    assert len(result["layers"]) == 1
    assert result["largest_difference"] <= 1e-4 * result["largest_logit"]
    loaded, info = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    fastffn.merge(model)
    for key, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key
    assert "fastffn" not in json.dumps(AutoConfig.from_pretrained(tmp_path / "out").to_dict())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_stays(name, dtype) -> None:
    model = make(name).to(dtype)
    fastffn.convert(model, LowRankConfig(rank=5))
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    fastffn.merge(model)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert torch.isfinite(first_output(model)).all()


@pytest.mark.parametrize("name", ["bert-mlm", "llama-tied"])
def test_frozen_and_training_stay(name) -> None:
    model = make(name).train()
    family = family_of(model.config)
    first, second = (path for path, _ in family_ffns(model, family))
    for parameter in family.parameters(model, first).values():
        parameter.requires_grad_(False)
    fastffn.convert(model, LowRankConfig(rank=5))
    for step in range(2):
        frozen = [not any(p.requires_grad for p in model.get_submodule(path).parameters()) for path in (first, second)]
        assert frozen == [True, False]
        assert all(module.training for module in model.modules())
        if step == 0:
            fastffn.merge(model)
    assert not any(parameter.requires_grad for parameter in family.parameters(model, first).values())
    assert all(parameter.requires_grad for parameter in family.parameters(model, second).values())
