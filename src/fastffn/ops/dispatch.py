"""Which implementation of an operation runs, why the others do not, and the three ways in which an operation is called.

An operation (`Op`) has an ordered list of implementations (`Impl`), one file each. A call takes one of three paths, so
that nobody pays for what he does not use:

- while torch.compile traces, or on tensors without memory ("meta"): one opaque operator `fastffn::<name>`;
- eagerly with gradients: one `autograd.Function`;
- eagerly without gradients: straight to the implementation.

All implementations of one operation save the same tensors for the backward pass, so that it may run in another one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from fastffn.errors import BackendError, did_you_mean

Tensors = tuple["torch.Tensor | None", ...]

_asked: ContextVar[str | None] = ContextVar("fastffn_backend", default=None)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Inside this context every operation runs on the backend called `name`, or raises.

    It holds for the thread (or asyncio task) that entered it, and does not stick to what torch.compile compiles:
    compiled code asks each time it runs, its backward pass too. Put it around the call of a compiled function: inside
    it breaks the graph.

    Args:
        name: of a backend, such as "torch_grouped"; `fastffn info` lists them.

    Raises:
        BackendError: when an operation is called that has no such backend, or whose backend cannot run this call.
    """
    token = _asked.set(name)
    try:
        yield
    finally:
        _asked.reset(token)


def _always(request: Any) -> str | None:
    return None


def _no_backward(*arguments: Any, needs: tuple[bool, ...]) -> Tensors:
    raise BackendError("This operation is for inference: it has no backward pass. Call it under torch.no_grad().")


@dataclass(frozen=True, kw_only=True)
class Impl:
    """One implementation of an operation.

    Attributes:
        name: what `use_backend` calls it.
        forward: `(*tensors, *options, keep=bool, out=tensor or None) -> (y, *saved)`. `saved` is what the backward
            pass needs and is left out unless `keep`; `out`, given only without `keep`, is to be filled and returned.
        backward: `(gradient_of_y, *tensors, *options, *saved, needs=(bool for each tensor)) -> gradients`, one for
            each tensor, None for those that `needs` leaves out. The gradient of y is contiguous. Left out by
            operations for inference.
        refuses: why this implementation cannot run a request, None if it can.
        yields: why it leaves a request that it could run to a later one, usually because that is faster there; None
            if it does not. Not asked when the implementation is called by name.
        yields_backward: the same for the backward pass; None: as `yields`.
    """

    name: str
    forward: Callable[..., tuple[torch.Tensor, ...]]
    backward: Callable[..., Tensors] = _no_backward
    refuses: Callable[[Any], str | None] = _always
    yields: Callable[[Any], str | None] = _always
    yields_backward: Callable[[Any], str | None] | None = None


def select(op: str, impls: Sequence[Impl], request: Any, *, backward: bool = False) -> Impl:
    """The implementation that runs a pass of `request`: the first that neither refuses nor yields, else the first able.

    Raises:
        BackendError: none can run, or the one that `use_backend` asks for cannot; with every reason.
    """
    name = _asked.get()
    if name is not None:
        return _named(op, impls, request, name)
    able = [impl for impl in impls if impl.refuses(request) is None]
    for impl in able:
        yields = impl.yields_backward if backward and impl.yields_backward is not None else impl.yields
        if yields(request) is None:
            return impl
    if able:
        return able[0]
    raise BackendError(f"No backend of {op} can run {request}: {_reasons(impls, request)}.")


def _named(op: str, impls: Sequence[Impl], request: Any, name: str) -> Impl:
    known = {impl.name: impl for impl in impls}
    if name not in known:
        raise BackendError(
            f"{op} has no backend '{name}'; it has {', '.join(known)}.{did_you_mean(name, known)} "
            f"For {request}: {_reasons(impls, request)}."
        )
    if known[name].refuses(request) is not None:
        raise BackendError(f"Backend '{name}' of {op} cannot run {request}: {_reasons(impls, request)}.")
    return known[name]


def verdicts(impls: Sequence[Impl], request: Any) -> dict[str, str | None]:
    """For each implementation by name, why it does not run `request`; None if it could and would."""
    return {impl.name: impl.refuses(request) or impl.yields(request) for impl in impls}


def _reasons(impls: Sequence[Impl], request: Any) -> str:
    refusals = {impl.name: impl.refuses(request) for impl in impls}
    return "; ".join(f"{name} {reason or 'can'}" for name, reason in refusals.items())


