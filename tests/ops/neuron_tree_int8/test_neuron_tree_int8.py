"""Trees with int8 weights: the tree of the numbers that the weights stand for, by every backend."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastffn
from fastffn.errors import BackendError, DeviceError, DtypeError, ShapeError
from fastffn.measure.gate import gate
from fastffn.ops import cpu, neuron_tree_int8
from fastffn.ops.int8 import quantize_rows
from fastffn.ops.neuron_tree import reference
from fastffn.ops.neuron_tree_int8 import IMPLS
from tests.ops.isa import instruction_set
from tests.ops.neuron_tree.cases import Case, clear, exact, make

every_isa = pytest.mark.parametrize("isa", cpu.instruction_sets() or ["none"])


def quantized(case: Case) -> tuple[tuple, Case]:
    """The arguments of `neuron_tree_int8`, and the case whose weights are the numbers that they stand for."""
    (w_in, in_scale), (w_out, out_scale) = quantize_rows(case.w_in), quantize_rows(case.w_out)
    b_in = None if case.b_in is None else case.b_in.float()
    stands_for = case._replace(
        w_in=w_in.double() * in_scale.double().unsqueeze(-1), w_out=w_out.double() * out_scale.double().unsqueeze(-1)
    )
    return (case.x, w_in, in_scale, b_in, w_out, out_scale, case.activation), stands_for


def agrees(name: str, case: Case) -> None:
    arguments, stands_for = quantized(case)
    with torch.no_grad(), fastffn.use_backend(name):
        y = neuron_tree_int8(*arguments)
    assert y.dtype == case.x.dtype
    # Scores are float32 whatever the tokens are.
    sure = clear(stands_for._replace(x=case.x.float())).all(0)
    if not sure.any():
        return
    expected = exact(stands_for)[0]
    # What is added up may cancel: the tree of float32 weights errs as much.
    same = reference.neuron_tree(*stands_for.to(torch.float32))[0].to(y.dtype)
    # The floor: another order of summation.
    gate("y", y[sure].double(), same[sure].double(), expected[sure], floor=32 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("name", [impl.name for impl in IMPLS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [0, 1, 5, 300])
def test_is_the_tree_of_what_the_weights_stand_for(name: str, dtype: torch.dtype, tokens: int) -> None:
    agrees(name, make(tokens, depth=5, trees=3, d_model=83, d_out=37, dtype=dtype))


@every_isa
@settings(max_examples=40, deadline=None)
@given(
    case=st.builds(
        make,
        st.one_of(st.integers(1, 150), st.integers(151, 1500)),
        d_model=st.integers(1, 300),
        d_out=st.integers(1, 300),
        depth=st.integers(0, 9),
        trees=st.integers(1, 5),
        dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
        bias=st.booleans(),
        activation=st.sampled_from(["gelu", "relu", "silu", "tanh"]),
        strided=st.booleans(),
        seed=st.integers(0, 2**31),
    )
)
def test_compiled_kernels_on_drawn_shapes(isa: str, case: Case) -> None:
    if isa == "none":
        pytest.skip("the compiled module is not there")
    with instruction_set(isa):
        agrees("cpu", case)


def test_rounding_of_rows() -> None:
    weight = torch.randn(2, 7, 50, dtype=torch.float64)
    weight[1, 3] = 0
    rows, scale = quantize_rows(weight)
    assert rows.dtype == torch.int8 and scale.dtype == torch.float32
    assert bool((rows.abs().amax(-1)[scale > 0] == 127).all())
    away = (rows.double() * scale.double().unsqueeze(-1) - weight).abs()
    assert bool((away <= (0.5 + 1e-4) * scale.double().unsqueeze(-1)).all())
    assert scale[1, 3] == 0 and not rows[1, 3].any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", [impl.name for impl in IMPLS])
def test_weights_that_are_not_finite_are_not_hidden(name: str, bad: float) -> None:
    case = make(6, depth=2, trees=1)
    case.w_out[0, 0, 1] = bad
    arguments, _ = quantized(case)
    with torch.no_grad(), fastffn.use_backend(name):
        assert neuron_tree_int8(*arguments).isnan().all()


@pytest.mark.parametrize("name", [impl.name for impl in IMPLS])
def test_a_token_that_is_not_finite_stays_alone(name: str) -> None:
    arguments, _ = quantized(make(200, depth=6))
    with torch.no_grad(), fastffn.use_backend(name):
        clean = neuron_tree_int8(*arguments)
        arguments[0][2, 3] = float("nan")
        y = neuron_tree_int8(*arguments)
    others = torch.arange(200) != 2
    assert torch.equal(y[others], clean[others])
    assert not y[2].isfinite().any()


def test_leading_axes_out_and_tracing() -> None:
    (x, *weights), _ = quantized(make(24))
    with torch.no_grad():
        expected = neuron_tree_int8(x, *weights)
        assert torch.equal(neuron_tree_int8(x.view(2, 3, 4, 9), *weights), expected.view(2, 3, 4, 7))
        for name in [impl.name for impl in IMPLS]:
            out = torch.full((4, 6, 7), torch.nan)
            with fastffn.use_backend(name):
                assert neuron_tree_int8(x.view(4, 6, 9), *weights, out=out) is out
            torch.testing.assert_close(out.view(24, 7), expected)
        compiled = torch.compile(neuron_tree_int8, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x, *weights), expected)
    torch.library.opcheck(torch.ops.fastffn.neuron_tree_int8.default, (x, *weights))


def test_threads_do_not_change_bits() -> None:
    arguments, _ = quantized(make(3000, d_model=50, d_out=33, depth=7))
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(neuron_tree_int8(*arguments))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, found[0]) for one in found)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": torch.ones(3, 8)}, ShapeError, r"x of shape \[3, 8\]"),
        ({"x": torch.tensor(1.0)}, ShapeError, r"x of shape \[\]"),
        ({"x": torch.ones(3, 9, dtype=torch.float64)}, DtypeError, "x of torch.float64"),
        ({"w_in": torch.ones(2, 15, 9)}, DtypeError, "w_in of torch.float32; it must be torch.int8"),
        ({"w_in": torch.ones(2, 14, 9, dtype=torch.int8)}, ShapeError, r"w_in \[2, 14, 9\]"),
        ({"w_in": torch.ones(14, 9, dtype=torch.int8)}, ShapeError, r"w_in \[14, 9\]"),
        ({"in_scale": torch.ones(2, 14)}, ShapeError, r"in_scale of shape \[2, 14\]"),
        ({"out_scale": torch.ones(2, 15).half()}, DtypeError, "out_scale of torch.float16"),
        ({"b_in": torch.ones(2, 15, device="meta")}, DeviceError, "b_in on meta"),
        ({"out": torch.ones(3, 8)}, ShapeError, r"out of shape \[3, 8\]"),
        ({"x": torch.ones(3, 9, requires_grad=True)}, BackendError, "for inference"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(change: dict, error: type[Exception], words: str) -> None:
    arguments, _ = quantized(make(3))
    names = ("x", "w_in", "in_scale", "b_in", "w_out", "out_scale", "activation")
    with pytest.raises(error, match=words):
        neuron_tree_int8(**(dict(zip(names, arguments, strict=True)) | change))


def test_a_tree_that_is_not_full_is_refused() -> None:
    w_in, w_out = torch.ones(1, 6, 9, dtype=torch.int8), torch.ones(1, 6, 7, dtype=torch.int8)
    with pytest.raises(ShapeError, match=r"2\*\*\(depth \+ 1\) - 1"):
        neuron_tree_int8(torch.ones(3, 9), w_in, torch.ones(1, 6), None, w_out, torch.ones(1, 6))
