"""The gate of `gpu.py`: every Triton kernel against the definition in float64, on the CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

import fastffn
from fastffn.errors import MeasurementError
from fastffn.measure.gate import gate
from fastffn.ops import OPS, triton
from fastffn.ops.neuron_tree import reference
from fastffn.ops.neuron_tree import triton as tree_kernels

if TYPE_CHECKING:
    from gpu import Plan

# tf32: float32 whose products may be TF32.
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Case = tuple["torch.Tensor | None", ...]


@contextlib.contextmanager
def kernel(name: str) -> Iterator[None]:
    """One of the designs for trees, whatever the table says."""
    before = tree_kernels.kernel_for
    tree_kernels.kernel_for = lambda tokens, trees, levels, width: name if 2 <= levels <= 14 else "path"
    try:
        yield
    finally:
        tree_kernels.kernel_for = before


def draw_tree(
    tokens: int, depth: int, trees: int, d_model: int, d_out: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, ...]:
    """x, w_in, b_in, w_out."""
    random = torch.Generator().manual_seed(tokens + depth)
    nodes = 2 ** (depth + 1) - 1
    x = torch.randn(tokens, d_model, generator=random)
    w_in = torch.randn(trees, nodes, d_model, generator=random) / d_model**0.5
    b_in = 0.3 * torch.randn(trees, nodes, generator=random)
    w_out = torch.randn(trees, nodes, d_out, generator=random) / ((depth + 1) * trees) ** 0.5
    return tuple(tensor.to(device, dtype) for tensor in (x, w_in, b_in, w_out))


@contextlib.contextmanager
def precision(dtype: str) -> Iterator[None]:
    """Products in float32 as `dtype` says: TF32 if it is "tf32"."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def rounding(dtype: torch.dtype) -> float:
    """The relative distance of two numbers; that of TF32 where products in float32 may be TF32."""
    allowed = dtype == torch.float32 and triton.precision() == "tf32"
    return 2.0**-10 if allowed else torch.finfo(dtype).eps


def backend(name: str) -> Any:
    """The tree's implementation of that name."""
    return next(impl for impl in OPS["neuron_tree"].impls if impl.name == name)


def check_part(plan: Plan, dtype: str) -> dict[str, Any]:
    """Both designs and grouped products in one dtype: all cases, and which of them failed."""
    cases: list[tuple[dict[str, Any], Callable[[], dict[str, float]]]] = []

    def add_tree(shape: tuple[int, int, int, int, int], activation: str, straight: bool, bias: bool = True) -> None:
        tokens, depth, trees, d_model, d_out = shape
        facts = {"tokens": tokens, "trees": f"{trees}x{depth}", "D": d_model, "O": d_out, "activation": activation,
                 "straight": straight, "bias": bias}  # fmt: skip
        for design in ("path", "levels"):

            def run(design: str = design) -> dict[str, float]:
                x, w_in, b_in, w_out = draw_tree(*shape, DTYPES[dtype], plan.device)
                with kernel(design):
                    return check_tree((x, w_in, b_in if bias else None, w_out), activation, straight)

            cases.append((facts | {"design": design}, run))

    for shape in plan.check:
        add_tree(shape, "gelu", False)
        add_tree(shape, "silu", True)
    add_tree(plan.small, "gelu", False, bias=False)
    for activation in plan.activations:
        add_tree(plan.small, activation, False)
    for tokens, mlps, width in ((1, 4, 32), (700, 5, 60), (5000, 16, 256))[: 1 if len(plan.check) == 1 else 3]:
        for gated in (False, True):

            def run(of: tuple[int, int, int, bool] = (tokens, mlps, width, gated)) -> dict[str, float]:
                return check_grouped(*of, DTYPES[dtype], plan.device)

            cases.append(({"tokens": tokens, "mlps": mlps, "width": width, "gated": gated}, run))
    rows, failures = [], []
    for facts, run in cases:
        try:
            with precision(dtype):
                rows.append(facts | run())
        except Exception as error:  # a kernel that does not compile is one of the failures
            said = f"{type(error).__name__}: {str(error)[:500]}"
            rows.append(facts | {"error": said})
            failures.append(f"{facts}: {said}")
    return {"status": "failed" if failures else "passed", "failures": failures, "rows": rows}


