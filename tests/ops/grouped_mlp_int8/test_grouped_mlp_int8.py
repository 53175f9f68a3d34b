"""Grouped MLPs with int8 weights: the MLPs of the numbers that the weights stand for, by every backend."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastffn
from fastffn.errors import BackendError, DeviceError, DtypeError, IndexRangeError, ShapeError
from fastffn.measure.gate import gate
from fastffn.ops import cpu, grouped_mlp_int8
from fastffn.ops.activations import ACTIVATIONS
from fastffn.ops.grouped_mlp.reference import definition
from fastffn.ops.grouped_mlp_int8 import IMPLS
from fastffn.ops.int8 import dequantize_rows, quantize_rows
from tests.ops.isa import instruction_set

BACKENDS = [impl.name for impl in IMPLS if impl.name != "cpu" or cpu.instruction_sets()]
every_isa = pytest.mark.parametrize("isa", cpu.instruction_sets() or ["none"])


def make(
    tokens: int, mlps: int, d_in: int, width: int, d_out: int, *, gated=False, bias=True, dtype=torch.float32, seed=0
) -> dict[str, torch.Tensor | None]:
    """Arguments of `grouped_mlp_int8` by name."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    index = torch.randint(0, mlps, (tokens,), generator=generator)
    arguments: dict[str, torch.Tensor | None] = {"x": normal(tokens, d_in).to(dtype), "index": index}
    for name, rows, depth in (("up", width, d_in), ("down", d_out, width), ("gate", width, d_in)):
        there = gated or name != "gate"
        weight, scale = quantize_rows(normal(mlps, rows, depth) / depth**0.5)
        arguments[f"{name}_weight"] = weight if there else None
        arguments[f"{name}_scale"] = scale.to(dtype) if there else None
        arguments[f"{name}_bias"] = normal(mlps, rows).to(dtype) if there and bias else None
    return arguments


def stands_for(arguments: dict, activation: str, dtype: torch.dtype) -> torch.Tensor:
    """The output of the MLPs whose weights are the numbers that the int8 ones stand for."""

    def wide(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor.to(dtype)

    def weights(name: str) -> torch.Tensor | None:
        rows, scale = arguments[f"{name}_weight"], arguments[f"{name}_scale"]
        return None if rows is None else rows.to(dtype) * scale.to(dtype).unsqueeze(-1)

    maps = [part for name in ("up", "down", "gate") for part in (weights(name), wide(arguments[f"{name}_bias"]))]
    return definition(wide(arguments["x"]), arguments["index"], *maps, activation)


def agrees(arguments: dict, activation: str = "gelu", *, rounded: bool = False) -> None:
    """`rounded`: hidden activations and weights are rounded to the dtype of x as well."""
    with torch.no_grad():
        y = grouped_mlp_int8(**arguments, activation=activation)
    assert y.dtype == arguments["x"].dtype
    same = stands_for(arguments, activation, torch.float32).to(y.dtype)
    if not len(y):
        assert y.shape == same.shape
        return
    # The floor: another order of summation.
    floor = 8 * torch.finfo(y.dtype).eps if rounded else 64 * torch.finfo(torch.float32).eps
    gate("y", y.double(), same.double(), stands_for(arguments, activation, torch.float64), floor=floor)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("tokens", [0, 1, 7, 300])
def test_is_the_mlp_of_what_the_weights_stand_for(name, dtype, gated, tokens) -> None:
    with fastffn.use_backend(name):
        rounded = name == "multiplied_out" and dtype != torch.float32
        agrees(make(tokens, 3, 83, 50, 37, gated=gated, dtype=dtype), rounded=rounded)


def test_double_precision() -> None:
    arguments = make(20, 2, 30, 20, 10, gated=True, dtype=torch.float64)
    expected = stands_for(arguments, "gelu", torch.float64)
    torch.testing.assert_close(grouped_mlp_int8(**arguments), expected, rtol=1e-12, atol=1e-12)


@every_isa
@settings(max_examples=40, deadline=None)
@given(
    T=st.one_of(st.integers(1, 40), st.integers(1, 700)),
    E=st.one_of(st.just(1), st.integers(1, 20)),
    D=st.integers(1, 300),
    W=st.integers(1, 130),
    O=st.integers(1, 130),
    gated=st.booleans(),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    seed=st.integers(0, 2**31),
)
def test_compiled_kernels_on_drawn_shapes(isa, T, E, D, W, O, gated, bias, dtype, activation, seed) -> None:  # noqa: E741
    if isa == "none":
        pytest.skip("the compiled module is not there")
    with instruction_set(isa), fastffn.use_backend("cpu"):
        agrees(make(T, E, D, W, O, gated=gated, bias=bias, dtype=dtype, seed=seed), activation)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the compiled module is not there")
@pytest.mark.parametrize("tokens", [1, 33, 700])
def test_the_same_bits_from_any_number_of_threads(tokens: int) -> None:
    arguments = make(tokens, 1, 300, 200, 90, gated=True)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            with fastffn.use_backend("cpu"):
                found.append(grouped_mlp_int8(**arguments))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, found[0]) for one in found)