class Op:
    """An operation: its implementations, and the three paths by which it is called.

    Args:
        name: of the operation; torch knows it as `fastffn::<name>` and `fastffn::<name>_backward`.
        tensors: schema of the tensors, such as "Tensor x, Tensor w, Tensor? b". A gradient may flow to each.
        options: schema of what follows them, such as "str activation".
        saved: number of tensors that implementations save for the backward pass; None if there is no such pass: the
            operation is for inference, and its caller has refused tensors that ask for a gradient.
        fake: `(*tensors, *options) -> (y, *saved)`, empty tensors of the right shapes, dtypes and devices.
        request: `(*tensors, *options) -> request`: what the implementations look at to refuse or yield.
        example: a usual request, for `fastffn info`.
        impls: the implementations, in order of preference.
        flops: `(*shapes of the tensors, *options) -> FLOPs` of the forward pass; the backward pass costs twice that.
    """

    def __init__(
        self,
        name: str,
        *,
        tensors: str,
        options: str,
        saved: int | None,
        fake: Callable[..., tuple[torch.Tensor, ...]],
        request: Callable[..., Any],
        example: Any,
        impls: Sequence[Impl],
        flops: Callable[..., int],
    ) -> None:
        self.name = name
        self.impls = tuple(impls)
        self.request = request
        self.example = example
        self.flops = flops
        self._inputs = len(tensors.split(","))
        self.arguments = self._inputs + (len(options.split(",")) if options else 0)
        self._saved = saved
        self._fake = fake
        self._chosen: dict[tuple[str | None, Any, bool], Impl] = {}
        self._register(tensors, options)

    def __call__(
        self, tensors: Tensors, options: tuple[Any, ...], out: torch.Tensor | None = None, request: Any = None
    ) -> torch.Tensor:
        """Runs the operation by the cheapest of the three paths.

        Args:
            tensors: checked, the first of them not None; None where the schema has `Tensor?`.
            options: what follows the tensors.
            out: filled and returned if given; the caller has made sure that no gradient is asked.
            request: `request(*tensors, *options)`, where the caller knows it already.
        """
        first = tensors[0]
        assert first is not None
        if torch.compiler.is_compiling() or first.is_meta:
            y: torch.Tensor = self._traced(*tensors, *options)
            if self._saved is not None:
                y = y[0]
            return y if out is None else out.copy_(y)
        request = self.request(*tensors, *options) if request is None else request
        impl = self.choose(request)
        if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
            differentiable: torch.Tensor = _Eager.apply(impl, self.choose(request, backward=True), options, *tensors)
            return differentiable
        return _plainly(first, impl.forward, *tensors, *options, keep=False, out=out)[0]

    def choose(self, request: Any, *, backward: bool = False) -> Impl:
        """What `select` says, remembered: with the few microseconds of a kernel, asking every backend again shows."""
        key = (_asked.get(), request, backward)
        impl = self._chosen.get(key)
        if impl is None:
            if len(self._chosen) >= 4096:
                self._chosen.clear()
            impl = self._chosen[key] = select(self.name, self.impls, request, backward=backward)
        return impl

    def forget(self) -> None:
        """Forgets what `choose` remembers."""
        self._chosen.clear()

    def choices(self) -> dict[str, str]:
        """The backend of each pass ("forward", "backward") that was chosen last since `forget`."""
        return {"backward" if backward else "forward": impl.name for (_, _, backward), impl in self._chosen.items()}

    def verdicts(self) -> dict[str, str | None]:
        """For each implementation by name, why it does not run the example; None if it could and would."""
        return verdicts(self.impls, self.example)

    def _register(self, tensors: str, options: str) -> None:
        """Makes the operation known to torch: with shapes for tracing, and with its backward pass if it has one."""
        given = ", ".join(part for part in (tensors, options) if part)
        inference = self._saved is None

        def forward(*arguments: Any) -> Any:
            impl = select(self.name, self.impls, self.request(*arguments))
            found = _plainly(arguments[0], impl.forward, *arguments, keep=not inference, out=None)
            return found[0] if inference else found

        def fake(*arguments: Any) -> Any:
            return self._fake(*arguments)[0] if inference else self._fake(*arguments)

        results = "Tensor" if self._saved is None else _results(1 + self._saved)
        operator = torch.library.custom_op(
            f"fastffn::{self.name}", forward, mutates_args=(), schema=f"({given}) -> {results}"
        )
        operator.register_fake(fake)
        # The packets that torch itself keeps: FLOP counting and tracing meet these.
        self.operator = getattr(torch.ops.fastffn, self.name)
        self._traced = self.operator.default
        self.operator_backward = None
        if self._saved is not None:
            self._register_backward(operator, given, self._saved)
            self.operator_backward = getattr(torch.ops.fastffn, f"{self.name}_backward")

    def _register_backward(self, operator: Any, given: str, saved: int) -> None:
        number = self._inputs

        def backward(*arguments: Any) -> tuple[torch.Tensor, ...]:
            gradient, *rest, needs = arguments
            given = rest[: len(rest) - saved]
            impl = select(self.name, self.impls, self.request(*given), backward=True)
            gradients = _plainly(given[0], impl.backward, gradient.contiguous(), *rest, needs=tuple(needs))
            # An operator cannot return None.
            return tuple(gradient.new_empty(0) if g is None else g for g in gradients)

        def backward_fake(*arguments: Any) -> tuple[torch.Tensor, ...]:
            gradient, *rest, needs = arguments
            return tuple(rest[i].new_empty(rest[i].shape) if needs[i] else gradient.new_empty(0) for i in range(number))

        kept = "".join(f", Tensor saved_{i}" for i in range(saved))
        reverse = torch.library.custom_op(
            f"fastffn::{self.name}_backward",
            backward,
            mutates_args=(),
            schema=f"(Tensor gradient, {given}{kept}, bool[] needs) -> {_results(number)}",
        )
        reverse.register_fake(backward_fake)

        # torch passes these by name.
        def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
            ctx.options = inputs[number:]
            ctx.save_for_backward(*inputs[:number], *output[1:])

        def differentiate(ctx: Any, gradient: torch.Tensor, *of_saved: Any) -> tuple[torch.Tensor | None, ...]:
            kept = ctx.saved_tensors  # asked once: gradient checkpointing computes them when asked
            tensors, saved = kept[:number], kept[number:]
            # Where a tensor is None there is no gradient to shape.
            needs = [
                bool(need) and tensor is not None
                for need, tensor in zip(ctx.needs_input_grad[:number], tensors, strict=True)
            ]
            gradients = reverse(gradient, *tensors, *ctx.options, *saved, needs)
            asked = tuple(g if need else None for g, need in zip(gradients, needs, strict=True))
            return asked + (None,) * len(ctx.options)

        operator.register_autograd(differentiate, setup_context=setup)


