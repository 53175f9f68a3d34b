"""The public function: what it refuses, and its three call paths."""

from __future__ import annotations

import threading

import pytest
import torch
import torch._dynamo
import torch._dynamo.testing

import fastffn
from fastffn.errors import BackendError, ConfigError, DeviceError, DtypeError, ShapeError
from fastffn.ops import triton
from fastffn.ops.neuron_tree import IMPLS, NEURON_TREE, neuron_tree, reference
from tests.ops.neuron_tree.cases import make

# Where Triton is missing test_triton.py says so.
NAMES = [impl.name for impl in IMPLS if impl.name != "triton" or triton.found().device is not None]
everyone = pytest.mark.parametrize("name", NAMES)


@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (2, 0), (2, 3, 4)])
def test_leading_axes(shape: tuple[int, ...]) -> None:
    case = make(1)
    x = torch.randn(*shape, 9)
    y = fastffn.ops.neuron_tree(x, *case[1:5])
    assert y.shape == (*shape, 7)
    if x.numel():
        rows = torch.stack([neuron_tree(row, *case[1:5]) for row in x.reshape(-1, 9)])
        torch.testing.assert_close(y.reshape(-1, 7), rows)


def test_out_is_filled_and_returned() -> None:
    case = make(40)
    out = torch.full((4, 10, 7), torch.nan)
    for name in NAMES:
        with fastffn.use_backend(name):
            assert neuron_tree(case.x.view(4, 10, 9), *case[1:5], out=out) is out
        torch.testing.assert_close(out.view(40, 7), neuron_tree(*case[:5]))
        out.fill_(torch.nan)


def test_out_is_refused_where_it_does_not_fit() -> None:
    case = make(4)
    with pytest.raises(ShapeError, match=r"out of shape \[4, 8\].*\[4, 7\]"):
        neuron_tree(*case[:5], out=torch.empty(4, 8))
    with pytest.raises(ShapeError, match="contiguous"):
        neuron_tree(*case[:5], out=torch.empty(7, 4).T)
    with pytest.raises(DtypeError, match="float64"):
        neuron_tree(*case[:5], out=torch.empty(4, 7, dtype=torch.float64))
    with pytest.raises(DeviceError, match="meta"):
        neuron_tree(*case[:5], out=torch.empty(4, 7, device="meta"))
    case.w_in.requires_grad_()
    with pytest.raises(BackendError, match="gradient"):
        neuron_tree(*case[:5], out=torch.empty(4, 7))
    with torch.no_grad():
        neuron_tree(*case[:5], out=torch.empty(4, 7))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": torch.randn(3, 8)}, ShapeError, r"x of shape \[3, 8\] and w_in \[2, 15, 9\]"),
        ({"x": torch.tensor(1.0)}, ShapeError, r"x of shape \[\]"),
        ({"x": torch.ones(3, 9, dtype=torch.int64)}, DtypeError, "int64"),
        ({"x": torch.ones(3, 9, dtype=torch.bool)}, DtypeError, "bool"),
        ({"x": torch.randn(3, 9, dtype=torch.complex64)}, DtypeError, "complex64"),
        ({"x": torch.randn(3, 9, dtype=torch.float64)}, DtypeError, "float64 and w_in of torch.float32"),
        ({"w_out": torch.randn(2, 15, 7).bfloat16()}, DtypeError, "w_out of torch.bfloat16"),
        ({"x": torch.randn(3, 9, device="meta")}, DeviceError, "x on meta and w_in on cpu"),
        ({"w_out": torch.randn(2, 15, 7, device="meta")}, DeviceError, "w_out on meta"),
        ({"b_in": torch.randn(2, 15, device="meta")}, DeviceError, "b_in on meta"),
        ({"w_in": torch.randn(15, 9)}, ShapeError, r"w_in \[15, 9\].*unsqueeze"),
        ({"w_out": torch.randn(2, 14, 7)}, ShapeError, "same P and N"),
        ({"w_out": torch.randn(3, 15, 7)}, ShapeError, "same P and N"),
        ({"b_in": torch.randn(2, 14)}, ShapeError, "same P and N"),
        ({"b_in": torch.randn(30)}, ShapeError, "same P and N"),
        ({"w_in": torch.randn(2, 16, 9), "b_in": None, "w_out": torch.randn(2, 16, 7)}, ShapeError, "1, 3, 7"),
        ({"w_in": torch.randn(0, 15, 9), "b_in": None, "w_out": torch.randn(0, 15, 7)}, ShapeError, "empty"),
        ({"w_in": torch.randn(2, 0, 9), "b_in": None, "w_out": torch.randn(2, 0, 7)}, ShapeError, "1, 3, 7"),
        ({"w_out": torch.randn(2, 15, 0)}, ShapeError, "empty"),
        ({"activation": "geluu"}, ConfigError, "Did you mean 'gelu'"),
    ],
)
def test_bad_input(change: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        neuron_tree(**(make(3)._asdict() | change))


def test_a_tree_too_deep_is_refused_before_anything_is_computed() -> None:
    deep = torch.empty(1, 2**32 - 1, 1, device="meta")
    with pytest.raises(ShapeError, match="depth of 0 to 30"):
        neuron_tree(torch.empty(2, 1, device="meta"), deep, None, deep)


@everyone
@pytest.mark.parametrize("bias", [False, True])
def test_opcheck(name: str, bias: bool) -> None:
    case = make(3 if name == "triton" else 70, bias=bias)  # interpreted
    for tensor in case.tensors:
        tensor.requires_grad_()
    with fastffn.use_backend(name):
        torch.library.opcheck(NEURON_TREE.operator.default, tuple(case))


@everyone
@pytest.mark.parametrize("tokens", [1, 70])
def test_gradients_of_the_two_differentiable_paths_are_those_of_the_definition(name: str, tokens: int) -> None:
    torch._dynamo.reset()
    tokens = min(tokens, 5) if name == "triton" else tokens  # interpreted
    case = make(tokens, dtype=torch.float32 if name in ("cpu", "triton") else torch.float64)
    tensors = [t.requires_grad_() for t in case.tensors]

    def loss(*tensors: torch.Tensor) -> torch.Tensor:
        return neuron_tree(*tensors, "gelu").square().sum()

    expected = torch.autograd.grad(reference.neuron_tree(*case)[0].square().sum(), tensors)
    with fastffn.use_backend(name):
        eager = torch.autograd.grad(loss(*tensors), tensors)
        compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*tensors), tensors)
    for one, two, three in zip(expected, eager, compiled, strict=True):
        torch.testing.assert_close(one, two)
        torch.testing.assert_close(one, three)


