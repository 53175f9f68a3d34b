"""Every kind under gradient checkpointing, and under fp16 with loss scaling."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastffn
from fastffn.errors import KindError
from fastffn.nn import DenseConfig, DenseFFN, FFNConfig
from fastffn.nn.base import FFN
from fastffn.registry import kinds
from tests.conftest import tiny_gpt2_config
from tests.contract.test_kinds import CASES, NAMES, D, config_of

CONVERTIBLE = [name for name in NAMES if kinds()[name].module.from_dense.__func__ is not FFN.from_dense.__func__]


def gradients_of(module: nn.Module, run) -> list[torch.Tensor]:
    module.zero_grad()
    torch.manual_seed(7)
    run().float().square().mean().backward()
    return [parameter.grad.clone() for parameter in module.parameters()]


@pytest.mark.parametrize("config", CASES)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradient_checkpointing(config: FFNConfig, dropout: float) -> None:
    ffn = fastffn.build(type(config)(**(config.to_dict() | {"dropout": dropout})))
    x, again = (torch.randn(9, D, generator=torch.Generator().manual_seed(3)).requires_grad_() for _ in range(2))
    forwards = []
    ffn.register_forward_pre_hook(lambda *_: forwards.append(1))
    plain = gradients_of(ffn, lambda: ffn(x))
    assert len(forwards) == 1
    kept = gradients_of(ffn, lambda: checkpoint(ffn, again, use_reentrant=False))
    assert len(forwards) == 3  # once more in backward
    for one, other in zip([x.grad, *plain], [again.grad, *kept], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", CONVERTIBLE)
def test_gradient_checkpointing_of_a_converted_model(name: str, tokens: torch.Tensor) -> None:
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel(tiny_gpt2_config(resid_pdrop=0.2, embd_pdrop=0.1, attn_pdrop=0.1)).train()
    try:
        fastffn.convert(model, kinds()[name].config())
    except KindError as error:
        pytest.skip(f"{name}: {error}")
    forwards = []
    model.transformer.h[0].mlp.register_forward_pre_hook(lambda *_: forwards.append(1))
    plain = gradients_of(model, lambda: model(input_ids=tokens, labels=tokens, use_cache=False).loss)
    # Newer versions of transformers have another name for it, and warn of the old one.
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    kept = gradients_of(model, lambda: model(input_ids=tokens, labels=tokens, use_cache=False).loss)
    assert len(forwards) == 3
    for one, other in zip(plain, kept, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", NAMES)
def test_fp16_with_loss_scaling(name: str) -> None:
    if not kinds()[name].config.TRAINS:
        pytest.skip(f"{name} is for inference: nothing learns")
    # gelu and no dropout: what is learnt is a dense FFN of the same widths.
    ffn = fastffn.build(config_of(name))
    teacher = DenseFFN(DenseConfig(d_model=D, d_hidden=36, activation="gelu_new"))
    x = torch.randn(256, D)
    with torch.no_grad():
        target = 3 * teacher(x)
    optimizer = torch.optim.AdamW(ffn.parameters(), lr=1e-2, weight_decay=0.0)
    # Starts too high for half precision: it must come down by itself, and no step be taken meanwhile.
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)

    def step(factor: float = 1.0) -> float:
        with torch.autocast("cpu", torch.float16):
            y = ffn(x)
            assert y.dtype == torch.float16
            loss = (y.float() - target).square().mean()
        optimizer.zero_grad()
        scaler.scale(loss * factor).backward()
        scaler.unscale_(optimizer)
        finite = all(bool(torch.isfinite(parameter.grad).all()) for parameter in ffn.parameters())
        scale, before = scaler.get_scale(), copy.deepcopy(ffn.state_dict())
        scaler.step(optimizer)
        scaler.update()
        changed = any(not torch.equal(tensor, before[key]) for key, tensor in ffn.state_dict().items())
        assert changed is finite
        assert (scaler.get_scale() < scale) is not finite
        return loss.item()

    losses, scales = [], []
    for _ in range(60):
        losses.append(step())
        scales.append(scaler.get_scale())
    assert scales[0] < 2.0**24 and scales[-1] == scales[-20]  # it overflowed, came down, and stayed
    assert losses[-1] < 0.7 * losses[0]
    before = scaler.get_scale()
    step(factor=float("inf"))
    assert scaler.get_scale() == before / 2
    assert all(bool(torch.isfinite(parameter).all()) for parameter in ffn.parameters())
