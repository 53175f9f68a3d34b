from __future__ import annotations

import torch

from fastffn.measure.step import compare_steps, random_tokens, training_step


def test_a_step_moves_every_weight(gpt2) -> None:
    before = [parameter.detach().clone() for parameter in gpt2.parameters()]
    training_step(gpt2, random_tokens(2, 8, 97, torch.device("cpu")))()
    assert all(not torch.equal(old, new) for old, new in zip(before, gpt2.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in gpt2.parameters())


def test_autocast_is_used(gpt2) -> None:
    seen = []
    gpt2.transformer.h[0].mlp.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    ids = random_tokens(2, 8, 97, torch.device("cpu"))
    training_step(gpt2, ids, torch.bfloat16)()
    training_step(gpt2, ids)()
    assert seen == [torch.bfloat16, torch.float32]


def test_the_batch_shrinks_to_the_time_there_is(gpt2) -> None:
    settings = {"sequence": 8, "vocabulary": 97, "most": 4, "autocast": None, "rounds": 2}
    batch, timings = compare_steps({"model": gpt2}, seconds_a_step=1e-9, **settings)
    assert batch == 1
    assert timings["model"].calls == 2
    assert compare_steps({"model": gpt2}, seconds_a_step=1e9, **settings)[0] == 4
