"""What is converted, and what is refused with the model as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastffn
from fastffn import BlockConfig, LowRankConfig, NeuronTreeConfig
from fastffn.convert.match import fastffn_modules
from fastffn.convert.select import layer_filter, layers_and_patterns
from fastffn.errors import ConfigError, ConversionError, KindError
from tests.convert.models import first_output, make

PATHS = ["transformer.h.0.mlp", "transformer.h.1.mlp"]
CONFIG = LowRankConfig(rank=5)


def converted(model) -> list[str]:
    return [path for path, _ in fastffn_modules(model)]


@pytest.mark.parametrize(
    ("filter", "expected"),
    [
        (None, PATHS),
        ("transformer.h.*.mlp", PATHS),
        ("transformer.h.[1-5].mlp", PATHS[1:]),
        ("*.0.mlp", PATHS[:1]),
        (["*.0.mlp", "*.1.*"], PATHS),
        (lambda path: path.endswith("1.mlp"), PATHS[1:]),
    ],
)
def test_filters(filter, expected) -> None:
    model = make("gpt2")
    report = fastffn.convert(model, CONFIG, filter=filter)
    assert converted(model) == expected
    assert [layer.path for layer in report.layers if layer.config] == expected


@pytest.mark.parametrize("filter", ["h.0.mlp", ["*.0.mlp", "*.2.mlp"]])
def test_patterns_that_match_nothing(filter) -> None:
    model = make("gpt2")
    with pytest.raises(ConversionError, match=r"No FFN matches.*transformer\.h\.0\.mlp, transformer\.h\.1\.mlp"):
        fastffn.convert(model, CONFIG, filter=filter)
    assert not converted(model)


@pytest.mark.parametrize(
    ("layers", "expected"), [("0", PATHS[:1]), ("0-1", PATHS), (" 1 , 0-0", PATHS), ("1", PATHS[1:])]
)
def test_layer_numbers(layers, expected) -> None:
    assert [path for path in PATHS if layer_filter(make("gpt2"), layers)(path)] == expected


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ("0-2", "has 2 FFNs: their numbers are 0 to 1"),
        ("a", "rising ranges"),
        ("1-0", "rising"),
        ("", "rising"),
        ("0,", "rising"),
    ],
)
def test_bad_layer_numbers(layers, words) -> None:
    with pytest.raises(ConfigError, match=words):
        layer_filter(make("gpt2"), layers)


def test_numbers_and_patterns_together() -> None:
    takes = layers_and_patterns(make("gpt2"), "0-1", ["*.1.mlp"])
    assert [path for path in PATHS if takes(path)] == PATHS[1:]
    assert all(map(layers_and_patterns(make("gpt2"), None, []), PATHS))


def test_a_kind_for_each_layer() -> None:
    model = make("gpt2")
    report = fastffn.convert(model, {PATHS[0]: BlockConfig(blocks=2), PATHS[1]: CONFIG})
    assert [layer.kind for layer in report.layers] == ["block", "low_rank"]
    model = make("gpt2")
    report = fastffn.convert(model, {PATHS[0]: None, PATHS[1]: CONFIG})
    assert [layer.kind for layer in report.layers] == ["left as it was", "low_rank"]
    with pytest.raises(ConversionError, match=r"no FFN 'transformer\.h\.2\.mlp'.*Did you mean"):
        fastffn.convert(make("gpt2"), {"transformer.h.2.mlp": CONFIG})


def quantised():
    return torch.ao.quantization.quantize_dynamic(make("bert"), {nn.Linear}, dtype=torch.qint8)


def by_another_library():
    model = make("llama-tied")
    model.is_quantized, model.quantization_method = True, "bitsandbytes"
    return model


def whole_numbers():
    model = make("llama-tied")
    linear = model.model.layers[1].mlp.down_proj
    linear.weight = nn.Parameter(linear.weight.detach().to(torch.int8), requires_grad=False)
    return model


def tied():
    model = make("gpt2")
    model.transformer.h[1].mlp.c_fc.weight = model.transformer.h[0].mlp.c_fc.weight
    return model


def shared_module():
    model = make("gpt2")
    model.transformer.h[1].mlp = model.transformer.h[0].mlp
    return model


def tied_beside():
    model = make("bert")
    model.encoder.layer[1].output.dense.bias = model.encoder.layer[0].output.dense.bias
    return model


def adapters():
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    return peft.get_peft_model(
        make("gpt2"), peft.LoraConfig(target_modules=["c_fc"], fan_in_fan_out=True)
    ).base_model.model


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.parametrize(
    ("model", "words"),
    [
        (quantised, r"intermediate\.dense\.weight is no plain tensor"),
        (by_another_library, r"quantised \(bitsandbytes\)"),
        (whole_numbers, r"layers\.1\.mlp\.down_proj\.weight is of torch\.int8"),
        (tied, r"h\.0\.mlp shares a weight with transformer\.h\.1\.mlp\.c_fc\.weight"),
        (shared_module, r"h\.0\.mlp shares a weight with transformer\.h\.1\.mlp"),
        (tied_beside, r"shares a weight with encoder\.layer\.1\.output\.dense\.bias"),
        (adapters, r"lora_A.*merge_and_unload"),
        (lambda: make("gpt2").to("meta"), "on the device 'meta'"),
    ],
)
def test_ffns_that_are_not_plain(model, words) -> None:
    model = model()
    classes, state = [type(module) for module in model.modules()], model.state_dict()
    with pytest.raises(ConversionError, match=words):
        fastffn.convert(model, CONFIG)
    assert [type(module) for module in model.modules()] == classes
    assert list(model.state_dict()) == list(state)
    assert not hasattr(model.config, "quantization_config")


def test_tied_weights_elsewhere_are_no_matter() -> None:
    model = make("llama-tied")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    fastffn.convert(model, CONFIG)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    # An FFN that shares can be left out.
    model = tied()
    model.transformer.h[1].mlp.c_fc.weight = nn.Parameter(model.transformer.h[1].mlp.c_fc.weight.detach().clone())
    model.transformer.ln_f.bias = model.transformer.h[1].mlp.c_proj.bias
    fastffn.convert(model, CONFIG, filter="*.0.mlp")
    assert converted(model) == PATHS[:1]


def test_a_model_without_ffns() -> None:
    model = make("gpt2")
    model.transformer.h = nn.ModuleList()
    with pytest.raises(ConversionError, match="looked for GPT2MLP modules in GPT2LMHeadModel and found 0"):
        fastffn.convert(model, CONFIG)


def test_gated_ffns_and_trees() -> None:
    model = make("llama-tied")
    before = first_output(model)
    with pytest.raises((ConfigError, KindError)):
        fastffn.convert(model, NeuronTreeConfig(depth=2, trees=3))
    assert torch.equal(first_output(model), before)


def test_layers_described_for_another_model(tmp_path) -> None:
    from transformers import GPT2LMHeadModel

    import fastffn.hf
    from fastffn.errors import CheckpointError

    make("gpt2").save_pretrained(tmp_path)
    config = fastffn.hf.FastFFNConfig(CONFIG, {"transformer.h.7.mlp": None})
    with pytest.raises(CheckpointError, match=r"does not have: transformer\.h\.7\.mlp"):
        GPT2LMHeadModel.from_pretrained(tmp_path, quantization_config=config)
