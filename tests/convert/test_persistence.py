"""Every kind in every family: saved, loaded, and used as any other model is used."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import Trainer, TrainingArguments, pipeline

import fastffn
import fastffn.hf
from fastffn.convert.match import fastffn_modules
from fastffn.errors import CheckpointError, KindError
from fastffn.registry import kind_of, kinds
from tests.convert.models import (
    CAUSAL,
    KINDS,
    MODELS,
    NEED_TOKENS,
    VOCABULARY,
    config_of,
    first_output,
    make,
    put,
    skip_unless_convertible,
    skip_unless_it_fits,
    tokens,
)

every_kind = pytest.mark.parametrize("kind", KINDS)
every_model = pytest.mark.parametrize("name", MODELS)


def loss_of(model, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids)[0].float().square().mean() + fastffn.auxiliary_loss(model)


@every_kind
@every_model
def test_saved_and_loaded(name, kind, tmp_path) -> None:
    model = put(make(name), kind)
    modules = list(fastffn_modules(model))
    assert len(modules) == 2 and all(kind_of(module.config).name == kind for _, module in modules)
    model.save_pretrained(tmp_path / "one")
    loaded, info = type(model).from_pretrained(tmp_path / "one", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert [type(module) for _, module in fastffn_modules(loaded)] == [type(module) for _, module in modules]
    assert torch.equal(first_output(loaded), first_output(model))
    loaded.save_pretrained(tmp_path / "two")
    assert torch.equal(first_output(type(model).from_pretrained(tmp_path / "two")), first_output(model))


@every_kind
@every_model
def test_converted_while_it_loads(name, kind, tmp_path) -> None:
    skip_unless_convertible(kind)
    model = make(name)
    skip_unless_it_fits(model, kind)
    model.save_pretrained(tmp_path)
    config = fastffn.hf.FastFFNConfig(config_of(kind))
    if kind in NEED_TOKENS:
        with pytest.raises(KindError, match="takes its start from tokens"):
            type(model).from_pretrained(tmp_path, quantization_config=config)
        return
    loaded = type(model).from_pretrained(tmp_path, quantization_config=config, dtype=torch.bfloat16)
    fastffn.convert(model.bfloat16(), config_of(kind))
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert len(list(fastffn_modules(loaded))) == 2
    assert [type(module) for _, module in fastffn_modules(loaded)] == [type(m) for _, m in fastffn_modules(model)]
    assert torch.isfinite(first_output(loaded)).all()
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(first_output(type(model).from_pretrained(tmp_path / "again")), first_output(loaded))


@every_kind
@every_model
def test_other_dtypes_and_autocast(name, kind) -> None:
    model = put(make(name), kind)
    expected = first_output(model)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        other = copy.deepcopy(model).to(dtype)
        assert all(
            parameter.dtype == dtype for _, module in fastffn_modules(other) for parameter in module.parameters()
        )
        output = first_output(other)
        assert output.dtype == dtype and torch.isfinite(output).all()
        if dtype == torch.float64:
            torch.testing.assert_close(output.float(), expected, rtol=1e-3, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(first_output(model)).all()


@every_kind
@every_model
def test_gradient_checkpointing(name, kind) -> None:
    plain = put(make(name), kind).train()
    checkpointed = copy.deepcopy(plain)
    # transformers 5.23 has renamed it.
    getattr(checkpointed, "activation_checkpointing_enable", checkpointed.gradient_checkpointing_enable)()
    for model in (plain, checkpointed):
        torch.manual_seed(0)
        loss_of(model, tokens()).backward()
    ours = [path for path, _ in fastffn_modules(plain)]
    compared = 0
    for (path, one), other in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        if one.grad is not None:
            torch.testing.assert_close(other.grad, one.grad, msg=path)
            compared += path.startswith(tuple(ours))
    assert compared >= 2 * len(ours) or not kinds()[kind].config.TRAINS


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CAUSAL)
def test_generates_with_its_cache(name, kind) -> None:
    model = put(make(name), kind)
    ids = tokens()
    outputs = [
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, use_cache=cached)
        for cached in (True, False)
    ]
    assert outputs[0].shape[1] > ids.shape[1]
    assert torch.equal(*outputs)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), [(name, "low_rank") for name in MODELS] + [("gpt2", kind) for kind in KINDS])
def test_compiled(name, kind) -> None:
    torch.compiler.reset()
    model = put(make(name), kind)
    with torch.no_grad():
        expected = first_output(model)
        torch.testing.assert_close(first_output(torch.compile(model)), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("name", "kind"), [(name, "low_rank") for name in MODELS] + [("gpt2", kind) for kind in KINDS])
def test_the_trainer_takes_a_step(name, kind, tmp_path) -> None:
    put(make(name), kind).save_pretrained(tmp_path / "model")
    model = type(make(name)).from_pretrained(tmp_path / "model")
    trains = kinds()[kind].config.TRAINS
    learning = [next((module if trains else model).parameters()) for _, module in fastffn_modules(model)]
    before = [parameter.detach().clone() for parameter in learning]

    class OwnLoss(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            return loss_of(model, inputs["input_ids"])

    arguments = TrainingArguments(
        output_dir=tmp_path / "out",
        max_steps=1,
        per_device_train_batch_size=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        logging_strategy="no",
        learning_rate=1e-2,
    )
    OwnLoss(model, arguments, train_dataset=[{"input_ids": row} for row in tokens()]).train()
    assert not any(torch.equal(*pair) for pair in zip(learning, before, strict=True))
    # What the Trainer has saved is a checkpoint like any other.
    saved = type(model).from_pretrained(tmp_path / "out" / "checkpoint-1").eval()
    assert torch.equal(first_output(saved), first_output(model.eval()))


TASKS = {
    "gpt2": "text-generation",
    "bert-mlm": "fill-mask",
    "bert": "feature-extraction",
    "roberta-classifier": "text-classification",
    "llama-tied": "text-generation",
    "qwen2": "text-generation",
    "mistral": "text-generation",
}


@pytest.fixture(scope="module")
def words():
    """A tokenizer of the models' vocabulary: a word for each number."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[MASK]", "[END]"]
    vocabulary = {word: n for n, word in enumerate([*special, *(f"w{n}" for n in range(VOCABULARY - len(special)))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[END]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", mask_token="[MASK]", eos_token="[END]", unk_token="[END]"
    )


@every_model
def test_pipelines(name, tmp_path, words) -> None:
    put(make(name), "low_rank").save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    run = pipeline(TASKS[name], model=str(tmp_path), device="cpu")
    assert len(list(fastffn_modules(run.model))) == 2
    text = "w1 w2 [MASK] w4" if TASKS[name] == "fill-mask" else "w1 w2 w3 w4"
    assert run(text, **({"max_new_tokens": 5} if TASKS[name] == "text-generation" else {}))


@every_model
def test_the_version_and_unknown_kinds_are_refused(name, tmp_path) -> None:
    model = put(make(name), "low_rank")
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["version"] = 2
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"version 2.*install the FastFFN that wrote it, or a newer one"):
        type(model).from_pretrained(tmp_path)


REFUSED_SCRIPT = """
import sys, transformers
for name, architecture, directory in zip(*[iter(sys.argv[1:])] * 3):
    try:
        getattr(transformers, architecture).from_pretrained(directory)
    except Exception as error:
        print(name, type(error).__name__, flush=True)
    else:
        print(name, "loaded", flush=True)
"""


@pytest.mark.parametrize("imported", [False, True])
def test_without_the_import_all_are_refused(imported, tmp_path) -> None:
    arguments = []
    cases = [(name, "low_rank") for name in MODELS] + [("bert", kind) for kind in KINDS]
    for name, kind in cases:
        directory = tmp_path / f"{name}-{kind}"
        put(make(name), kind).save_pretrained(directory)
        arguments += [f"{name}-{kind}", MODELS[name][0], str(directory)]
    code = ("import fastffn.hf\n" if imported else "") + REFUSED_SCRIPT
    environment = {key: value for key, value in os.environ.items() if key != "TRANSFORMERS_VERBOSITY"}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr
    verdict = "loaded" if imported else "RuntimeError"
    assert done.stdout.splitlines() == [f"{name}-{kind} {verdict}" for name, kind in cases]
    if not imported:
        assert done.stderr.count("_this_checkpoint_needs__import_fastffn.hf") == len(cases)


LORA = {"gpt2": ["c_attn"], "bert-mlm": ["query", "value"], "bert": ["query", "value"]}


# PEFT asks transformers by a name that 5.23 has changed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@every_model
def test_adapters_on_attention(name, tmp_path) -> None:
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    model = put(make(name), "low_rank")
    targets = LORA.get(name, ["query", "value"] if name.startswith("roberta") else ["q_proj", "v_proj"])
    expected = first_output(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets, fan_in_fan_out=name == "gpt2"))
    # An adapter begins as nothing.
    torch.testing.assert_close(first_output(adapted), expected)
    loss_of(adapted, tokens()).backward()
    trained = {path for path, parameter in adapted.named_parameters() if parameter.grad is not None}
    assert trained and all("lora_" in path for path in trained)
    with torch.no_grad():
        for path, parameter in adapted.named_parameters():
            if "lora_B" in path:
                parameter.normal_()
    changed = first_output(adapted)
    assert not torch.allclose(changed, expected, atol=1e-3)
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(put(make(name), "low_rank"), tmp_path / "adapter").eval()
    torch.testing.assert_close(first_output(loaded), changed)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(first_output(merged), changed, rtol=1e-3, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(first_output(type(merged).from_pretrained(tmp_path / "merged")), first_output(merged))
