"""The definition of `grouped_mlp`, in plain torch and any dtype, one MLP after the other. It is the specification.

    e = index[n] for token n;    a = act(x W_up[e] + b_up[e]);    y = a W_down[e] + b_down[e]
    gated: a = act(x W_gate[e] + b_gate[e]) * (x W_up[e] + b_up[e])           (weights are transposed: [out, in])

A token whose index is no MLP's gets zeros, and gives no gradient. Nothing of a token reaches another one.

Saved for the backward pass, by this and by every other implementation:

    order [T]: the tokens, those of MLP 0 first, in their own order; those of no MLP last.      int64
    ends [E]: where in `order` the tokens of each MLP end.                                       int32
    up [T, W], gate [T, W] or [0]: what the activation got, in the order of `order`; rows of no MLP are undefined.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from fastffn.ops.activations import get_activation, get_activation_backward
from fastffn.ops.dispatch import Impl, Tensors


def sorted_by_mlp(index: torch.Tensor, mlps: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`(order [T], ends [E], the index of each token in that order)`; an index out of range becomes E."""
    index = index.long()
    index = torch.where((index >= 0) & (index < mlps), index, mlps)
    # Stable: each sum over the tokens of an MLP has one order, whatever the device.
    in_order, order = torch.sort(index, stable=True)
    ends = torch.searchsorted(in_order, torch.arange(mlps, device=index.device), right=True, out_int32=True)
    return order, ends, in_order


def definition(
    x: torch.Tensor,
    index: torch.Tensor,
    up_weight: torch.Tensor,
    up_bias: torch.Tensor | None,
    down_weight: torch.Tensor,
    down_bias: torch.Tensor | None,
    gate_weight: torch.Tensor | None,
    gate_bias: torch.Tensor | None,
    activation: str,
) -> torch.Tensor:
    """What the operation computes; autograd gives the gradients. Shapes as in `grouped_mlp`."""
    act = get_activation(activation)
    y = x.new_zeros(x.shape[0], down_weight.shape[1])
    for e in range(up_weight.shape[0]):
        tokens = (index == e).nonzero().squeeze(1)
        own = x[tokens]
        hidden = F.linear(own, up_weight[e], None if up_bias is None else up_bias[e])
        if gate_weight is None:
            hidden = act(hidden)
        else:
            hidden = act(F.linear(own, gate_weight[e], None if gate_bias is None else gate_bias[e])) * hidden
        own_y = F.linear(hidden, down_weight[e], None if down_bias is None else down_bias[e])
        y = y.index_put((tokens,), own_y)
    return y


def _forward(*arguments: object, keep: bool, out: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    x, index, up_weight, up_bias, _, _, gate_weight, gate_bias, _ = arguments
    assert isinstance(x, torch.Tensor) and isinstance(index, torch.Tensor) and isinstance(up_weight, torch.Tensor)
    y = definition(*arguments)  # type: ignore[arg-type]
    y = y if out is None else out.copy_(y)
    if not keep:
        return (y,)
    order, ends, in_order = sorted_by_mlp(index, up_weight.shape[0])

    def before_activation(weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        result = x.new_zeros(x.shape[0], weight.shape[1])
        for e in range(weight.shape[0]):
            own = in_order == e
            result[own] = F.linear(x[order[own]], weight[e], None if bias is None else bias[e])
        return result

    up = before_activation(up_weight, up_bias)  # type: ignore[arg-type]
    gate = x.new_empty(0) if gate_weight is None else before_activation(gate_weight, gate_bias)  # type: ignore[arg-type]
    return y, order, ends, up, gate


def _backward(
    gradient: torch.Tensor,
    x: torch.Tensor,
    index: torch.Tensor,
    up_weight: torch.Tensor,
    up_bias: torch.Tensor | None,
    down_weight: torch.Tensor,
    down_bias: torch.Tensor | None,
    gate_weight: torch.Tensor | None,
    gate_bias: torch.Tensor | None,
    activation: str,
    order: torch.Tensor,
    ends: torch.Tensor,
    up: torch.Tensor,
    gate: torch.Tensor,
    *,
    needs: tuple[bool, ...],
) -> Tensors:
    act, act_backward = get_activation(activation), get_activation_backward(activation)
    tensors = (x, index, up_weight, up_bias, down_weight, down_bias, gate_weight, gate_bias)
    gradients = [
        torch.zeros_like(t) if t is not None and need else None for t, need in zip(tensors, needs, strict=True)
    ]
    start = 0
    for e, stop in enumerate(ends.tolist()):
        tokens = order[start:stop]
        own_x, own_gradient, own_up, own_gate = x[tokens], gradient[tokens], up[start:stop], gate[start:stop]
        start = stop
        hidden = act(own_up) if gate_weight is None else act(own_gate) * own_up
        of_hidden = own_gradient @ down_weight[e]
        of_x = torch.zeros_like(own_x)
        if gate_weight is None:
            of_up = act_backward(of_hidden, own_up)
        else:
            of_up = of_hidden * act(own_gate)
            of_gate = act_backward(of_hidden * own_up, own_gate)
            of_x = of_x + of_gate @ gate_weight[e]
            _put(gradients[6], e, of_gate.T @ own_x)
            _put(gradients[7], e, of_gate.sum(0))
        _put(gradients[0], tokens, of_x + of_up @ up_weight[e])
        _put(gradients[2], e, of_up.T @ own_x)
        _put(gradients[3], e, of_up.sum(0))
        _put(gradients[4], e, own_gradient.T @ hidden)
        _put(gradients[5], e, own_gradient.sum(0))
    return tuple(gradients)


def _put(tensor: torch.Tensor | None, where: int | torch.Tensor, value: torch.Tensor) -> None:
    if tensor is not None:
        tensor[where] = value


IMPL = Impl(name="reference", forward=_forward, backward=_backward)