@pytest.mark.parametrize("name", BACKENDS)
def test_strides_out_and_what_is_not_finite(name: str) -> None:
    arguments = make(9, 2, 20, 12, 11, gated=True)
    with fastffn.use_backend(name):
        expected = grouped_mlp_int8(**arguments)
        apart = torch.empty(9, 40)
        apart[:, 5:25] = arguments["x"]
        weight = arguments["up_weight"].transpose(1, 2).contiguous().transpose(1, 2)
        torch.testing.assert_close(
            grouped_mlp_int8(**(arguments | {"x": apart[:, 5:25], "up_weight": weight})), expected
        )
        out = torch.full((9, 11), torch.nan)
        assert grouped_mlp_int8(**arguments, out=out) is out
        assert torch.equal(out, expected)
        arguments["x"][2, 3] = torch.nan
        y = grouped_mlp_int8(**arguments)
        others = torch.arange(9) != 2
        assert torch.equal(y[others], expected[others]) and y[2].isnan().all()


def test_tracing_and_autocast() -> None:
    arguments = make(9, 2, 20, 12, 11, gated=True)
    compiled = torch.compile(grouped_mlp_int8, fullgraph=True, backend="aot_eager")
    expected = grouped_mlp_int8(**arguments)
    assert torch.equal(compiled(**arguments), expected)
    torch.library.opcheck(torch.ops.fastffn.grouped_mlp_int8.default, (*arguments_in_order(arguments), "gelu"))
    with torch.autocast("cpu", torch.bfloat16):
        y = grouped_mlp_int8(**arguments)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.05)


def test_large_batches_go_where_products_of_bfloat16_are(monkeypatch) -> None:
    from fastffn.ops.grouped_mlp import routes
    from fastffn.ops.grouped_mlp.op import Request
    from fastffn.ops.grouped_mlp_int8 import cpu as compiled

    monkeypatch.setattr(routes, "multiplies_bfloat16", lambda: True)
    request = Request(128, 1, 576, 1536, 576, True, torch.bfloat16, "cpu")
    assert "leaves it to multiplied_out" in (compiled.IMPL.yields(request) or "")
    # Products of whole tiles make no difference: multiplying weights out takes longer than they do.
    monkeypatch.setattr(routes, "multiplies_tiles", lambda: True)
    for other in ({"tokens": 127}, {"dtype": torch.float32}, {"mlps": 2}):
        assert compiled.IMPL.yields(request._replace(**other)) is None


def arguments_in_order(arguments: dict) -> list[torch.Tensor | None]:
    parts = [f"{name}_{part}" for name in ("up", "down", "gate") for part in ("weight", "scale", "bias")]
    return [arguments["x"], arguments["index"], *(arguments[part] for part in parts)]


def test_int8_rows_stand_for_the_weights() -> None:
    weight = torch.randn(3, 20, 30, dtype=torch.float64)
    rows, scale = quantize_rows(weight)
    exact = rows.double() * scale.double().unsqueeze(-1)
    assert ((exact - weight).abs() <= (0.5 + 1e-4) * scale.double().unsqueeze(-1)).all()
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        found = dequantize_rows(rows, scale.to(dtype))
        assert found.dtype == dtype
        assert torch.equal(found, (rows.double() * scale.to(dtype).double().unsqueeze(-1)).to(dtype))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": torch.ones(3, 8)}, ShapeError, r"x has the shape \[3, 8\]"),
        ({"x": torch.ones(3, 9, dtype=torch.int64)}, DtypeError, "x is torch.int64"),
        ({"up_weight": torch.ones(2, 5, 9)}, DtypeError, "up_weight is torch.float32; it must be torch.int8"),
        ({"down_weight": torch.ones(2, 7, 4, dtype=torch.int8)}, ShapeError, r"down_weight has the shape \[2, 7, 4\]"),
        ({"down_scale": torch.ones(2, 5)}, ShapeError, r"down_scale has the shape \[2, 5\]; it must be \[2, 7\]"),
        ({"up_scale": torch.ones(2, 5).half()}, DtypeError, "up_scale is torch.float16 and x torch.float32"),
        ({"gate_scale": None}, ShapeError, "gate_weight and gate_scale"),
        ({"up_scale": None}, ShapeError, "up_weight and up_scale"),
        ({"down_scale": None}, ShapeError, "down_weight and down_scale"),
        ({"gate_weight": None, "gate_bias": None}, ShapeError, "gate_weight and gate_scale"),
        ({"down_bias": torch.ones(2, 7, device="meta")}, DeviceError, "down_bias is on 'meta'"),
        ({"index": torch.tensor([0, 1, 2])}, IndexRangeError, "there are 2 MLPs"),
        ({"out": torch.ones(3, 8)}, ShapeError, r"out has the shape \[3, 8\]"),
        ({"x": torch.ones(3, 9, requires_grad=True)}, BackendError, "for inference"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(change: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        grouped_mlp_int8(**(make(3, 2, 9, 5, 7, gated=True) | change))
