"""The dense FFNs that everything is compared with: eager, compiled, by oneDNN, and into memory that is given."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F

import fastffn
from fastffn.bench.layer.case import LayerCase
from fastffn.bench.layer.contender import Contender
from fastffn.nn import DenseConfig, FFNConfig
from fastffn.ops.activations import get_activation

# How torch's own GELU, which can work in place, calls what transformers calls so.
IN_PLACE = {"gelu": "none", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}
# Neurons whose weights in 16 bits fill 16 bytes. An accelerator's fast matrix products take no others: a few neurons
# more, as in 4,096 instead of the 4,095 of a tree, make a dense FFN faster.
ALIGNED = 8


def dense_config(config: FFNConfig, width: int) -> DenseConfig:
    """A dense FFN of `width` hidden neurons with the widths, activation and gate of `config`."""
    known = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    shared = ("d_model", "d_out", "activation", "dropout", "gated")
    return DenseConfig(d_hidden=width, **{name: known[name] for name in shared if name in known})


def widths(config: FFNConfig, *, padded: bool = False) -> dict[str, int]:
    """The widths of the dense FFNs, by what they stand for; one that stands for several has the first name.

    Args:
        config: of what they are compared with.
        padded: whether to add the width of all neurons rounded up to `ALIGNED`.
    """
    assert config.d_model is not None
    wanted = {"total": config.total_width}
    if padded:
        wanted["padded"] = -(-config.total_width // ALIGNED) * ALIGNED
    wanted |= {"usual": 4 * config.d_model, "active": config.active_width}
    found: dict[str, int] = {}
    for name, width in wanted.items():
        if width not in found.values():
            found[name] = width
    return found


def dense_contenders(case: LayerCase) -> list[Contender]:
    """Each width in the dtype of the case, that of all neurons in float32 too where that is another one.

    On an accelerator those of all neurons rounded up to `ALIGNED` stand for all neurons too.
    """
    found = []
    for stands_for, width in widths(case.config, padded=case.accelerated).items():
        found += _of_width(case, width, case.torch_dtype, "total" if stands_for == "padded" else stands_for)
        if stands_for == "total" and case.torch_dtype != torch.float32:
            found += _of_width(case, width, torch.float32, stands_for)
    return found


def _of_width(case: LayerCase, width: int, dtype: torch.dtype, stands_for: str) -> list[Contender]:
    with torch.device(case.device):
        modules = [fastffn.build(dense_config(case.config, width)).to(dtype) for _ in range(case.layers)]
    name = f"dense {width}" + ("" if dtype == case.torch_dtype else ", fp32")
    facts = {"width": width, "stands_for": stands_for, "dtype": str(dtype).removeprefix("torch.")}

    def contender(suffix: str, layers: Any, **more: Any) -> Contender:
        return Contender(
            name + suffix, "dense", layers, sources=modules, dtype=dtype, facts=facts | {"way": suffix[2:]}, **more
        )

    found = [contender("", modules)]
    if case.compiled:
        found.append(contender(", compiled", [torch.compile(module, dynamic=False) for module in modules]))
    if PackedDense.takes(modules[0], dtype, case.device):
        found.append(contender(", oneDNN", [PackedDense(module) for module in modules], inference_only=True))
    if case.out and not modules[0].config.gated:
        found.append(contender(", out=", modules, out=_Into()))
    return found


class PackedDense(nn.Module):
    """A dense FFN by oneDNN, weights packed ahead for the size of the batch: inference only.

    What torch.compile does where weights are frozen. On an AMD processor MKL, which eager layers use, was two to three
    times slower.
    """

    # How oneDNN calls an activation, and its form.
    FUSED: ClassVar[dict[str, tuple[str, str]]] = {
        "gelu": ("gelu", "none"),
        "gelu_new": ("gelu", "tanh"),
        "gelu_pytorch_tanh": ("gelu", "tanh"),
        "relu": ("relu", ""),
    }

    def __init__(self, ffn: Any) -> None:
        super().__init__()
        self.ffn = ffn
        self._packed: tuple[int, list[torch.Tensor]] = (0, [])

    @classmethod
    def takes(cls, ffn: Any, dtype: torch.dtype, device: str) -> bool:
        """Whether there is such a form of `ffn`."""
        there = torch.backends.mkldnn.is_available() and dtype in (torch.float32, torch.bfloat16)
        return there and device == "cpu" and not ffn.config.gated and ffn.config.activation in cls.FUSED

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[T, D] -> [T, O]`."""
        if torch.is_grad_enabled():
            raise RuntimeError("packed weights have no backward pass")
        mkldnn: Any = torch.ops.mkldnn
        up, down = self.ffn.up, self.ffn.down
        if self._packed[0] != len(x):
            self._packed = (len(x), [mkldnn._reorder_linear_weight(part.weight, len(x)) for part in (up, down)])
        packed = self._packed[1]
        name, form = self.FUSED[self.ffn.config.activation]
        hidden = mkldnn._linear_pointwise(x, packed[0], up.bias, name, [], form)
        y: torch.Tensor = mkldnn._linear_pointwise(hidden, packed[1], down.bias, "none", [], "")
        return y


class _Into:
    """A dense FFN without a single fresh tensor, hidden activations included."""

    def __init__(self) -> None:
        self._hidden: torch.Tensor | None = None

    def __call__(self, ffn: Any, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        shape = (len(x), ffn.config.d_hidden)
        if self._hidden is None or self._hidden.shape != shape:
            self._hidden = x.new_empty(shape)
        hidden = torch.addmm(ffn.up.bias, x, ffn.up.weight.T, out=self._hidden)
        name = ffn.config.activation
        if name in IN_PLACE:
            hidden = torch.ops.aten.gelu_(hidden, approximate=IN_PLACE[name])
        else:
            hidden = F.relu_(hidden) if name == "relu" else get_activation(name)(hidden)
        return torch.addmm(ffn.down.bias, hidden, ffn.down.weight.T, out=out)