def test_compiled_it_is_one_node() -> None:
    torch._dynamo.reset()
    graphs = []

    def keep(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]):
        graphs.append([str(node.target) for node in graph.graph.nodes if "fastffn" in str(node.target)])
        return graph

    case = make(20)
    call = torch.compile(neuron_tree, fullgraph=True, backend=keep)
    torch.testing.assert_close(call(*case[:5]), neuron_tree(*case[:5]))
    assert graphs == [["fastffn.neuron_tree.default"]]


def test_weights_as_inputs_of_changing_shape_compile() -> None:
    torch._dynamo.reset()
    call = torch.compile(neuron_tree, fullgraph=True, backend="aot_eager", dynamic=True)
    for depth in (2, 3, 4):
        case = make(20, depth=depth)
        torch.testing.assert_close(call(*case[:5]), neuron_tree(*case[:5]))


def test_autocast() -> None:
    case = make(50)
    case.w_in.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = neuron_tree(*case[:5])
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, neuron_tree(*case.to(torch.bfloat16)[:5]))
    y.sum().backward()
    assert case.w_in.grad.dtype == torch.float32


def test_without_memory() -> None:
    case = make(50)
    x, w_in, b_in, w_out = (t.to("meta").requires_grad_() for t in case[:4])
    y = neuron_tree(x, w_in, b_in, w_out)
    assert y.is_meta and y.shape == (50, 7)
    y.sum().backward()
    assert [t.grad.shape for t in (x, w_in, b_in, w_out)] == [t.shape for t in (x, w_in, b_in, w_out)]


def test_many_threads_at_once() -> None:
    case = make(200, depth=6)
    expected = dict.fromkeys(("torch_grouped", "dense", "reference"))
    for name in expected:
        with fastffn.use_backend(name):
            expected[name] = neuron_tree(*case[:5])
    wrong = []

    def run(name: str) -> None:
        for _ in range(10):
            with fastffn.use_backend(name):
                if not torch.equal(neuron_tree(*case[:5]), expected[name]):
                    wrong.append(name)

    threads = [threading.Thread(target=run, args=(name,)) for name in expected for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
