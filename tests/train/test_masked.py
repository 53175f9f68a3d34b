"""Pre-training of a model that predicts masked tokens, small: the same stages, another architecture."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForMaskedLM, PreTrainedTokenizerFast, pipeline

import fastffn.hf  # noqa: F401
from fastffn.convert.architectures import ARCHITECTURES
from fastffn.convert.fresh import ModelShape, fresh_model, started_model, step_bound
from fastffn.data.masking import mask_blocks
from fastffn.data.text import find_text
from fastffn.data.tokenizer import END_OF_TEXT, MASK, train_tokenizer
from fastffn.errors import CheckpointError, ConfigError, DataError
from fastffn.nn import LowRankConfig
from fastffn.train import trainer
from fastffn.train.config import start_fields
from fastffn.train.pretrain import pretrain
from fastffn.train.text import read_text
from tests.train.test_pretrain import tiny

BERT = {"architecture": "bert"}


def gpt2_directory(folder: Path) -> Path:
    fresh_model(ModelShape(layers=2, d_model=16, heads=2, sequence=16, vocabulary=300)).save_pretrained(folder / "gpt2")
    return folder / "gpt2"


@pytest.fixture(scope="module")
def finished(text_file, tmp_path_factory):
    output = tmp_path_factory.mktemp("masked") / "run"
    return output, pretrain(tiny(text_file, **BERT, dense_warmup=0.2), output)


def test_every_stage_is_there_and_learns(finished, capsys) -> None:
    output, results = finished
    assert list(results["stages"]) == ["dense", "warmup", "factorise", "stage1", "merge", "stage2"]
    for name in ("dense", "stage2"):
        curve = results["stages"][name]["curve"]
        assert curve[-1]["loss"] < curve[0]["loss"] < 6.2  # log(300) = 5.7 at the start
    assert json.loads((output / "results.json").read_text()) == results
    assert results["gain"]["free_ffn_bound"] > results["gain"]["bound"] > 1


def test_what_it_leaves_is_a_plain_bert_that_fills_masks(finished) -> None:
    output, results = finished
    model = AutoModelForMaskedLM.from_pretrained(output / "stage2")
    assert type(model).__name__ == "BertForMaskedLM"
    assert type(
        AutoModelForMaskedLM.from_pretrained(output / "stage1").bert.encoder.layer[0].intermediate
    ).__name__ == ("LowRankFFN")
    fill = pipeline("fill-mask", model=model, tokenizer=str(output / "stage2"))
    assert len(fill(f"the {fill.tokenizer.mask_token} sat", top_k=3)) == 3
    assert results["sample"]["masked"].count("<|mask|>") == 2 and "<|mask|>" not in results["sample"]["filled"]
    report = (output / "report.md").read_text()
    assert "Filled in by the final model" in report and "BERT, 2 layers x 16" in report
    assert "Losses are of masked tokens" in report and "exp(loss)" in report and "perplexity" not in report


def one_step(text_file, output, **changes) -> tuple[float, float]:
    """Norm of the gradient of one dense step, and the validation loss after it."""
    own = {"ffn": "dense", "rank": None, "steps": 1, "evaluate_every": 1, "log_every": 1}
    results = pretrain(tiny(text_file, **BERT, **own, **changes), output)
    state = json.loads((output / "dense" / "checkpoint-1" / "trainer_state.json").read_text())
    return state["log_history"][0]["grad_norm"], results["stages"]["dense"]["validation_loss"]


def test_a_step_is_the_same_however_its_batch_is_split(text_file, tmp_path) -> None:
    whole = one_step(text_file, tmp_path / "whole")
    assert one_step(text_file, tmp_path / "parts", micro_batch=1) == pytest.approx(whole, rel=1e-5)


def test_masks_are_new_at_each_step_and_the_same_at_each_validation(text_file, tmp_path, monkeypatch) -> None:
    keys = []

    def noted(ids, masking, *key):
        keys.append(key)
        return mask_blocks(ids, masking, *key)

    monkeypatch.setattr(trainer, "mask_blocks", noted)
    own = {"ffn": "dense", "rank": None, "steps": 3, "evaluate_every": 2, "micro_batch": 2, "seed": 7}
    pretrain(tiny(text_file, **BERT, **own), tmp_path / "run")
    steps = [key for key in keys if key]
    assert steps == [(7, 0), (7, 0), (7, 1), (7, 1), (7, 2), (7, 2)] and () in keys


def test_a_run_goes_on_as_if_it_had_not_been_stopped(finished, text_file, tmp_path) -> None:
    output, results = finished
    shutil.copytree(output, tmp_path / "run")
    for name in ("results.json", "stage2/stage.json", "stage2/model.safetensors"):
        (tmp_path / "run" / name).unlink()
    shutil.rmtree(tmp_path / "run" / "stage2" / "checkpoint-20")
    resumed = pretrain(tiny(text_file, **BERT, dense_warmup=0.2), tmp_path / "run")
    curves = [[point["loss"] for point in found["stages"]["stage2"]["curve"]] for found in (results, resumed)]
    assert curves[0] == curves[1] and len(curves[0]) == 2


def test_a_run_can_start_from_a_bert(finished, text_file, tmp_path) -> None:
    output, results = finished
    start = start_fields(str(output / "dense"))
    assert "architecture" not in start_fields(str(gpt2_directory(tmp_path)))
    assert start["architecture"] == "bert" and start["tokenizer"] == str(output / "dense")
    fields = {name: value for name, value in start.items() if name != "d_hidden"}
    config = tiny(text_file, **fields, init_from=str(output / "dense"), steps=10, baseline=False, start="spectral")
    again = pretrain(config, tmp_path / "run")
    assert again["stages"]["stage2"]["curve"][0]["loss"] < results["stages"]["dense"]["curve"][0]["loss"]


@pytest.mark.parametrize("end", ["sep_token", "eos_token", None])
def test_documents_end_with_what_the_tokenizer_has(end, text_file, tmp_path) -> None:
    trained = train_tokenizer(find_text(str(text_file)), 300, mask=True)
    ends = {} if end is None else {end: END_OF_TEXT}
    given = PreTrainedTokenizerFast(tokenizer_object=trained.backend_tokenizer, mask_token=MASK, **ends)
    given.save_pretrained(tmp_path / "tokenizer")
    config = tiny(text_file, **BERT, tokenizer=str(tmp_path / "tokenizer"))
    if end is None:
        with pytest.raises(DataError, match=r"neither eos_token nor sep_token"):
            read_text(config, None)
    else:
        text = read_text(config, None)
        assert text.tokenizer.eos_token_id in {int(i) for row in text.train for i in row["input_ids"]}
        # What a run leaves is read again when it goes on.
        text.tokenizer.save_pretrained(tmp_path / "kept")
        assert read_text(config, tmp_path / "kept").identity == text.identity


def test_bert_keeps_its_own_dropout(text_file) -> None:
    config = tiny(text_file, **BERT, dropout=0.25)
    assert config.ffn_config().dropout == 0 and tiny(text_file, dropout=0.25).ffn_config().dropout == 0.25
    model = fresh_model(config.shape(300), config.ffn_config())
    # Blocks are never padded: the first token of the vocabulary learns like the others.
    assert model.bert.embeddings.word_embeddings.padding_idx is None
    assert model.config.hidden_dropout_prob == model.config.attention_probs_dropout_prob == 0.25


def test_a_start_needs_the_whole_language_model(finished, text_file, tmp_path) -> None:
    output, _ = finished
    whole = AutoModelForMaskedLM.from_pretrained(output / "dense")
    whole.bert.save_pretrained(tmp_path / "encoder")
    with pytest.raises(CheckpointError, match=r"encoder holds no BertForMaskedLM: cls\.predictions.* are missing"):
        started_model(tmp_path / "encoder")
    whole.config.is_decoder = True
    whole.save_pretrained(tmp_path / "decoder")
    with pytest.raises(CheckpointError, match=r"see those before them only \(is_decoder\)"):
        started_model(tmp_path / "decoder")


def test_runs_of_versions_that_knew_one_architecture_go_on(text_file, tmp_path) -> None:
    own = {"ffn": "dense", "rank": None, "steps": 2, "evaluate_every": 1}
    before = pretrain(tiny(text_file, **own), tmp_path / "run")
    config = tmp_path / "run" / "config.yaml"
    kept = [line for line in config.read_text().splitlines() if not line.startswith("architecture:")]
    assert len(kept) < len(config.read_text().splitlines())
    config.write_text("\n".join(kept))
    assert pretrain(tiny(text_file, **own), tmp_path / "run") == before


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_shape_is_read_back_from_a_checkpoint(name, tmp_path) -> None:
    shape = ModelShape(
        architecture=name, layers=2, d_model=16, heads=2, sequence=8, vocabulary=40, d_hidden=24, dropout=0.5
    )
    fresh_model(shape).save_pretrained(tmp_path)
    assert ModelShape.of_checkpoint(tmp_path) == shape
    model = started_model(tmp_path, dropout=0.125)
    assert type(model).__name__ == ARCHITECTURES[name].model and ModelShape.of_checkpoint(tmp_path).dropout == 0.5
    assert all(getattr(model.config, field) == 0.125 for field in ARCHITECTURES[name].dropouts)


def test_attention_that_sees_both_sides_counts_whole() -> None:
    """2 layers x (8 d^2 + 4 d h) + head; attention 4 T d, half of it where only what came before is seen."""
    shape = {"layers": 2, "d_model": 64, "heads": 4, "sequence": 32, "vocabulary": 100}
    causal, both = (
        step_bound(ModelShape(architecture=name, **shape), LowRankConfig(rank=8)) for name in ("gpt2", "bert")
    )
    attention = 3 * 32 * 2 * 4 * 32 * 64
    transform = 3 * 32 * 2 * 64 * 64  # of the head of BERT
    assert both.dense - causal.dense == attention // 2 + transform
    assert both.dense - both.without_ffn == causal.dense - causal.without_ffn


def test_what_does_not_fit_is_refused(text_file, tokenizer, tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"Unknown architecture 'brt'; there are gpt2, bert. Did you mean 'bert'"):
        tiny(text_file, architecture="brt")
    tokenizer.save_pretrained(tmp_path / "gpt")
    with pytest.raises(ConfigError, match=r"'train:257'; with a mask token it has 258 at least"):
        tiny(text_file, **BERT, tokenizer="train:257")
    assert len(read_text(tiny(text_file, **BERT, tokenizer="train:258"), None).tokenizer) == 258
    with pytest.raises(DataError, match=r"has no mask token"):
        pretrain(tiny(text_file, **BERT, tokenizer=str(tmp_path / "gpt")), tmp_path / "run")
    (tmp_path / "t5").mkdir()
    (tmp_path / "t5" / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(CheckpointError, match=r"of type 't5'; training can start from gpt2 or bert"):
        ModelShape.of_checkpoint(tmp_path / "t5")
