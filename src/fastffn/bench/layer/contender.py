"""Something that is timed: modules that each take the tokens, how they are called, what they are compared as."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import fastffn


@dataclass(eq=False)
class Contender:
    """One of those that are timed against each other.

    Attributes:
        name: in the table.
        role: `ffn` (what is measured), `peer` or `dense`.
        modules: the layers, in the dtype that they run in. Every one gets the same tokens, and outputs are added: each
            works on values as those of a fresh model, however many there are.
        sources: for each layer a module whose float64 copy says what is right; None: nothing to compare with.
        bounded: whether the bound of the FFN that is measured holds for this too: it computes the same function.
        backend: is asked for while it runs.
        out: a layer's forward pass into memory that is given, `(module, x, out) -> out`; None: into fresh memory.
        inference_only: whether it has no backward pass.
        facts: further entries for the result.
        too_slow: passes for which it was found too slow to be measured.
        leaves: the tokens of the last call that was made for both passes; they hold gradients.
    """

    name: str
    role: str
    modules: Sequence[Any]
    sources: Sequence[nn.Module] | None
    bounded: bool = False
    backend: str | None = None
    out: Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    dtype: torch.dtype = torch.float32
    inference_only: bool = False
    facts: dict[str, Any] = field(default_factory=dict)
    too_slow: set[str] = field(default_factory=set)
    leaves: list[torch.Tensor] = field(default_factory=list)

    def asked(self) -> contextlib.AbstractContextManager[None]:
        """The context that asks for the backend."""
        return contextlib.nullcontext() if self.backend is None else fastffn.use_backend(self.backend)

    def mode(self, training: bool) -> None:
        """Puts all layers, and what they are compared with, into training or evaluation mode."""
        for module in (*self.modules, *(self.sources or ())):
            module.train(training)

    def call(self, passes: str, batches: Sequence[torch.Tensor], gradient: torch.Tensor) -> Callable[[], object]:
        """What is timed: each call takes the next batch, so that a tree's paths are not those of the call before.

        Args:
            passes: `forward` or `forward + backward`.
            batches: `[T, D]` each; gradient: `[T, O]`, that of the output.
        """
        batches, gradient = [x.to(self.dtype) for x in batches], gradient.to(self.dtype)
        if passes != "forward":
            self.leaves = [x.detach().requires_grad_() for x in batches]
            return self._both(itertools.cycle(self.leaves), gradient)
        turns = itertools.cycle(batches)
        return self._into(turns, gradient) if self.out is not None else self._forward(turns)

    def drop_gradients(self) -> None:
        """Gives back the memory of all gradients."""
        for module in self.modules:
            module.zero_grad(set_to_none=True)
        for x in self.leaves:
            x.grad = None

    def layer(self, index: int, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """The output of one layer, as it is timed."""
        with self.asked():
            y: torch.Tensor = self.modules[index](x) if self.out is None else self.out(self.modules[index], x, out)
        return y

    def _forward(self, turns: Iterator[torch.Tensor]) -> Callable[[], object]:
        def run() -> object:
            x = next(turns)
            with torch.no_grad(), self.asked():
                total = self.modules[0](x)
                for module in self.modules[1:]:
                    total.add_(module(x))
            return total

        return run

    def _into(self, turns: Iterator[torch.Tensor], like: torch.Tensor) -> Callable[[], object]:
        assert self.out is not None
        into, total, buffer = self.out, torch.empty_like(like), torch.empty_like(like)

        def run() -> object:
            x = next(turns)
            with torch.no_grad(), self.asked():
                into(self.modules[0], x, total)
                for module in self.modules[1:]:
                    total.add_(into(module, x, buffer))
            return total

        return run

    def _both(self, turns: Iterator[torch.Tensor], gradient: torch.Tensor) -> Callable[[], object]:
        def run() -> object:
            for module in self.modules:
                module.zero_grad(set_to_none=True)
            x = next(turns)
            x.grad = None
            with self.asked():
                total = self.modules[0](x)
                for module in self.modules[1:]:
                    total = total + module(x)
                total.backward(gradient)
            return total

        return run
