"""The two-stage run with another kind in its first stage."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

import fastffn.hf
from fastffn import BlockFFN
from fastffn.train.config import PretrainConfig, get_preset
from fastffn.train.pretrain import pretrain

SMALL = {
    "tokenizer": "train:300",
    "layers": 2,
    "d_model": 16,
    "heads": 2,
    "sequence": 16,
    "ffn": "block",
    "blocks": 2,
    "steps": 20,
    "switch": 0.6,
    "learning_rate": 3e-3,
    "dense_layers": None,
    "rank": None,
    "dense_learning_rate": None,
    "factor_learning_rate": None,
    "ffn_learning_rate": None,
    "warmup_steps": 4,
    "rewarm_steps": 4,
    "evaluate_every": 4,
    "checkpoint_every": 4,
    "log_every": 4,
    "baseline": False,
}


def logits(model) -> torch.Tensor:
    return model.eval()(torch.arange(12)[None]).logits.detach()


@pytest.mark.parametrize("options", [{}, {"rank": 3, "start": "normal"}], ids=str)
def test_two_stages_with_blocks(text_file, tmp_path, options) -> None:
    config = PretrainConfig.from_flat(get_preset("demo") | SMALL | {"data": str(text_file)} | options)
    results = pretrain(config, tmp_path / "run")
    curve = results["stages"]["stage2"]["curve"]
    assert curve[-1]["loss"] < results["stages"]["stage1"]["curve"][0]["loss"] - 0.1
    stage1 = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "stage1")
    ffn = stage1.transformer.h[1].mlp
    assert isinstance(ffn, BlockFFN)
    assert (ffn.config.blocks, ffn.config.rank) == (2, options.get("rank", 0))
    factorised = logits(stage1)
    merged, stage2 = (AutoModelForCausalLM.from_pretrained(tmp_path / "run" / name) for name in ("merged", "stage2"))
    torch.testing.assert_close(logits(merged), factorised, rtol=1e-4, atol=1e-5)
    fastffn.merge(stage1)
    assert torch.equal(logits(merged), logits(stage1))
    assert not torch.allclose(logits(stage2), factorised, atol=1e-3)
    # Biases are the same tensors before and after: their optimizer state passes over, that of the matrices does not.
    state = torch.load(tmp_path / "run" / "merged" / "optimizer.pt", weights_only=True)
    kept = {
        name
        for group in state["param_groups"]
        for number, name in zip(group["params"], group["param_names"], strict=True)
        if number in state["state"]
    }
    assert "transformer.h.0.mlp.c_fc.bias" in kept
    assert "transformer.h.0.mlp.c_fc.weight" not in kept
