from __future__ import annotations

import threading
from typing import NamedTuple

import pytest
import torch
import torch._dynamo

import fastffn
from fastffn.errors import BackendError, FastFFNError
from fastffn.ops import dispatch
from fastffn.ops.dispatch import Impl, Op, autocast, select, use_backend, verdicts


class Request(NamedTuple):
    rows: int


def impl(name: str, *, refuses: str | None = None, yields: str | None = None) -> Impl:
    return Impl(
        name=name,
        forward=lambda *_, **__: (),
        backward=lambda *_, **__: (),
        refuses=lambda _: refuses,
        yields=lambda _: yields,
    )


def test_the_first_that_can_run_is_taken() -> None:
    impls = [impl("fast", refuses="needs an accelerator"), impl("middle"), impl("slow")]
    assert select("op", impls, Request(3)).name == "middle"
    assert verdicts(impls, Request(3)) == {"fast": "needs an accelerator", "middle": None, "slow": None}


def test_one_that_yields_is_passed_over_unless_nobody_else_can_or_it_is_asked() -> None:
    impls = [impl("grouped", yields="slower for so few"), impl("dense", yields="slower too"), impl("reference")]
    assert select("op", impls, Request(3)).name == "reference"
    assert select("op", impls[:2], Request(3)).name == "grouped"
    with use_backend("dense"):
        assert select("op", impls, Request(3)).name == "dense"


def test_where_none_can_run_every_reason_is_named() -> None:
    impls = [impl("one", refuses="is for others"), impl("two", refuses="is not built")]
    with pytest.raises(BackendError, match=r"op can run Request\(rows=3\): one is for others; two is not built"):
        select("op", impls, Request(3))


def test_a_backend_asked_for_runs_or_raises_with_the_reasons() -> None:
    impls = [impl("one", refuses="is for others"), impl("two")]
    with use_backend("one"), pytest.raises(BackendError, match=r"'one' of op cannot run.*one is for others; two can"):
        select("op", impls, Request(3))
    with use_backend("twoo"), pytest.raises(BackendError, match=r"it has one, two. Did you mean 'two'"):
        select("op", impls, Request(3))
    assert issubclass(BackendError, FastFFNError) and issubclass(BackendError, RuntimeError)


def test_use_backend_nests_and_ends_with_its_context() -> None:
    impls = [impl("one"), impl("two"), impl("three")]
    with use_backend("two"):
        with use_backend("three"):
            assert select("op", impls, None).name == "three"
        assert select("op", impls, None).name == "two"
        with pytest.raises(ZeroDivisionError), use_backend("three"):
            raise ZeroDivisionError
        assert select("op", impls, None).name == "two"
    assert select("op", impls, None).name == "one"


def test_use_backend_holds_for_its_own_thread_only() -> None:
    impls = [impl("one"), impl("two")]
    seen: list[str] = []
    inside, go = threading.Event(), threading.Event()

    def other() -> None:
        with use_backend("two"):
            inside.set()
            go.wait(10)
            seen.append(select("op", impls, None).name)

    thread = threading.Thread(target=other)
    thread.start()
    assert inside.wait(10)
    seen.append(select("op", impls, None).name)
    go.set()
    thread.join()
    assert seen == ["one", "two"]
    assert fastffn.use_backend is use_backend


class Product:
    """`y = factor * x * w (+ b)`; counts the calls of each implementation."""

    def __init__(self, name: str) -> None:
        self.calls: list[str] = []
        self.op = Op(
            name,
            tensors="Tensor x, Tensor w, Tensor? b",
            options="float factor",
            saved=1,
            fake=lambda x, w, b, factor: (x.new_empty(x.shape), x.new_empty(x.shape)),
            request=lambda x, w, b, factor: Request(len(x)),
            example=Request(4),
            impls=[self.impl("first"), self.impl("second")],
            flops=lambda x, w, b, factor: 2 * x[0],
        )

    def impl(self, name: str) -> Impl:
        def forward(x, w, b, factor, *, keep, out):
            self.calls.append(f"{name} forward keep={keep}")
            y = x * w * factor
            if b is not None:
                y = y + b
            if out is not None:
                y = out.copy_(y)
            return (y, x * factor) if keep else (y,)

        def backward(gradient, x, w, b, factor, scaled, *, needs):
            self.calls.append(f"{name} backward {needs}")
            assert gradient.is_contiguous()
            return (
                gradient * w * factor if needs[0] else None,
                gradient * scaled if needs[1] else None,
                gradient.clone() if needs[2] else None,
            )

        def yields_backward(request: Request) -> str | None:
            return "leaves seven rows to others" if name == "first" and request.rows == 7 else None

        return Impl(name=name, forward=forward, backward=backward, yields_backward=yields_backward)


@pytest.fixture(scope="module")
def product() -> Product:
    return Product("product_for_tests")


@pytest.fixture
def calls(product: Product) -> list[str]:
    product.calls.clear()
    return product.calls


