"""Every backend against the definition: outputs and all gradients, over drawn shapes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastffn.errors import BackendError
from fastffn.measure.gate import gate
from fastffn.ops import neuron_tree
from fastffn.ops.dispatch import use_backend
from fastffn.ops.neuron_tree import IMPLS, crossovers, dense, masked, reference, routes, torch_grouped
from fastffn.ops.neuron_tree.request import Request, neurons_of, path_to, request_of
from tests.ops.neuron_tree.cases import Case, clear, exact, make

# Triton's interpreter needs a thousand times as long: test_triton.py does the same with less.
COMPILED = [impl for impl in IMPLS if impl.name != "triton"]
BACKENDS = [impl for impl in COMPILED if impl.name != "reference"]
backends = pytest.mark.parametrize("impl", BACKENDS, ids=lambda impl: impl.name)
everyone = pytest.mark.parametrize("impl", COMPILED, ids=lambda impl: impl.name)

# Errors let pass beside twice those of the reference, in units of the dtype's precision and of the largest term that
# is summed. A backend multiplies in the dtype itself: scores and hidden activations are rounded, which the reference
# does not do; in float32 and float64 sums are in another order.
FLOOR = {torch.float32: 32, torch.bfloat16: 1, torch.float16: 1, torch.float64: 32}


class Terms(NamedTuple):
    """The largest that what is summed up in each result can be: where it cancels, errors are measured by this.

    Over T tokens, each term rounded, errors add up like a random walk: to sqrt(T) of one.
    """

    y: float
    scores: float
    x: float
    w_in: float
    b_in: float
    w_out: float

    @classmethod
    def of(cls, case: Case, scores: torch.Tensor, gradient: torch.Tensor) -> Terms:
        x, w_in, b_in, w_out = (torch.zeros(1) if t is None else t.double().abs() for t in case[:4])
        act = float(scores.abs().amax())  # of all activations drawn, none is larger than its argument
        d_act = float((gradient.double().abs() @ w_out.flatten(0, 1).T).amax())
        d_score = 1.2 * d_act * (1 + scores.shape[-1] * act * case.straight_through)
        walk = math.sqrt(len(gradient))
        return cls(
            y=act * float(w_out.amax()),
            scores=float((x @ w_in.flatten(0, 1).T).amax()) + float(b_in.amax()),
            x=d_score * float(w_in.amax()),
            w_in=walk * d_score * float(x.amax()),
            b_in=walk * d_score,
            w_out=walk * act * float(gradient.abs().amax()),
        )


def drawn(
    tokens: st.SearchStrategy[int], depth: st.SearchStrategy[int], trees: st.SearchStrategy[int]
) -> st.SearchStrategy[Case]:
    return st.builds(
        make,
        tokens,
        d_model=st.integers(1, 40),
        d_out=st.integers(1, 40),
        depth=depth,
        trees=trees,
        dtype=st.sampled_from(list(FLOOR)),
        bias=st.booleans(),
        activation=st.sampled_from(["gelu", "gelu_new", "relu", "silu", "linear"]),
        straight_through=st.booleans(),
        strided=st.booleans(),
        seed=st.integers(0, 2**31),
    )


def agrees(impl, case: Case) -> None:
    """Paths where nothing is near a tie, then outputs and gradients on the tokens whose paths are sure."""
    request = request_of(*case)
    if impl.refuses(request) is not None:
        with use_backend(impl.name), pytest.raises(BackendError, match=impl.refuses(request)):
            neuron_tree(*case[:5])
        return
    sure = clear(case)
    exact_y, exact_scores, exact_last = exact(case)
    same_y, same_scores, same_last = reference.neuron_tree(*case)
    y, scores, last = impl.forward(*case, keep=True, out=None)
    assert torch.equal(last[sure], exact_last[sure]) and torch.equal(same_last[sure], exact_last[sure])
    low = neurons_of(request.depth) // 2
    assert bool((last >= low).all()) and bool((last <= 2 * low).all())

    whole = sure.all(0)
    assert y.dtype == case.x.dtype and y.shape == exact_y.shape
    assert scores.dtype == same_scores.dtype and scores.shape == exact_scores.shape
    if not whole.any():
        return
    # A token whose path is not sure gets no gradient, and so gives none.
    gradient = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    gradient[~whole] = 0
    terms = Terms.of(case, exact_scores, gradient)

    def check(name: str, ours: torch.Tensor, theirs: torch.Tensor, right: torch.Tensor) -> None:
        largest = max(float(right.abs().amax()), torch.finfo(torch.float64).tiny)
        precision = FLOOR[case.x.dtype] * torch.finfo(case.x.dtype).eps
        gate(name, ours, theirs, right, floor=precision * max(1.0, getattr(terms, name) / largest))

    check("y", y[whole], same_y[whole], exact_y[whole])
    check("scores", scores[:, whole], same_scores[:, whole], exact_scores[:, whole])

    needs = (True,) * 4
    given = case.to(torch.float64)
    found = impl.backward(gradient, *case, scores, last, needs=needs)
    same = reference.backward(gradient, *case, same_scores, same_last, needs=needs)
    wanted = reference.backward(gradient.double(), *given, exact_scores, exact_last, needs=needs)
    for name, ours, theirs, right, tensor in zip(
        ["x", "w_in", "b_in", "w_out"], found, same, wanted, case[:4], strict=True
    ):
        assert (ours is None) == (tensor is None)
        if ours is not None:
            assert ours.dtype == tensor.dtype and ours.is_contiguous(), name
            check(name, ours, theirs, right)


@backends
@settings(max_examples=300, deadline=None)
@given(case=drawn(st.integers(0, 60), st.integers(0, 6), st.integers(1, 8)))
def test_small(impl, case: Case) -> None:
    agrees(impl, case)


@backends
@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(case=drawn(st.integers(100, 3000), st.integers(0, 11), st.integers(1, 2)))
def test_large(impl, case: Case) -> None:
    agrees(impl, case)


@backends
@pytest.mark.slow
@settings(max_examples=1000, deadline=None)
@given(
    case=drawn(st.integers(0, 12), st.integers(0, 4), st.integers(1, 3)),
    bad=st.sampled_from([math.nan, math.inf, -math.inf]),
    where=st.integers(0, 2**31),
)
def test_bad_values_stay_in_their_token(impl, case: Case, bad: float, where: int) -> None:
    if impl.refuses(request_of(*case)) is not None or not len(case.x):
        return
    token, column = where % len(case.x), where % case.x.shape[1]
    good, _, good_last = impl.forward(*case, keep=True, out=None)
    x = case.x.clone()
    x[token, column] = bad
    y, scores, last = impl.forward(x, *case[1:], keep=True, out=None)
    # Which segment a token is in moves its neighbours' rows: their sums may come in another order.
    others = (torch.arange(len(x)) != token) & clear(case).all(0)
    assert torch.equal(last[:, others], good_last[:, others])
    torch.testing.assert_close(y[others], good[others])
    low = case.w_in.shape[1] // 2
    assert bool((last >= low).all()) and bool((last <= 2 * low).all())
    if math.isnan(bad):
        assert bool((last[:, token] == low).all())
        assert bool(torch.isnan(y[token]).all() if case.activation != "relu" else True)
    assert scores.shape[-1] == path_to(last, scores.shape[-1]).shape[-1]


@everyone
@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_score_of_exactly_zero_goes_left(impl, cut: int, monkeypatch) -> None:
    monkeypatch.setattr(torch_grouped, "walks", lambda *_: False)
    monkeypatch.setattr(torch_grouped, "best_cut", lambda *_, **__: cut)
    case = make(50, depth=3, trees=1)
    case.w_in.zero_()
    case.b_in.zero_()
    assert (impl.forward(*case, keep=True, out=None)[2] == 7).all()
    case.b_in[0, 0] = 1e-30
    case.b_in[0, 2] = -1e-30
    assert (impl.forward(*case, keep=True, out=None)[2] == 11).all()


@everyone
@pytest.mark.parametrize("tokens", [3, 700])
def test_same_bits_from_run_to_run(impl, tokens: int) -> None:
    same_bits_from_run_to_run(impl, tokens)


def same_bits_from_run_to_run(impl, tokens: int) -> None:
    case = make(tokens, d_model=48, d_out=32, depth=6, trees=2)
    gradient = torch.randn(tokens, 32)

    def run() -> list[torch.Tensor]:
        y, scores, last = impl.forward(*case, keep=True, out=None)
        return [y, scores, last, *impl.backward(gradient, *case, scores, last, needs=(True,) * 4)]

    first, again = run(), run()
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("tokens", [64, 1500])
def test_same_bits_from_run_to_run_where_products_use_threads(tokens: int, threads: int, dtype: torch.dtype) -> None:
    # As wide as products must be for torch to split them. With another number of threads bits differ; see README.md.
    case = make(tokens, d_model=384, d_out=384, depth=9, trees=1, dtype=dtype)
    gradient = torch.randn(tokens, 384).to(dtype)
    asked = Request("cpu", dtype, 1500, 1, 9, 384, 384)
    assert not routes.walks(asked) and routes.walks(asked._replace(tokens=64))

    def run() -> list[torch.Tensor]:
        y, scores, last = torch_grouped.forward(*case, keep=True, out=None)
        return [y, scores, last, *torch_grouped.backward(gradient, *case, scores, last, needs=(True,) * 4)]

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        runs = [run() for _ in range(3)]
    finally:
        torch.set_num_threads(before)
    for again in runs[1:]:
        assert all(torch.equal(one, other) for one, other in zip(runs[0], again, strict=True))


@everyone
def test_only_the_gradients_asked_for(impl) -> None:
    only_the_gradients_asked_for(impl, 300)


def only_the_gradients_asked_for(impl, tokens: int) -> None:
    case = make(tokens, depth=5)
    y, scores, last = impl.forward(*case, keep=True, out=None)
    everything = impl.backward(y, *case, scores, last, needs=(True,) * 4)
    for one in range(4):
        needs = tuple(i == one for i in range(4))
        found = impl.backward(y, *case, scores, last, needs=needs)
        assert [g is not None for g in found] == list(needs)
        assert torch.equal(found[one], everything[one])


@everyone
def test_nodes_that_nobody_visits_have_gradient_zero(impl) -> None:
    nodes_that_nobody_visits_have_gradient_zero(impl, 300)


def nodes_that_nobody_visits_have_gradient_zero(impl, tokens: int) -> None:
    case = make(tokens, depth=4, trees=1)
    case.w_in[0, 0] = 0
    case.b_in[0, 0] = -1.0  # everybody goes left
    y, scores, last = impl.forward(*case, keep=True, out=None)
    _, d_w_in, d_b_in, d_w_out = impl.backward(torch.ones_like(y), *case, scores, last, needs=(True,) * 4)
    right = [2, 5, 6, 11, 12, 13, 14, *range(23, 31)]
    left = [n for n in range(31) if n not in right]
    for gradient in (d_w_in, d_b_in, d_w_out):
        assert not gradient[0, right].any()
        assert gradient[0, left].flatten(1).any(1).all() if gradient.dim() == 3 else gradient[0, left].all()


@everyone
def test_backward_may_run_in_another_backend_than_forward(impl) -> None:
    backward_may_run_in_another_backend_than_forward(impl, 300)


def backward_may_run_in_another_backend_than_forward(impl, tokens: int) -> None:
    case = make(tokens, depth=5)
    y, scores, last = impl.forward(*case, keep=True, out=None)
    found = impl.backward(y, *case, scores, last, needs=(True,) * 4)
    for other in COMPILED:
        for ours, theirs in zip(found, other.backward(y, *case, scores, last, needs=(True,) * 4), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_all_ways_of_cutting_agree(monkeypatch) -> None:
    case = make(200, depth=5)
    gradient = torch.randn(200, 7)
    sure = clear(case).all(0)
    gradient[~sure] = 0
    results = []
    monkeypatch.setattr(torch_grouped, "walks", lambda *_: False)
    for cut in range(1, 6):
        monkeypatch.setattr(torch_grouped, "best_cut", lambda *_, cut=cut, **__: cut)
        y, scores, last = torch_grouped.forward(*case, keep=True, out=None)
        results.append([y[sure], *torch_grouped.backward(gradient, *case, scores, last, needs=(True,) * 4)])
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_dense_in_several_chunks_is_dense_in_one(monkeypatch) -> None:
    case = make(100, depth=4)
    y, scores, last = dense.forward(*case, keep=True, out=None)
    whole = [y, scores, last, *dense.backward(y, *case, scores, last, needs=(True,) * 4)]
    monkeypatch.setattr(masked, "CHUNK_ELEMENTS", 62 * 17)
    chunked = list(dense.forward(*case, keep=True, out=None))
    chunked += dense.backward(chunked[0], *case, scores, last, needs=(True,) * 4)
    for one, two in zip(whole, chunked, strict=True):
        torch.testing.assert_close(one, two)


@settings(max_examples=300, deadline=None)
@given(
    tokens=st.integers(0, 100_000),
    levels=st.integers(2, 20),
    width=st.integers(2, 20_000),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    backward=st.booleans(),
)
def test_the_rule_names_a_possible_cut(
    tokens: int, levels: int, width: int, dtype: torch.dtype, backward: bool
) -> None:
    assert 1 <= routes.best_cut(tokens, levels, width, dtype, backward) < levels


def request(tokens: int, trees: int, depth: int, dtype: torch.dtype = torch.float32) -> Request:
    return Request("cpu", dtype, tokens, trees, depth, 768, 768)


@pytest.fixture
def processor(monkeypatch) -> Iterator[Callable[[str], None]]:
    """Makes the rule that of another processor."""

    def become(name: str) -> None:
        monkeypatch.setattr(crossovers, "processor", lambda: name)
        forget()

    def forget() -> None:
        crossovers.times_dense.cache_clear()
        routes.cheapest.cache_clear()

    yield become
    monkeypatch.undo()
    forget()


@pytest.mark.parametrize("name", ["avx512_bf16", "avx512_amx", "avx2"])
def test_the_rule_at_the_shapes_that_matter(name: str, processor) -> None:
    processor(name)
    for backward in (False, True):
        assert {routes.cheapest(request(tokens, 1, 11), backward) for tokens in (1, 64, 512, 4096)} == {"torch_grouped"}
        # 128 trees of five levels: sorting 128 times costs more than evaluating all.
        assert routes.cheapest(request(512, 128, 4), backward) == "dense"
        assert routes.cheapest(request(512, 64, 0), backward) == "dense"
    assert routes.walks(request(16, 1, 11)) and not routes.walks(request(4096, 1, 11))


def test_the_rule_knows_passes_dtypes_and_processors(processor) -> None:
    def compiled(request: Request, backward: bool = False) -> bool:
        reason = routes.why_not("cpu", request, backward=backward)
        assert reason is None or "leaves it to dense" in reason
        return reason is None

    processor("avx512_bf16")
    assert all(compiled(request(tokens, 1, 11), backward) for tokens in (1, 4096) for backward in (False, True))
    # Trees of one neuron are a dense FFN; a single call of a compiled kernel is the cheaper one for a few tokens.
    assert compiled(request(16, 64, 0)) and not compiled(request(2048, 64, 0))
    # Backward, where products have more to do, dense overtakes earlier.
    assert compiled(request(4096, 4, 1)) and not compiled(request(4096, 4, 1), backward=True)
    # So it does where products of bfloat16 have instructions.
    assert compiled(request(1024, 64, 2)) and not compiled(request(1024, 64, 2, torch.bfloat16))
    # float16 has slow products everywhere.
    assert compiled(request(1024, 64, 1, torch.float16)) and compiled(request(2048, 64, 2, torch.float16))
    assert all(compiled(request(tokens, 128, 4)) for tokens in (1, 64, 4096))
    processor("avx2")
    assert compiled(request(1024, 64, 2, torch.bfloat16))
    assert all(compiled(request(tokens, 128, 4)) for tokens in (1, 64, 4096))
    # Dense of 64 tokens is faster on a processor with AMX, in float32 too; float16 has products there.
    processor("avx512_amx")
    assert compiled(request(1, 128, 4)) and compiled(request(4096, 128, 4)) and not compiled(request(64, 128, 4))
    assert not compiled(request(2048, 64, 2, torch.float16))


def test_compiled_kernels_leave_a_call_to_whatever_is_faster(monkeypatch, processor) -> None:
    processor("avx2")
    times = {"compiled": 0.5, "cut": 0.4, "walk": 0.9}
    monkeypatch.setattr(routes, "times_dense", lambda way, *_: times[way])
    asked = request(64, 1, 5)
    assert "leaves it to torch_grouped" in (routes.why_not("cpu", asked) or "")
    times["cut"] = 0.6
    assert routes.why_not("cpu", asked) is None
    times["walk"] = 0.51
    assert "leaves it to torch_grouped" in (routes.why_not("cpu", asked) or "")
    assert routes.why_not("cpu", asked, backward=True) is None
    times["compiled"] = 0.84
    assert routes.why_not("cpu", asked._replace(depth=0)) is None
    times["compiled"] = 0.86
    assert "leaves it to dense" in (routes.why_not("cpu", asked._replace(depth=0)) or "")