def _results(number: int) -> str:
    return "(" + ", ".join(["Tensor"] * number) + ")"


class _Eager(torch.autograd.Function):
    """Any operation, eagerly, with gradients."""

    @staticmethod
    def forward(
        ctx: Any, impl: Impl, reverse: Impl, options: tuple[Any, ...], *tensors: torch.Tensor | None
    ) -> torch.Tensor:
        y, *saved = _plainly(tensors[0], impl.forward, *tensors, *options, keep=True, out=None)
        ctx.reverse, ctx.options, ctx.inputs = reverse, options, len(tensors)
        ctx.save_for_backward(*tensors, *saved)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        kept = ctx.saved_tensors  # asked once: gradient checkpointing computes them when asked
        tensors, saved = kept[: ctx.inputs], kept[ctx.inputs :]
        needs = tuple(ctx.needs_input_grad[3:])
        gradients = _plainly(
            tensors[0], ctx.reverse.backward, gradient.contiguous(), *tensors, *ctx.options, *saved, needs=needs
        )
        return (None, None, None, *gradients)


_can_cast = lru_cache(torch.amp.is_autocast_available)


def _can_cast_traced(kind: str) -> bool:
    return _can_cast(kind)


# What torch.compiler.assume_constant_result does, which would import the compiler here; torch 2.9 cannot trace it.
_can_cast_traced._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _casts(kind: str) -> bool:
    """Whether autocast is on for a type of device."""
    if torch.compiler.is_compiling():
        return _can_cast_traced(kind) and torch.is_autocast_enabled(kind)
    return _can_cast(kind) and torch.is_autocast_enabled(kind)


def _plainly(tensor: Any, run: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """`run(...)` with autocast off: the tensors have been cast, and what runs in float32 is meant to."""
    kind = tensor.device.type
    if _casts(kind):
        with torch.autocast(kind, enabled=False):
            return run(*arguments, **named)
    return run(*arguments, **named)


def autocast(*tensors: torch.Tensor | None) -> Tensors:
    """The tensors in autocast's dtype where it is on, as torch's own matrix products take them; else as they are."""
    kind = tensors[0].device.type  # type: ignore[union-attr]
    if not _casts(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(
        tensor.to(dtype)
        if tensor is not None and tensor.is_floating_point() and tensor.dtype != torch.float64
        else tensor
        for tensor in tensors
    )
