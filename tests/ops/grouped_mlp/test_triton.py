"""The Triton kernels in Triton's interpreter: what every implementation must do, on small shapes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastffn
from fastffn.errors import BackendError
from fastffn.ops import OPS, grouped_mlp, triton
from fastffn.ops.activations import ACTIVATIONS
from fastffn.ops.grouped_mlp.triton import IMPL
from tests.ops.grouped_mlp.test_grouped_mlp import (
    NAMES,
    check,
    drawn,
    tokens_of_no_mlp,
    what_is_no_number_stays_in_its_token,
    with_gradients,
)

pytestmark = pytest.mark.skipif(triton.found().device is None, reason=str(triton.found().reason))


@pytest.mark.slow
@settings(max_examples=12, deadline=None)
@given(
    T=st.integers(0, 120),
    E=st.integers(1, 6),
    D=st.integers(1, 70),
    W=st.integers(1, 70),
    O=st.integers(1, 70),
    bias=st.booleans(),
    gated=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 9),
)
def test_is_the_definition(T, E, D, W, O, bias, gated, dtype, seed) -> None:  # noqa: E741
    index, tensors = drawn(T, E, D, W, O, bias=bias, gated=gated, dtype=dtype, seed=seed)
    with fastffn.use_backend("triton"):
        check(index, tensors)


@pytest.mark.parametrize("gated", [False, True])
def test_an_mlp_of_several_tiles_and_an_empty_one(gated: bool) -> None:
    index, tensors = drawn(200, 4, 16, 130, 24, gated=gated, dtype=torch.float32)
    index[index == 1] = 0
    assert (index == 0).sum() > 64
    with fastffn.use_backend("triton"):
        check(index, tensors)


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_activations(activation: str) -> None:
    index, tensors = drawn(10, 2, 4, 8, 4, gated=True, dtype=torch.float32)
    with fastffn.use_backend("triton"):
        check(index, tensors, activation)


def test_same_bits_from_run_to_run_and_where_nothing_is_kept() -> None:
    index, tensors = drawn(100, 5, 20, 12, 20, gated=True, dtype=torch.float32)
    probe = torch.randn(100, 20)
    with fastffn.use_backend("triton"):
        runs = [with_gradients(index, tensors, probe) for _ in range(2)]
        arguments = (tensors["x"], index, *(tensors[name] for name in NAMES[1:]))
        assert torch.equal(grouped_mlp(*arguments, out=torch.empty(20, 100).T), runs[0]["y"])
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")  # the interpreter's, of NumPy
def test_what_every_implementation_must_do() -> None:
    tokens_of_no_mlp("triton")
    what_is_no_number_stays_in_its_token("triton")


def test_only_the_gradients_asked_for_and_backward_of_another() -> None:
    index, tensors = drawn(30, 3, 8, 8, 5, gated=True, dtype=torch.float32)
    case = (tensors["x"], index, *(tensors[name] for name in NAMES[1:]), "gelu")
    others = {impl.name: impl for impl in OPS["grouped_mlp"].impls}
    y, *saved = IMPL.forward(*case, keep=True, out=None)
    all_needs = (True, False, *[True] * 6)
    everything = IMPL.backward(y, *case, *saved, needs=all_needs)
    found = others["torch_grouped"].backward(y, *case, *saved, needs=all_needs)
    _, *theirs = others["torch_grouped"].forward(*case, keep=True, out=None)
    again = IMPL.backward(y, *case, *theirs, needs=all_needs)
    for ours, one, two in zip(everything, found, again, strict=True):
        if ours is not None:
            torch.testing.assert_close(one, ours)
            torch.testing.assert_close(two, ours)
    for one in (0, *range(2, 8)):
        few = IMPL.backward(y, *case, *saved, needs=tuple(i == one for i in range(8)))
        assert [g is not None for g in few] == [i == one for i in range(8)]
        assert torch.equal(few[one], everything[one])


def test_opcheck() -> None:
    index, tensors = drawn(6, 3, 4, 8, 5, dtype=torch.float32)
    for t in tensors.values():
        if t is not None:
            t.requires_grad_()
    with fastffn.use_backend("triton"):
        arguments = [tensors["x"], index, *(tensors[name] for name in NAMES[1:]), "gelu"]
        torch.library.opcheck(OPS["grouped_mlp"].operator.default, arguments)


def test_chosen_only_when_asked_for_on_a_cpu() -> None:
    assert "only when asked by name" in OPS["grouped_mlp"].verdicts()["triton"]
    index, tensors = drawn(6, 3, 4, 8, 5, dtype=torch.float64)
    with fastffn.use_backend("triton"), pytest.raises(BackendError, match="not float64"):
        grouped_mlp(tensors["x"], index, *(tensors[name] for name in NAMES[1:]))
