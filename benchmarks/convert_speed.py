"""How fast models of one architecture are beside each other: their FFNs alone, and end to end."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import nn

from fastffn.convert import match
from fastffn.measure.timer import alternate


def int8(model: nn.Module) -> nn.Module:
    """PyTorch's own way to a faster model on a CPU: int8 weights in every linear layer, activations as they come.

    A scale for each output: with one for each matrix, the default, SmolLM2's perplexity is four times as high.
    """
    import warnings

    from torch.ao.quantization import per_channel_dynamic_qconfig, quantize_dynamic

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own deprecation
        return quantize_dynamic(copy.deepcopy(model), {nn.Linear: per_channel_dynamic_qconfig})


class PackedLinear(nn.Module):
    """A linear layer by oneDNN, its weight packed for the number of rows: what frozen, compiled models run."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self._packed: dict[int, torch.Tensor] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., in] -> [..., out]`."""
        rows = x.reshape(-1, x.shape[-1])
        ops: Any = torch.ops.mkldnn
        if len(rows) not in self._packed:
            self._packed = {len(rows): ops._reorder_linear_weight(self.linear.weight, len(rows))}
        y: torch.Tensor = ops._linear_pointwise(rows, self._packed[len(rows)], self.linear.bias, "none", [], "")
        return y.view(*x.shape[:-1], y.shape[-1])


def packed(model: nn.Module) -> nn.Module:
    """A copy whose linear layers are all `PackedLinear`."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear:
            match.replace_module(model, name, PackedLinear(module))
    return model


@torch.no_grad()
def race(runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, dict[str, float]]:
    """Seconds of each, in alternating turns."""
    return {name: asdict(timing) for name, timing in alternate(runs, rounds=rounds).items()}


def ffn_calls(models: Mapping[str, Any], paths: list[str], rows: int) -> dict[str, Callable[[], object]]:
    """For each model a call of all its FFNs, one after the other, on `rows` tokens."""
    calls = {}
    for name, model in models.items():
        ffns = [_whole_ffn(model, path) for path in paths]
        width = model.config.hidden_size
        calls[name] = partial(_each, ffns, torch.randn(1, rows, width, dtype=model.dtype))
    return calls


def _whole_ffn(model: Any, path: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """The FFN at a path; a dense BERT's second map lies beside the first."""
    ffn = model.get_submodule(path)
    beside = model.get_submodule(path.rpartition(".")[0])
    if hasattr(beside, "output") and isinstance(getattr(beside.output, "dense", None), nn.Module):
        down = beside.output.dense
        if not isinstance(down, nn.Identity):
            return lambda x: down(ffn(x))
    return ffn


def _each(ffns: list[Callable[[torch.Tensor], torch.Tensor]], x: torch.Tensor) -> None:
    for ffn in ffns:
        ffn(x)


def encoder_calls(models: Mapping[str, Any], sequences: int, length: int = 32) -> dict[str, Callable[[], object]]:
    """Each model reads `sequences` of 32 tokens."""
    ids = torch.randint(1000, 20000, (sequences, length))
    return {name: partial(model, input_ids=ids) for name, model in models.items()}


def prompt_calls(models: Mapping[str, Any], sequences: int, length: int = 32) -> dict[str, Callable[[], object]]:
    """Each model reads a batch of prompts and makes the logits of what comes next."""
    ids = torch.randint(1000, 20000, (sequences, length))
    return {name: partial(model, input_ids=ids, logits_to_keep=1, use_cache=True) for name, model in models.items()}


@torch.no_grad()
def decode_calls(models: Mapping[str, Any], tokens: int = 8, context: int = 32) -> dict[str, Callable[[], object]]:
    """Each model writes `tokens` tokens greedily after a prompt of `context` that it has read already."""
    prompt = torch.randint(1000, 20000, (1, context))
    caches = {name: model(input_ids=prompt, use_cache=True).past_key_values for name, model in models.items()}
    return {name: partial(_decode, model, caches[name], tokens) for name, model in models.items()}


def _decode(model: Any, cache: Any, tokens: int) -> None:
    token = torch.full((1, 1), 1000)
    for _ in range(tokens):
        token = model(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
    cache.crop(-tokens)
