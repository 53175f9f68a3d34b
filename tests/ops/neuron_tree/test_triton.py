"""The Triton kernels in Triton's interpreter, each of the two designs: what every backend must do, on small shapes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastffn
from fastffn.errors import BackendError
from fastffn.ops import neuron_tree
from fastffn.ops import triton as found
from fastffn.ops.activations import ACTIVATIONS
from fastffn.ops.dispatch import use_backend
from fastffn.ops.neuron_tree import IMPLS, NEURON_TREE, routes, triton
from fastffn.ops.neuron_tree.request import Request
from fastffn.ops.neuron_tree.triton import IMPL
from tests.ops.neuron_tree import test_backends
from tests.ops.neuron_tree.cases import Case, clear, make

pytestmark = pytest.mark.skipif(found.found().device is None, reason=str(found.found().reason))

both = pytest.mark.parametrize("kernel", ["path", "levels"])


@pytest.fixture
def using(monkeypatch):
    """Makes one of the kernels run, of the path kernel one that takes many tokens at once: fewer to be interpreted."""

    def use(kernel: str, together: tuple[int, int] = (16, 2)) -> None:
        monkeypatch.setattr(triton, "kernel_for", lambda tokens, trees, levels, width: kernel if levels > 1 else "path")
        if found.found().device is not None:
            from fastffn.ops.neuron_tree import triton_path

            monkeypatch.setattr(triton_path, "together", lambda tokens: together)

    return use


def cases(most_tokens: int) -> st.SearchStrategy[Case]:
    return st.builds(
        make,
        st.integers(0, most_tokens),
        d_model=st.integers(1, 70),
        d_out=st.integers(1, 70),
        depth=st.integers(0, 5),
        trees=st.integers(1, 3),
        dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
        bias=st.booleans(),
        activation=st.sampled_from(["gelu", "gelu_new", "relu", "silu", "linear"]),
        straight_through=st.booleans(),
        strided=st.booleans(),
        seed=st.integers(0, 2**31),
    )


@both
@pytest.mark.slow
def test_agrees_with_the_definition(kernel: str, using) -> None:
    using(kernel)

    @settings(max_examples=8, deadline=None)
    @given(case=cases(100))
    def check(case: Case) -> None:
        test_backends.agrees(IMPL, case)

    check()


@pytest.mark.parametrize("together", [(1, 1), (1, 3), (2, 1), (4, 4)])
def test_any_number_of_tokens_together_and_levels_in_a_hop(together: tuple[int, int], using) -> None:
    using("path", together)
    for depth, trees in ((4, 1), (1, 2)):  # hops that fit, and that do not
        test_backends.agrees(IMPL, make(5, depth=depth, trees=trees, straight_through=True))


@both
@pytest.mark.parametrize("shape", [
    {"depth": 8, "trees": 1, "d_model": 33, "straight_through": True},  # more columns, five levels above the cut
    {"depth": 6, "trees": 2, "d_model": 130, "d_out": 100},  # several steps of a product, several tiles of columns
    {"depth": 3, "trees": 1, "tokens": 200},  # more tokens of a subtree than a tile has
], ids=str)  # fmt: skip
def test_larger_shapes(kernel: str, shape: dict, using) -> None:
    using(kernel)
    test_backends.agrees(IMPL, make(**({"tokens": 20} | shape)))


@both
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_activations(activation: str, kernel: str, using) -> None:
    using(kernel)
    case = make(20, depth=2, trees=1, activation=activation, straight_through=True)
    case.w_in.mul_(4)  # far enough from zero that every branch of each is met
    test_backends.agrees(IMPL, case)


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, kernel: str, using) -> None:
    using(kernel)
    case = make(64, depth=4, trees=1, d_model=40, d_out=24, dtype=dtype)
    assert clear(case).float().mean() > 0.5  # most tokens are compared
    test_backends.agrees(IMPL, case)


def test_a_layer_with_a_shared_part_and_several_trees(using) -> None:
    using("levels")
    torch.manual_seed(0)
    ffn = fastffn.build("neuron_tree", d_model=24, depth=3, trees=2, shared=5)
    x = torch.randn(40, 24, requires_grad=True)
    found = []
    for backend in ("reference", "triton"):
        with use_backend(backend):
            y = ffn(x)
            found.append([y, *torch.autograd.grad(y.square().sum(), [x, *ffn.parameters()])])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@both
@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")  # the interpreter's, of NumPy
def test_bad_values_stay_in_their_token(kernel: str, using) -> None:
    using(kernel)
    for bad in (math.nan, math.inf, -math.inf):
        case = make(20, depth=4, trees=1)
        good, _, good_last = IMPL.forward(*case, keep=True, out=None)
        x = case.x.clone()
        x[4, 3] = bad
        y, _, last = IMPL.forward(x, *case[1:], keep=True, out=None)
        others = (torch.arange(20) != 4) & clear(case).all(0)
        assert torch.equal(last[:, others], good_last[:, others])
        torch.testing.assert_close(y[others], good[others])
        assert bool((last >= 15).all()) and bool((last <= 30).all())
        assert not y[4].isfinite().all()
        if math.isnan(bad):
            assert bool((last[:, 4] == 15).all())  # left at every node


@both
def test_a_score_of_exactly_zero_goes_left(kernel: str, using) -> None:
    using(kernel)
    case = make(20, depth=3, trees=1)
    case.w_in.zero_()
    case.b_in.zero_()
    assert (IMPL.forward(*case, keep=True, out=None)[2] == 7).all()
    case.b_in[0, 0] = 1e-30
    case.b_in[0, 2] = -1e-30
    assert (IMPL.forward(*case, keep=True, out=None)[2] == 11).all()


@both
def test_what_every_backend_must_do(kernel: str, using) -> None:
    using(kernel)
    test_backends.only_the_gradients_asked_for(IMPL, 20)
    test_backends.nodes_that_nobody_visits_have_gradient_zero(IMPL, 100)
    test_backends.backward_may_run_in_another_backend_than_forward(IMPL, 40)


@both
def test_same_bits_from_run_to_run(kernel: str, using) -> None:
    using(kernel)
    test_backends.same_bits_from_run_to_run(IMPL, 40)


@both
def test_nobody_waits_for_the_device(kernel: str, using) -> None:
    """Nothing on the way looks at a value of a tensor: a device would have to be waited for, a graph not captured."""
    from torch.utils._python_dispatch import TorchDispatchMode

    used = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            used.add(str(func))
            return func(*args, **(kwargs or {}))

    using(kernel)
    case = make(40, depth=4)
    with Watch():
        y, *saved = IMPL.forward(*case, keep=True, out=None)
        IMPL.backward(y, *case, *saved, needs=(True,) * 4)
    # The interpreter itself copies tensors, to the CPU and back.
    own = used - {"aten.copy_.default", "aten._to_copy.default", "aten.detach.default"}
    assert not {name for name in own if "item" in name or "scalar_dense" in name or "nonzero" in name}, used
    assert "aten.empty.memory_format" in used or "aten.new_empty.default" in used


def test_chosen_only_when_asked_for_on_a_cpu() -> None:
    NEURON_TREE.forget()
    assert NEURON_TREE.choose(Request("cpu", torch.float32, 64, 1, 11, 768, 768)).name != "triton"
    assert "only when asked by name" in NEURON_TREE.verdicts()["triton"]
    case = make(10, depth=2)
    with use_backend("triton"):
        y = neuron_tree(*case[:5])
    torch.testing.assert_close(y, neuron_tree(*case[:5]))
    with use_backend("triton"), pytest.raises(BackendError, match="takes float32, bfloat16 and float16, not float64"):
        neuron_tree(*case.to(torch.float64)[:5])


def test_the_rule_at_the_shapes_that_matter() -> None:
    def kernel(tokens: int, depth: int = 11) -> str:
        return routes.kernel_for(tokens, 1, depth + 1, 1536)

    assert [kernel(tokens) for tokens in (1, 64, 1024)] == ["path"] * 3
    assert [kernel(tokens) for tokens in (4096, 16384, 131072)] == ["levels"] * 3
    assert kernel(131072, depth=14) == "path" and kernel(131072, depth=0) == "path"  # too deep to be cut, and too flat
    names = [impl.name for impl in IMPLS]
    assert names.index("triton") < names.index("torch_grouped")

    def why_not(trees: int, depth: int, tokens: int = 1024) -> str | None:
        return routes.why_not("triton", Request("accelerator", torch.bfloat16, tokens, trees, depth, 768, 768))

    assert why_not(1, 11) is None
    # What would run instead is no plain dense FFN: it has a descent of many small operators, even of a shallow tree.
    assert why_not(1, 9, tokens=1) is None and why_not(1, 7, tokens=16384) is None
    assert "dense" in why_not(128, 4)  # many shallow trees
