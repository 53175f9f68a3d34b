"""Persistence: loads with `import fastffn.hf`, fails loudly without."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, Trainer, TrainingArguments

import fastffn
import fastffn.hf
from fastffn import LowRankConfig, LowRankFFN
from fastffn.errors import CheckpointError, ConfigError, KindError


def load_elsewhere(code: str, *arguments: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "TRANSFORMERS_VERBOSITY"}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


def test_save_and_load(gpt2, tokens, tmp_path) -> None:
    fastffn.convert(gpt2, LowRankConfig(rank=5))
    gpt2.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert stored == {
        "quant_method": "fastffn",
        "version": 1,
        "ffn": {"kind": "low_rank", "rank": 5, "start": "spectral", "rescale": False},
        "layers": {},
    }
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(loaded(tokens).logits, gpt2(tokens).logits)
    # And again: what was loaded saves itself.
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "again")(tokens).logits, gpt2(tokens).logits)


def test_load_with_the_configuration_of_another_one(gpt2, tokens, tmp_path) -> None:
    fastffn.convert(gpt2, LowRankConfig(rank=5))
    gpt2.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, config=gpt2.config)
    assert torch.equal(loaded(tokens).logits, gpt2(tokens).logits)


def test_layers_that_differ(gpt2, tokens, tmp_path) -> None:
    fastffn.convert(gpt2, LowRankConfig(rank=5), filter=lambda path: ".1." in path)
    gpt2.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert stored["layers"] == {"transformer.h.0.mlp": None}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(tokens).logits, gpt2(tokens).logits)
    assert not isinstance(loaded.transformer.h[0].mlp, LowRankFFN)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes(gpt2, tokens, tmp_path, dtype) -> None:
    fastffn.convert(gpt2, LowRankConfig(rank=5))
    gpt2.to(dtype).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.transformer.h[0].mlp.up.a.weight.dtype == dtype
    assert torch.equal(loaded(tokens).logits, gpt2(tokens).logits)
    wider = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert wider.transformer.h[0].mlp.up.a.weight.dtype == torch.float32


def test_sharded(gpt2, tokens, tmp_path) -> None:
    fastffn.convert(gpt2, LowRankConfig(rank=5))
    gpt2.save_pretrained(tmp_path, max_shard_size="8KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(tokens).logits, gpt2(tokens).logits)


def test_convert_while_loading(gpt2, tokens, tmp_path) -> None:
    gpt2.save_pretrained(tmp_path)
    config = fastffn.hf.FastFFNConfig(LowRankConfig(rank=3), {"transformer.h.0.mlp": LowRankConfig(rank=7)})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    assert [block.mlp.config.rank for block in loaded.transformer.h] == [7, 3]
    fastffn.convert(gpt2, LowRankConfig(rank=3), filter=lambda path: ".1." in path)
    x = torch.randn(2, 24)
    torch.testing.assert_close(loaded.transformer.h[1].mlp(x), gpt2.transformer.h[1].mlp(x))
    loaded.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(again(tokens).logits, loaded(tokens).logits)


def test_without_the_import_it_fails_and_says_what_to_do(gpt2, tmp_path) -> None:
    fastffn.convert(gpt2, LowRankConfig(rank=5))
    gpt2.save_pretrained(tmp_path)
    code = "import sys; from transformers import AutoModelForCausalLM as A; A.from_pretrained(sys.argv[1])"
    done = load_elsewhere(code, str(tmp_path))
    assert done.returncode != 0
    assert "RuntimeError" in done.stderr
    assert "import_fastffn.hf" in done.stderr
    # The same code with the import loads: it is the import that matters.
    assert load_elsewhere("import fastffn.hf; " + code, str(tmp_path)).returncode == 0


def test_without_the_import_the_bare_model_fails_too(gpt2, tmp_path) -> None:
    fastffn.convert(gpt2, LowRankConfig(rank=5), filter=lambda path: ".1." in path)
    gpt2.save_pretrained(tmp_path)
    code = "import sys; from transformers import AutoModel as A; A.from_pretrained(sys.argv[1])"
    assert load_elsewhere(code, str(tmp_path)).returncode != 0
    assert isinstance(AutoModel.from_pretrained(tmp_path).h[1].mlp, LowRankFFN)


def test_a_part_saved_on_its_own_fails_without_the_import_too(gpt2, tokens, tmp_path) -> None:
    fastffn.convert(gpt2, LowRankConfig(rank=5))
    gpt2.transformer.save_pretrained(tmp_path)
    code = "import sys; from transformers import AutoModel as A; A.from_pretrained(sys.argv[1])"
    assert load_elsewhere(code, str(tmp_path)).returncode != 0
    loaded = AutoModel.from_pretrained(tmp_path)
    expected = gpt2.transformer(tokens).last_hidden_state
    assert torch.equal(loaded(tokens).last_hidden_state, expected)


def test_a_shared_configuration_is_left_alone(gpt2, tokens, tmp_path) -> None:
    from transformers import GPT2LMHeadModel

    student = GPT2LMHeadModel(gpt2.config)
    fastffn.convert(student, LowRankConfig(rank=5))
    assert not hasattr(gpt2.config, "quantization_config")
    gpt2.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(tokens).logits, gpt2(tokens).logits)
    # All parts of the student look at the same new configuration.
    assert len({id(m.config) for m in student.modules() if hasattr(m, "config") and not isinstance(m, LowRankFFN)}) == 1


def test_dense_weights_under_a_description_of_factors_are_refused(gpt2, tmp_path) -> None:
    from transformers import GPT2LMHeadModel

    fastffn.convert(gpt2, LowRankConfig(rank=5))
    # Built from the configuration alone, it is dense, and says in its config.json that it is not.
    GPT2LMHeadModel(gpt2.config).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="12 of their tensors are missing"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_missing_factor_is_refused(gpt2, tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    fastffn.convert(gpt2, LowRankConfig(rank=5))
    gpt2.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["transformer.h.1.mlp.down.a.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"h\.1\.mlp\.down\.a\.weight"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_merged_model_needs_nothing_of_ours(gpt2, tokens, tmp_path) -> None:
    fastffn.convert(gpt2, LowRankConfig(rank=5))
    fastffn.merge(gpt2)
    gpt2.save_pretrained(tmp_path / "model")
    torch.save({"tokens": tokens, "logits": gpt2(tokens).logits.detach()}, tmp_path / "expected.pt")
    assert "fastffn" not in (tmp_path / "model" / "config.json").read_text().lower()
    code = (
        "import sys, torch\n"
        "from transformers import AutoModelForCausalLM\n"
        "expected = torch.load(sys.argv[2], weights_only=True)\n"
        "logits = AutoModelForCausalLM.from_pretrained(sys.argv[1])(expected['tokens']).logits\n"
        "assert 'fastffn' not in sys.modules\n"
        "assert torch.equal(logits, expected['logits']), (logits - expected['logits']).abs().max()\n"
    )
    done = load_elsewhere(code, str(tmp_path / "model"), str(tmp_path / "expected.pt"))
    assert done.returncode == 0, done.stderr


def test_the_reloaded_model_trains(gpt2, tokens, tmp_path) -> None:
    fastffn.convert(gpt2, LowRankConfig(rank=5))
    gpt2.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    before = loaded.transformer.h[0].mlp.up.a.weight.detach().clone()
    rows = [{"input_ids": row, "labels": row} for row in tokens.repeat(4, 1)]
    arguments = TrainingArguments(
        output_dir=tmp_path / "out",
        max_steps=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        logging_steps=100,
    )
    Trainer(loaded, arguments, train_dataset=rows).train()
    assert not torch.equal(loaded.transformer.h[0].mlp.up.a.weight, before)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"version": 2}, CheckpointError, "version 2"),
        ({"ffn": {"kind": "low_rnk", "rank": 5}}, KindError, "Did you mean 'low_rank'"),
        ({"ffn": {"kind": "low_rank", "rnk": 5}}, ConfigError, "Did you mean 'rank'"),
        ({"layers": {"transformer.h.7.mlp": None}}, CheckpointError, r"transformer\.h\.7\.mlp"),
    ],
)
def test_bad_descriptions_are_refused(gpt2, tmp_path, change, error, words) -> None:
    fastffn.convert(gpt2, LowRankConfig(rank=5))
    gpt2.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= change
    path.write_text(json.dumps(config))
    with pytest.raises(error, match=words):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_given_state_dict_is_what_is_saved(gpt2, tokens, tmp_path) -> None:
    fastffn.convert(gpt2, LowRankConfig(rank=5))
    expected = copy.deepcopy(gpt2)
    with torch.no_grad():
        expected.transformer.h[0].mlp.up.a.weight.mul_(2)
    gpt2.save_pretrained(tmp_path / "given", state_dict=expected.state_dict())
    gpt2.save_pretrained(tmp_path / "own")
    loaded, own = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("given", "own"))
    assert torch.equal(loaded(tokens).logits, expected(tokens).logits)
    assert torch.equal(own(tokens).logits, gpt2(tokens).logits)
    code = "import sys; from transformers import AutoModelForCausalLM as A; A.from_pretrained(sys.argv[1])"
    assert load_elsewhere(code, str(tmp_path / "given")).returncode != 0


def test_copies_save_themselves(gpt2, tokens, tmp_path) -> None:
    fastffn.convert(gpt2, LowRankConfig(rank=5))
    for copied in (copy.deepcopy(gpt2), pickle.loads(pickle.dumps(gpt2))):
        with torch.no_grad():
            copied.transformer.h[0].mlp.up.a.weight.mul_(2)
        copied.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(loaded(tokens).logits, copied(tokens).logits)
        assert not torch.equal(loaded(tokens).logits, gpt2(tokens).logits)
    fastffn.merge(gpt2)
    assert "save_pretrained" not in vars(gpt2)
