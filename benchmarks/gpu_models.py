"""Whole models for `gpu.py`: a training step and greedy decoding with each kind of FFN."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

import fastffn
from fastffn import DenseConfig, LowRankConfig, MoEConfig, NeuronTreeConfig
from fastffn.measure.timer import alternate

if TYPE_CHECKING:
    from gpu import Plan


class Block(nn.Module):
    """Attention and an FFN, each after a norm."""

    def __init__(self, width: int, heads: int, config: Any) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.ffn = fastffn.build(config)

    def forward(self, x: torch.Tensor, past: tuple[torch.Tensor, ...] | None) -> tuple[torch.Tensor, Any]:
        """`[B, S, D]`, and keys and values `[B, heads, *, D / heads]` of what came before."""
        batch, length, width = x.shape
        q, k, v = (
            part.view(batch, length, self.heads, -1).transpose(1, 2)
            for part in self.qkv(self.norms[0](x)).split(width, -1)
        )
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=past is None)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.ffn(self.norms[1](x)), (k, v)


class Model(nn.Module):
    """GPT-2's shape, without transformers: embeddings, blocks, a norm, tied output."""

    def __init__(self, sizes: dict[str, int], config: Any) -> None:
        super().__init__()
        width = sizes["width"]
        self.tokens = nn.Embedding(sizes["vocabulary"], width)
        self.places = nn.Embedding(sizes["sequence"], width)
        self.blocks = nn.ModuleList([Block(width, sizes["heads"], config) for _ in range(sizes["layers"])])
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.tokens.weight, std=0.02)
        nn.init.normal_(self.places.weight, std=0.02)

    def forward(self, ids: torch.Tensor, past: list[Any] | None = None) -> tuple[torch.Tensor, list[Any]]:
        """Logits `[B, S, vocabulary]`, and keys and values."""
        begin = 0 if past is None else past[0][0].shape[2]
        x = self.tokens(ids) + self.places(torch.arange(begin, begin + ids.shape[1], device=ids.device))
        kept = []
        for number, block in enumerate(self.blocks):
            x, one = block(x, None if past is None else past[number])
            kept.append(one)
        return self.norm(x) @ self.tokens.weight.T, kept


def models(plan: Plan, dtype: torch.dtype) -> dict[str, Model]:
    """One of each kind, and one whose FFNs cost nothing."""
    sizes, width = plan.model, plan.model["width"]
    kinds: dict[str, Any] = {
        "dense": DenseConfig(d_model=width),
        "low_rank": LowRankConfig(d_model=width, d_hidden=4 * width, rank=width // 4),
        "neuron_tree": NeuronTreeConfig(d_model=width, depth=sizes["depth"]),
        "moe": MoEConfig(d_model=width, experts=8, expert_width=width // 2, active=1),
        "no FFN": DenseConfig(d_model=width, d_hidden=1),
    }
    found = {}
    for name, config in kinds.items():
        torch.manual_seed(0)
        found[name] = Model(sizes, config).to(plan.device, dtype)
    for block in found["no FFN"].blocks:
        block.ffn = nn.Identity()
    return found


def training_part(plan: Plan) -> dict[str, Any]:
    """A training step; dense, and the tree beside it, compiled too: the faster dense model is the baseline."""
    sizes = plan.model
    ids = torch.randint(sizes["vocabulary"], (sizes["batch"], sizes["sequence"]), device=plan.device)
    calls: dict[str, Callable[[], object]] = {}
    left_out = {}
    for name, model in models(plan, torch.float32).items():
        step = partial(train_step, optimizer=torch.optim.AdamW(model.parameters(), lr=1e-4), ids=ids)
        calls[name] = partial(step, model, model)
        if plan.compiled and name in ("dense", "neuron_tree"):
            compiled = partial(step, model, torch.compile(model, dynamic=False))
            try:
                compiled()
                calls[f"{name}, compiled"] = compiled
            except Exception as error:  # a compiler that fails is no reason to measure nothing
                left_out[f"{name}, compiled"] = f"{type(error).__name__}: {str(error)[:500]}"
    return _result(plan, calls) | {"left_out": left_out}


def decoding_part(plan: Plan) -> dict[str, Any]:
    """Greedy decoding, all weights in bfloat16: autocast keeps its casts of some weights and not of others."""
    sizes = plan.model
    prompt = torch.randint(sizes["vocabulary"], (1, sizes["sequence"] // 2), device=plan.device)
    found = models(plan, torch.bfloat16)
    return _result(
        plan, {name: partial(decode, model.eval(), prompt, sizes["decode"]) for name, model in found.items()}
    )


def _result(plan: Plan, calls: dict[str, Callable[[], object]]) -> dict[str, Any]:
    timings = alternate(calls, rounds=plan.rounds, warmup=1 if plan.rounds == 1 else 3)
    dense = min(timings[name].median for name in ("dense", "dense, compiled") if name in timings)
    return {
        "sizes": plan.model,
        "seconds": {name: asdict(timing) for name, timing in timings.items()},
        "ratio": {name: dense / timing.median for name, timing in timings.items()},
    }


def train_step(model: Model, run: Callable[..., Any], optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> None:
    """In bfloat16 by autocast; `run` is the model, or the model compiled."""
    with torch.autocast(ids.device.type, torch.bfloat16):
        logits, _ = run(ids)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
        loss = loss + fastffn.auxiliary_loss(model)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


@torch.no_grad()
def decode(model: Model, prompt: torch.Tensor, number: int) -> torch.Tensor:
    """The likeliest token each time."""
    logits, past = model(prompt)
    found = [logits[:, -1:].argmax(-1)]
    while len(found) < number:
        logits, past = model(found[-1], past)
        found.append(logits[:, -1:].argmax(-1))
    return torch.cat(found, 1)
