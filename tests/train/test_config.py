from __future__ import annotations

import pytest
import yaml

from fastffn.errors import ConfigError, FastFFNError
from fastffn.registry import kinds
from fastffn.train.config import PRESETS, PretrainConfig, ffn_option_types, get_preset, mergeable_kinds
from fastffn.train.rundir import dump_config


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid_and_survive_yaml(name) -> None:
    config = PretrainConfig.from_flat(get_preset(name))
    assert PretrainConfig.from_flat(yaml.safe_load(dump_config(config))) == config


def test_the_published_set_up() -> None:
    config = PretrainConfig.from_flat(get_preset("seed"))
    assert (config.layers, config.d_model, config.heads, config.sequence) == (6, 768, 12, 1024)
    assert (config.vocabulary, config.batch, config.warmup_steps) == (50257, 16, 2000)
    assert (config.learning_rate, config.learning_rate * config.min_lr_ratio) == (5e-6, pytest.approx(1e-7))
    assert (config.epochs, config.steps, config.restart) == (1.0, None, True)
    # Adam is AdamW without weight decay.
    assert config.weight_decay == 0
    ffn = config.ffn_config()
    assert (ffn.rank, ffn.start) == (8, "normal")


def test_gpt2_small() -> None:
    config = PretrainConfig.from_flat(get_preset("gpt2-small"))
    assert (config.layers, config.d_model, config.learning_rate) == (12, 768, 6e-4)
    assert (config.beta1, config.beta2, config.weight_decay, config.clip) == (0.9, 0.95, 0.1, 1.0)
    assert (config.schedule, config.precision, config.compile) == ("wsd", "auto", False)
    assert (config.ffn, config.ffn_config().to_dict()["width"], config.decay) == ("narrow", 768, 0.25)


def test_an_option_of_another_kind_names_those_that_have_it() -> None:
    values = get_preset("gpt2-small") | {"data": "x", "rank": 8}
    with pytest.raises(ConfigError, match=r"'narrow' has no option 'rank'; it has .*width\. .* it: block, low_rank\."):
        PretrainConfig.from_flat(values)


def test_options_come_from_the_registry() -> None:
    assert mergeable_kinds() == ["block", "low_rank", "narrow"]
    options = ffn_option_types()
    assert set(options) == {name for kind in kinds().values() for name in kind.config.own_fields()}
    assert options["rank"] == (int, "block, low_rank")
    assert options["leaf_width"] == (int, "leaf_tree")
    config = PretrainConfig.from_flat({"rank": 7, "start": "normal"})
    assert config.ffn_options == {"rank": 7, "start": "normal"}
    assert config.to_flat()["rank"] == 7


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"rank": -1}, "rank is -1"),
        ({"rank": 257}, r"min\(in, out\) = 256"),
        ({"rank": 33, "d_hidden": 32}, r"min\(in, out\) = 32"),
        ({"heads": 7}, "heads is 7, which does not divide d_model 256; the nearest that does is 8"),
        ({"ffn": "low-rank"}, "Did you mean 'low_rank'"),
        ({"learnng_rate": 1}, "Did you mean 'learning_rate'"),
        ({"batch": 6, "micro_batch": 4}, "does not divide"),
        ({"switch": 1.0}, "switch is 1.0"),
        ({"dense_warmup": 0.7}, "below switch"),
        ({"decay": 0.5}, r"at most 1 - switch = 0.3"),
        ({"schedule": "cosine"}, "dense one only"),
        ({"epochs": 1.0}, "steps is 360 and epochs is 1.0; give one of the two"),
        ({"steps": None}, "one of the two"),
        ({"steps": 0}, "steps is 0"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"learning_rate": float("inf")}, "learning_rate is inf"),
        ({"ffn_learning_rate": 0.0}, "ffn_learning_rate is 0.0"),
        (
            {"ffn": "dense", "rank": None, "factor_learning_rate": 1e-3},
            "factor_learning_rate is 0.001, but ffn is dense and there are no factors; ffn_learning_rate is",
        ),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"initializer_range": 0.0}, "initializer_range is 0.0"),
        (
            {"initializer_range": 0.06, "init_from": "checkpoint"},
            "initializer_range is 0.06, but the run starts from the weights of checkpoint; leave one",
        ),
        ({"validation_fraction": 0.0}, "validation_fraction is 0.0"),
        ({"tokenizer": "train:10"}, "at least 257"),
        ({"activation": "gelo"}, "Did you mean 'gelu'"),
        ({"optimizer": "sgd"}, "AdamW"),
        ({"ffn": "narrow", "rank": None, "drop": True}, "never learn. Leave it out .*--d-hidden N"),
        (
            {"ffn": "moe", "rank": None, "init_from": "checkpoint"},
            "ffn is moe, .* init_from is checkpoint. .* fastffn convert checkpoint OUT --ffn moe --calibration TEXT",
        ),
        ({"restart": True, "dense_warmup": 0.1}, "exclude each other"),
        ({"precision": "fp8"}, "precision is 'fp8'"),
    ],
    ids=str,
)
def test_bad_values(change, words) -> None:
    with pytest.raises(FastFFNError, match=words):
        PretrainConfig.from_flat(get_preset("demo") | change)


def test_unknown_preset() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'gpt2-small'"):
        get_preset("gpt2small")


def test_a_slash_at_the_end_says_folder_and_is_the_same_run() -> None:
    one, other = (PretrainConfig.from_flat(get_preset("demo") | {"data": data}) for data in ("texts", "texts/"))
    assert other.data == "texts/"  # what is no folder here is not asked for elsewhere
    assert one.to_flat() == other.to_flat()