def check_tree(case: Case, activation: str, straight: bool) -> dict[str, float]:
    """Relative errors; raises where one is more than rounding, where bits change, or a clear decision differs."""
    ours, options = backend("triton"), (activation, straight)
    x = case[0]
    assert x is not None
    eps = rounding(x.dtype)
    exact = [None if tensor is None else tensor.cpu().double() for tensor in case]
    right_y, right_scores, right_last = reference.neuron_tree(*exact, *options)
    y, scores, last = ours.forward(*case, *options, keep=True, out=None)
    if not torch.equal(y, ours.forward(*case, *options, keep=False, out=None)[0]):
        raise MeasurementError("the output is another one where nothing is kept for the backward pass")
    # Scores are sums in float32 of products that are exact in narrower dtypes; only TF32 rounds factors.
    margin = (2**-9 if eps == 2**-10 and x.dtype == torch.float32 else 2**-12) * max(
        1.0, float(right_scores.abs().max())
    )
    sure = (right_scores.abs() > margin).all(-1)
    if not torch.equal(last.cpu()[sure], right_last[sure]):
        raise MeasurementError("a clear decision went the other way")
    whole = sure.all(0)
    if not whole.any():
        raise MeasurementError("no token was compared: each has a decision within rounding of a tie")
    gradient = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(x.dtype)
    gradient[~whole] = 0  # a token whose path is not sure gets no gradient, and so gives none
    needs = tuple(tensor is not None for tensor in case)
    given = (gradient.to(y.device), *case, *options, scores, last)
    found, again = ours.backward(*given, needs=needs), ours.backward(*given, needs=needs)
    for one, two in zip(found, again, strict=True):
        if one is not None and not torch.equal(one, two):
            raise MeasurementError("gradients have other bits in a second run")
    wanted = reference.backward(gradient.double(), *exact, *options, right_scores, right_last, needs=needs)
    # Sums over all tokens, of terms that are rounded: errors add up like a random walk.
    floor = (32 if eps < 2**-20 else 4) * eps * max(1.0, len(y) ** 0.5 / 8)
    errors = {"y": gate("y", y.cpu()[whole], right_y[whole].to(x.dtype), right_y[whole], floor=floor)}
    for name, one, right in zip(("x", "w_in", "b_in", "w_out"), found, wanted, strict=True):
        if one is not None and right is not None:
            errors[name] = gate(f"gradient of {name}", one.cpu(), right.to(x.dtype), right, floor=floor)
    return errors | {"tokens compared": int(whole.sum())}


def check_grouped(
    tokens: int, mlps: int, width: int, gated: bool, dtype: torch.dtype, device: torch.device
) -> dict[str, float]:
    """Relative errors of grouped products and their gradients."""
    from fastffn.ops.grouped_mlp.reference import definition

    random = torch.Generator().manual_seed(tokens)
    shapes = ((tokens, 48), (mlps, width, 48), (mlps, width), (mlps, 40, width), (mlps, 40))
    shapes += ((mlps, width, 48), (mlps, width)) if gated else ()
    drawn = [(torch.randn(s, generator=random) / max(1, s[-1]) ** 0.5).to(dtype) for s in shapes]
    index = torch.randint(mlps, (tokens,), generator=random)

    def run(tensors: list[torch.Tensor], where: torch.device, function: Callable[..., torch.Tensor]) -> list[Any]:
        leaves = [t.to(where).requires_grad_() for t in tensors]
        y = function(leaves[0], index.to(where), *leaves[1:])
        return [y.detach(), *torch.autograd.grad(y.float().square().sum(), leaves)]

    def of_definition(x: torch.Tensor, i: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        return definition(x, i, *rest, *(() if gated else (None, None)), "gelu")

    with fastffn.use_backend("triton"):
        ours = run(drawn, device, fastffn.ops.grouped_mlp)
    same = run(drawn, torch.device("cpu"), of_definition)
    exact = run([t.double() for t in drawn], torch.device("cpu"), of_definition)
    names = ["y", "x", "up", "up bias", "down", "down bias", "gate", "gate bias"]
    # Of float32, whose sums have another order here, more than of dtypes that round sums only once.
    eps = rounding(dtype)
    floor = (32 if eps < 2**-20 else 4) * eps
    return {
        name: gate(name, one.cpu(), other, right, floor=floor)
        for name, one, other, right in zip(names, ours, same, exact, strict=False)
    }
