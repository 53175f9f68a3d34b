"""A sharded Hugging Face model saves the full state dict that it is given, by one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

import fastffn
import fastffn.hf
from fastffn import LowRankConfig, LowRankFFN
from fastffn.convert.io import REMEDY_TENSOR
from fastffn.convert.match import family_ffns, family_of, fastffn_modules
from fastffn.errors import CheckpointError
from tests.conftest import tiny_gpt2_config
from tests.parallel.processes import on_two_processes


def save_trained(mesh: DeviceMesh, folder: Path) -> None:
    model = converted()
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert isinstance(model, FSDPModule)
    ids = torch.randint(0, 97, (2, 16))
    model(input_ids=ids, labels=ids).loss.backward()
    torch.optim.AdamW(model.parameters(), lr=1e-2).step()
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    # As the Trainer does: only the process that saves calls save_pretrained. Nothing in it may wait for the other.
    if mesh.get_rank() == 0:
        model.save_pretrained(folder / "whole", state_dict=state, is_main_process=True)
        model.save_pretrained(folder / "pieces", state_dict=state, max_shard_size="8KB")
        assert model.hf_quantizer.given_state is None  # not kept alive
        torch.save({"ids": ids, "logits": logits, "state": state}, folder / "expected.pt")
        with pytest.raises(CheckpointError, match="full_state_dict=True"):
            model.save_pretrained(folder / "without")
    ffns_are_found(mesh)


def converted() -> Any:
    from transformers import GPT2LMHeadModel

    torch.manual_seed(1)
    model = GPT2LMHeadModel(tiny_gpt2_config())
    # The first block keeps transformers' own FFN.
    fastffn.convert(model, LowRankConfig(rank=5), filter=lambda path: ".1." in path)
    return model


def ffns_are_found(mesh: DeviceMesh) -> None:
    """An FFN that is sharded by itself has another class in front of its own."""
    model = converted()
    for block in model.transformer.h:
        fully_shard(block.mlp, mesh=mesh)
    assert type(model.transformer.h[0].mlp).__name__ != "GPT2MLP"
    assert [path for path, _ in family_ffns(model, family_of(model.config))] == ["transformer.h.0.mlp"]
    assert [path for path, _ in fastffn_modules(model)] == ["transformer.h.1.mlp"]


@pytest.mark.slow
def test_the_given_state_is_what_is_saved(tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    on_two_processes(save_trained, tmp_path)
    expected = torch.load(tmp_path / "expected.pt", weights_only=True)
    for name in ("whole", "pieces"):
        loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / name, output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert isinstance(loaded.transformer.h[1].mlp, LowRankFFN)
        for key, tensor in loaded.state_dict().items():
            assert torch.equal(tensor, expected["state"][key]), key
        torch.testing.assert_close(loaded(expected["ids"]).logits, expected["logits"])
    # The decoys are there too: without `import fastffn.hf` it does not load.
    with safe_open(tmp_path / "whole" / "model.safetensors", framework="pt") as file:
        assert {REMEDY_TENSOR, "transformer.h.1.mlp.c_fc.weight"} <= set(file.keys())
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["architectures"] == ["GPT2LMHeadModel"]
    fastffn.merge(loaded)
    torch.testing.assert_close(loaded(expected["ids"]).logits, expected["logits"], rtol=1e-4, atol=1e-4)
