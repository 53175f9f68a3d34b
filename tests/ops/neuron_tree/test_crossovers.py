"""The table of crossovers: read at its points and between them, for each kind of processor, dtype and pass."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastffn.ops.neuron_tree import crossovers
from fastffn.ops.neuron_tree.crossovers import times_dense
from fastffn.ops.neuron_tree.request import Request
from tests.ops.isa import instruction_set

SIZES = {"width": [32, 512], "trees": [1, 4], "depth": [0, 2], "tokens": [1, 16]}
SHAPES = list(itertools.product(*SIZES.values()))


def value(width: float, trees: float, depth: float, tokens: float) -> float:
    """Straight lines in the logarithms: what lies in between can be reckoned."""
    return math.exp(0.3 * math.log2(width) - 0.5 * math.log2(trees) + 0.25 * depth - 0.7 * math.log2(tokens))


@pytest.fixture
def table(monkeypatch) -> dict:
    """A table of `value` for float32 under AVX2, with other numbers elsewhere."""

    def ways(factor: float, *names: str) -> dict[str, list[float]]:
        return {name: [factor * value(*shape) for shape in SHAPES] for name in names}

    def passes(factor: float) -> dict:
        return {"forward": ways(factor, "compiled", "cut", "walk"), "backward": ways(2 * factor, "compiled", "cut")}

    points = {
        "axes": SIZES,
        "avx2": {"float32": passes(1), "bfloat16": passes(3)},
        "avx512_bf16": {"float32": passes(5), "bfloat16": passes(7)},
        "avx512_amx": {"float32": passes(9), "bfloat16": passes(11), "float16": passes(13)},
    }
    caches = (crossovers._points, crossovers.axes, crossovers.processor, times_dense)
    for cached in caches:
        cached.cache_clear()
    monkeypatch.setattr(crossovers, "_points", lambda: points)
    monkeypatch.setattr(crossovers, "processor", lambda: "avx2")
    yield points
    monkeypatch.undo()
    for cached in caches:
        cached.cache_clear()


def request(width: int, trees: int, depth: int, tokens: int, dtype: torch.dtype = torch.float32) -> Request:
    return Request("cpu", dtype, tokens, trees, depth, width // 4, width - width // 4)


@pytest.mark.parametrize("shape", [*SHAPES, (100, 3, 1, 7)])
def test_points_and_what_is_between_them(table: dict, shape: tuple[int, int, int, int]) -> None:
    width, trees, depth, tokens = shape
    for way, backward, factor in (("compiled", False, 1), ("cut", False, 1), ("walk", False, 1), ("compiled", True, 2)):
        found = times_dense(way, request(width, trees, depth, tokens), backward)
        assert found == pytest.approx(factor * value(*shape))


@pytest.mark.parametrize(
    ("shape", "nearest"),
    [
        ((8, 4, 2, 16), (32, 4, 2, 16)),
        ((4096, 1, 0, 1), (512, 1, 0, 1)),
        ((32, 64, 2, 16), (32, 4, 2, 16)),
        ((32, 1, 11, 16), (32, 1, 2, 16)),
        ((32, 1, 2, 100_000), (32, 1, 2, 16)),
        ((32, 1, 2, 0), (32, 1, 2, 1)),
    ],
)
def test_outside_the_nearest_point_holds(table: dict, shape: tuple, nearest: tuple) -> None:
    assert times_dense("compiled", request(*shape), False) == pytest.approx(value(*nearest))


def test_dtypes_and_instruction_sets_have_rows_of_their_own(table: dict, monkeypatch) -> None:
    at = (32, 4, 2, 16)

    def factor(dtype: torch.dtype) -> float:
        times_dense.cache_clear()
        return times_dense("compiled", request(*at, dtype), False) / value(*at)

    assert [factor(dtype) for dtype in (torch.float32, torch.bfloat16)] == pytest.approx([1, 3])
    monkeypatch.setattr(crossovers, "processor", lambda: "avx512_bf16")
    assert [factor(dtype) for dtype in (torch.float32, torch.bfloat16)] == pytest.approx([5, 7])


@pytest.mark.parametrize(
    ("kind", "rows"),
    [
        ("avx512_amx", {"float32": 9, "bfloat16": 11, "float16": 13, "float64": 9}),
        # float16 is multiplied as slowly by the others as bfloat16 without products of its own.
        ("avx512_bf16", {"float32": 5, "bfloat16": 7, "float16": 3, "float64": 5}),
        ("avx512", {"float32": 5, "bfloat16": 7, "float16": 3, "float64": 5}),
        ("avx2", {"float32": 1, "bfloat16": 3, "float16": 3, "float64": 1}),
        ("neon", {"float32": 1, "bfloat16": 7, "float16": 3, "float64": 1}),
    ],
)
def test_what_was_not_measured_takes_what_comes_nearest(table: dict, kind: str, rows: dict, monkeypatch) -> None:
    monkeypatch.setattr(crossovers, "processor", lambda: kind)
    times_dense.cache_clear()
    at = (32, 4, 2, 16)
    found = {name: times_dense("compiled", request(*at, getattr(torch, name)), False) / value(*at) for name in rows}
    assert found == pytest.approx(rows)


def test_the_row_is_that_of_the_kernels_in_use(monkeypatch) -> None:
    def found() -> str:
        crossovers.processor.cache_clear()
        return crossovers.processor()

    try:
        for tiles, wide in ((False, "avx512_bf16"), (True, "avx512_amx")):
            monkeypatch.setattr(crossovers.cpu, "multiplies_tiles", lambda tiles=tiles: tiles)
            for name in crossovers.cpu.instruction_sets():
                with instruction_set(name):
                    assert found() == (wide if name == "avx512_bf16" else name)
        # Without the compiled module: what torch says.
        monkeypatch.setattr(crossovers.cpu, "instruction_sets", list)
        for capability, narrow, tiles, expected in (
            ("AVX512", True, True, "avx512_amx"),
            ("AVX512", True, False, "avx512_bf16"),
            ("AVX512", False, False, "avx512"),
            ("AVX2", False, False, "avx2"),
            ("DEFAULT", False, False, "avx2"),
        ):
            monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
            monkeypatch.setattr(crossovers.cpu, "multiplies_bfloat16", lambda narrow=narrow: narrow)
            monkeypatch.setattr(crossovers.cpu, "multiplies_tiles", lambda tiles=tiles: tiles)
            assert found() == expected
    finally:
        crossovers.processor.cache_clear()


def test_the_committed_table_is_whole() -> None:
    points = dict(crossovers._points())
    number = math.prod(len(values) for values in points.pop("axes").values())
    assert {kind: set(rows) - {"machine"} for kind, rows in points.items()} == {
        "avx2": {"float32", "bfloat16"},
        "avx512_bf16": {"float32", "bfloat16"},
        "avx512_amx": {"float32", "bfloat16", "float16"},
    }
    for rows in points.values():
        for dtype in set(rows) - {"machine"}:
            for name, ways in (("forward", {"compiled", "cut", "walk"}), ("backward", {"compiled", "cut"})):
                assert set(rows[dtype][name]) == ways
                for ratios in rows[dtype][name].values():
                    assert len(ratios) == number and all(ratio > 0 for ratio in ratios)


@settings(max_examples=200, deadline=None)
@given(
    tokens=st.integers(0, 100_000),
    trees=st.integers(1, 2000),
    depth=st.integers(0, 20),
    width=st.integers(2, 20_000),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    backward=st.booleans(),
)
def test_every_shape_has_an_answer(
    tokens: int, trees: int, depth: int, width: int, dtype: torch.dtype, backward: bool
) -> None:
    for way in ("compiled", "cut") if backward else ("compiled", "cut", "walk"):
        assert 0 < times_dense(way, request(width, trees, depth, tokens, dtype), backward) < 1e4