def test_without_gradients_straight_to_the_implementation(product: Product, calls: list[str]) -> None:
    x, w = torch.randn(4), torch.randn(4, requires_grad=True)
    with torch.no_grad():
        y = product.op((x, w, None), (2.0,))
        out = torch.empty(4)
        assert product.op((x, w, None), (2.0,), out) is out
    assert not y.requires_grad
    assert torch.equal(y, 2 * x * w.detach()) and torch.equal(out, y)
    assert calls == ["first forward keep=False"] * 2


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_are_those_asked_for(product: Product, calls: list[str], bias: bool, compiled: bool) -> None:
    torch._dynamo.reset()
    x, w = torch.randn(4), torch.randn(4, requires_grad=True)
    b = torch.randn(4, requires_grad=True) if bias else None

    def run(x, w, b):
        return product.op((x, w, b), (2.0,))

    call = torch.compile(run, fullgraph=True, backend="aot_eager") if compiled else run
    y = call(x, w, b)
    y.sum().backward()  # an expanded gradient
    torch.testing.assert_close(w.grad, 2 * x)
    if b is not None:
        torch.testing.assert_close(b.grad, torch.ones(4))
    assert calls == ["first forward keep=True", f"first backward {(False, True, bias)}"]


def test_compiled_code_asks_for_the_backend_each_time_it_runs(product: Product, calls: list[str]) -> None:
    torch._dynamo.reset()
    x, w = torch.randn(4), torch.randn(4)
    call = torch.compile(lambda x, w: product.op((x, w, None), (2.0,)), fullgraph=True, backend="aot_eager")
    with use_backend("second"):
        call(x, w)
    call(x, w)
    assert [line.split()[0] for line in calls] == ["second", "first"]


def test_use_backend_inside_compiled_code_breaks_the_graph_and_is_not_lost(product: Product, calls: list[str]) -> None:
    torch._dynamo.reset()

    def run(x, w):
        with use_backend("second"):
            return product.op((x, w, None), (2.0,))

    inputs = torch.randn(4), torch.randn(4)
    torch.compile(run, backend="aot_eager")(*inputs)
    assert [line.split()[0] for line in calls] == ["second"]
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="use_backend"):
        torch.compile(run, fullgraph=True, backend="aot_eager")(*inputs)


def test_opcheck(product: Product) -> None:
    x, w = torch.randn(4, requires_grad=True), torch.randn(4, requires_grad=True)
    torch.library.opcheck(product.op.operator.default, (x, w, None, 3.0))
    torch.library.opcheck(product.op.operator.default, (x, w, torch.randn(4, requires_grad=True), 3.0))


def test_tensors_without_memory_need_no_implementation(product: Product, calls: list[str]) -> None:
    x = torch.empty(4, device="meta", requires_grad=True)
    y = product.op((x, x, None), (2.0,))
    assert y.is_meta and y.shape == (4,)
    y.sum().backward()
    assert x.grad.shape == (4,)
    assert calls == []


def test_autocast_casts_what_torch_casts_and_is_off_in_the_implementation(product: Product) -> None:
    x, index, wide = torch.randn(3), torch.arange(3), torch.randn(3, dtype=torch.float64)
    assert [t.dtype for t in autocast(x, index, wide)] == [x.dtype, index.dtype, wide.dtype]
    seen = []
    with torch.autocast("cpu", torch.bfloat16):
        cast = autocast(x, index, wide, None)
        dispatch._plainly(x, lambda: seen.append(torch.is_autocast_enabled("cpu")))
    assert [t.dtype for t in cast[:3]] == [torch.bfloat16, index.dtype, wide.dtype]
    assert cast[3] is None
    assert seen == [False]


def test_backward_takes_the_implementation_of_the_forward(product: Product, calls: list[str]) -> None:
    x = torch.randn(4, requires_grad=True)
    with use_backend("second"):
        y = product.op((x, x.detach(), None), (2.0,))
    y.sum().backward()
    assert [line.split()[0] for line in calls] == ["second", "second"]


@pytest.mark.parametrize("compiled", [False, True])
def test_each_pass_has_its_own_implementation_unless_one_is_asked_for(
    product: Product, calls: list[str], compiled: bool
) -> None:
    def run(x: torch.Tensor) -> torch.Tensor:
        return product.op((x, x.detach(), None), (2.0,))

    x = torch.randn(7, requires_grad=True)
    call = torch.compile(run, backend="aot_eager", fullgraph=True) if compiled else run
    call(x).sum().backward()
    assert [line.split()[0] for line in calls] == ["first", "second"]
    calls.clear()
    with use_backend("first"):
        call(x).sum().backward()
    assert [line.split()[0] for line in calls] == ["first", "first"]


def test_the_backward_pass_yields_as_the_forward_pass_unless_it_says_otherwise() -> None:
    impls = [impl("fast", yields="slower for so few"), impl("slow")]
    assert select("op", impls, Request(3), backward=True).name == "slow"
