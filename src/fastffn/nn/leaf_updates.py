"""Leaves that wait for samples: any torch.optim optimizer updates a leaf only once enough tokens have reached it.

A leaf that few tokens of a batch reach has a noisy gradient. The published package has optimizers of its own against
that (LocalSGD, LocalAdam); here two hooks do it, and the optimizer stays what it was for schedulers and trainers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastffn.errors import ConfigError
from fastffn.nn.leaf_tree import LeafTreeFFN
from fastffn.nn.usage import counts_of

LEAF_TENSORS = tuple(f"leaf_{linear}_{part}" for linear in ("up", "gate", "down") for part in ("weight", "bias"))


class LeafUpdates:
    """Makes `optimizer` update each leaf of the leaf trees in `model` once `samples` tokens have reached it.

    Until then the leaf's gradients add up, and its weights and optimizer states stay as they are; then its gradient is
    scaled by `samples` over the tokens seen, and the count begins again. Tokens are those of `leaf_usage`.

        updates = LeafUpdates(torch.optim.AdamW(model.parameters()), model, samples=64)

    Args:
        optimizer: it gets hooks around its `step`; `remove` takes them off.
        model: holds leaf trees, whose leaves `optimizer` updates.
        samples: tokens that a leaf waits for.

    Raises:
        ConfigError: `samples` is below 1, or `model` holds no leaf tree.

    What an optimizer counts once for a whole tensor (Adam's `step`) goes on for waiting leaves too. Gradients that wait
    are not part of the optimizer's state dict.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, model: nn.Module, samples: int) -> None:
        if not isinstance(samples, int) or samples < 1:
            raise ConfigError(f"samples is {samples!r}; it must be a whole number of at least 1.")
        self.samples = samples
        self._trees = [module for module in model.modules() if isinstance(module, LeafTreeFFN)]
        if not self._trees:
            raise ConfigError(f"{type(model).__name__} holds no leaf tree, whose leaves could wait for samples.")
        self._counted = [counts_of(tree, "leaf_usage").clone() for tree in self._trees]
        self._waiting_gradients: dict[nn.Parameter, torch.Tensor] = {}
        # Of each parameter: the leaves that wait, their values, and those of the optimizer's state, before a step.
        self._before: list[tuple[nn.Parameter, torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]] = []
        self._hooks = [
            optimizer.register_step_pre_hook(self._hold),
            optimizer.register_step_post_hook(self._put_back),
        ]

    def remove(self) -> None:
        """Takes the hooks off; gradients that wait are lost."""
        for hook in self._hooks:
            hook.remove()

    @torch.no_grad()
    def _hold(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._before = []
        for number, tree in enumerate(self._trees):
            if tree.leaf_usage.device != self._counted[number].device:
                self._counted[number] = self._counted[number].to(tree.leaf_usage.device)
            # Someone may have reset the counts.
            seen = torch.where(tree.leaf_usage < self._counted[number], 0, self._counted[number])
            tokens = tree.leaf_usage - seen
            ready = tokens >= self.samples
            self._counted[number] = torch.where(ready, tree.leaf_usage, seen)
            scale = torch.where(ready, self.samples / tokens.clamp_min(1), 1.0)
            waiting = (~ready).nonzero().squeeze(1)
            for name in LEAF_TENSORS:
                parameter = getattr(tree, name)  # None: it is not gated, or has no biases
                if parameter is None or parameter.grad is None:
                    continue
                if parameter in self._waiting_gradients:
                    parameter.grad += self._waiting_gradients.pop(parameter)
                parameter.grad *= scale.to(parameter.dtype).view(-1, *[1] * (parameter.dim() - 1))
                state = {
                    key: value[waiting].clone()
                    for key, value in optimizer.state.get(parameter, {}).items()
                    if isinstance(value, torch.Tensor) and value.shape == parameter.shape
                }
                self._before.append((parameter, waiting, parameter[waiting].clone(), state))

    @torch.no_grad()
    def _put_back(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for parameter, waiting, values, state in self._before:
            parameter[waiting] = values
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                    # A state that this step has made is zero for those who wait.
                    value[waiting] = state.get(key, torch.zeros((), dtype=value.dtype, device=value.device))
            if parameter.grad is not None:
                # Kept here and not in .grad, which whoever trains sets to zero.
                kept = torch.zeros_like(parameter.grad)
                kept[waiting] = parameter.grad[waiting]
                parameter.grad[waiting] = 0
                self._waiting_gradients[parameter] = kept
        self._before = []
