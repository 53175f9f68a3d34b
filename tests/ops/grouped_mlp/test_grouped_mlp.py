from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastffn
from fastffn.errors import BackendError, DtypeError, IndexRangeError, ShapeError
from fastffn.measure.gate import gate
from fastffn.measure.memory import peak_bytes
from fastffn.ops import OPS, grouped_mlp
from fastffn.ops.activations import ACTIVATIONS
from fastffn.ops.grouped_mlp import torch_grouped
from fastffn.ops.grouped_mlp.reference import definition

NAMES = ("x", "up_weight", "up_bias", "down_weight", "down_bias", "gate_weight", "gate_bias")
# Triton's interpreter needs a thousand times as long: test_triton.py does the same with less.
IMPLS = [impl.name for impl in OPS["grouped_mlp"].impls if impl.name != "triton"]


def drawn(T, E, D, W, O, *, bias=True, gated=False, dtype=torch.float64, seed=0):  # noqa: E741
    """Index and tensors by name; weights of a spread that keeps values near 1."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=g, dtype=torch.float64) / max(1, shape[-1]) ** 0.5).to(dtype)

    tensors = {
        "x": torch.randn(T, D, generator=g, dtype=torch.float64).to(dtype),
        "up_weight": normal(E, W, D),
        "up_bias": normal(E, W) if bias else None,
        "down_weight": normal(E, O, W),
        "down_bias": normal(E, O) if bias else None,
        "gate_weight": normal(E, W, D) if gated else None,
        "gate_bias": normal(E, W) if gated and bias else None,
    }
    # Uneven, and with MLPs that get nothing.
    index = (torch.rand(T, generator=g) ** 2 * E).long().clamp_max(E - 1)
    return index, tensors


def call(index, tensors, function=None, activation="gelu"):
    t = tensors
    arguments = (t["up_weight"], t["up_bias"], t["down_weight"], t["down_bias"], t["gate_weight"], t["gate_bias"])
    if function is None:
        return grouped_mlp(t["x"], index, *arguments, activation=activation)
    return function(t["x"], index, *arguments, activation)


def with_gradients(index, tensors, probe, function=None, activation="gelu"):
    """Output, and the gradient of every tensor that there is."""
    leaves = {name: None if t is None else t.detach().clone().requires_grad_() for name, t in tensors.items()}
    y = call(index, leaves, function, activation)
    names = [name for name in NAMES if leaves[name] is not None]
    gradients = torch.autograd.grad(y, [leaves[name] for name in names], probe.to(y.dtype), allow_unused=True)
    filled = (torch.zeros_like(leaves[n]) if g is None else g for n, g in zip(names, gradients, strict=True))
    return {"y": y.detach()} | dict(zip(names, filled, strict=True))


def as_dtype(tensors, dtype):
    return {name: None if t is None else t.to(dtype) for name, t in tensors.items()}


def check(index, tensors, activation="gelu"):
    dtype = tensors["x"].dtype
    probe = torch.randn(len(index), tensors["down_weight"].shape[1], generator=torch.Generator().manual_seed(9))
    ours = with_gradients(index, tensors, probe.to(dtype), None, activation)
    same = with_gradients(index, tensors, probe.to(dtype), definition, activation)
    exact = with_gradients(index, as_dtype(tensors, torch.float64), probe.to(dtype), definition, activation)
    assert set(ours) == set(exact)
    # The largest that what is summed up in each result can be: where it cancels, errors are measured by this.
    sizes = {name: None if t is None else t.double().abs() for name, t in tensors.items()}
    terms = with_gradients(index, sizes, probe.to(dtype).abs(), definition, "linear")
    for name in exact:
        if exact[name].numel():
            largest = max(exact[name].abs().max().item(), torch.finfo(torch.float64).tiny)
            cancelled = max(1.0, terms[name].max().item() / largest)
            # The floor: sums over the tokens of an MLP are made in another order, a bias is added after rounding.
            gate(name, ours[name], same[name], exact[name], floor=4 * torch.finfo(dtype).eps * cancelled)
        assert ours[name].dtype == dtype and ours[name].shape == exact[name].shape


def test_formula_by_hand() -> None:
    x = torch.tensor([[1.0, 2.0], [3.0, -1.0], [1.0, 2.0]])
    up = torch.tensor([[[1.0, 0.0]], [[0.0, 2.0]]])
    down = torch.tensor([[[10.0]], [[100.0]]])
    y = grouped_mlp(x, torch.tensor([0, 1, 1]), up, torch.tensor([[1.0], [0.0]]), down, None, activation="relu")
    # (1 + 1) * 10; 2 * -1 is below zero; 2 * 2 * 100.
    assert y.tolist() == [[20.0], [0.0], [400.0]]


@settings(max_examples=400, deadline=None)
@given(
    T=st.one_of(st.integers(0, 40), st.integers(1, 2500)),
    E=st.integers(1, 40),
    D=st.one_of(st.integers(1, 33), st.sampled_from([8, 16, 24])),
    W=st.one_of(st.integers(1, 33), st.sampled_from([8, 16, 24])),
    O=st.one_of(st.integers(1, 33), st.sampled_from([8, 16, 24])),
    bias=st.booleans(),
    gated=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    impl=st.sampled_from(IMPLS),
    seed=st.integers(0, 9),
)
def test_every_implementation_is_the_definition(T, E, D, W, O, bias, gated, dtype, impl, seed) -> None:  # noqa: E741
    if impl == "cpu" and dtype == torch.float64:
        dtype = torch.float32
    index, tensors = drawn(T, E, D, W, O, bias=bias, gated=gated, dtype=dtype, seed=seed)
    with fastffn.use_backend(impl):
        check(index, tensors)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("worth_calls", [0, 10**9])
def test_widths_that_grouped_products_take(impl, dtype, gated, worth_calls, monkeypatch) -> None:
    monkeypatch.setattr(torch_grouped, "_WORTH_CALLS", worth_calls)
    monkeypatch.setattr(torch_grouped, "_PIECE", 50)
    index, tensors = drawn(300, 5, 16, 8, 24, gated=gated, dtype=dtype)
    assert not (index == 4).all() and len(set(index.tolist())) > 2
    index[index == 1] = 2  # an empty one in the middle
    with fastffn.use_backend(impl):
        check(index, tensors)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_activations(impl, activation) -> None:
    for gated in (False, True):
        index, tensors = drawn(30, 3, 4, 8, 4, gated=gated, dtype=torch.float32)
        with fastffn.use_backend(impl):
            check(index, tensors, activation)


@pytest.mark.parametrize("impl", [name for name in IMPLS if name != "cpu"])  # which takes no float64
@pytest.mark.parametrize("gated", [False, True])
def test_gradcheck(impl, gated) -> None:
    index, tensors = drawn(7, 3, 3, 4, 2, gated=gated)
    given_names = [name for name in NAMES if tensors[name] is not None]

    def function(*values):
        return call(index, tensors | dict(zip(given_names, values, strict=True)))

    with fastffn.use_backend(impl):
        values = [tensors[name].requires_grad_() for name in given_names]
        assert torch.autograd.gradcheck(function, values)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("T", [6, 0])
@pytest.mark.parametrize("d_out", [5, 12])
def test_opcheck(gated, T, d_out) -> None:
    index, tensors = drawn(T, 3, 4, 8, d_out, gated=gated, dtype=torch.float32)
    for t in tensors.values():
        if t is not None:
            t.requires_grad_()
    arguments = [tensors["x"], index, *(tensors[name] for name in NAMES[1:]), "gelu"]
    torch.library.opcheck(OPS["grouped_mlp"].operator.default, arguments)


@pytest.mark.parametrize("gated", [False, True])
def test_compiled_is_eager(gated) -> None:
    torch._dynamo.reset()
    index, tensors = drawn(20, 3, 4, 8, 5, gated=gated, dtype=torch.float32)
    probe = torch.randn(20, 5)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    ours = with_gradients(
        index, tensors, probe, lambda x, i, *rest: compiled(i, dict(zip(NAMES, (x, *rest[:-1]), strict=True)))
    )
    eager = with_gradients(index, tensors, probe)
    for name, value in eager.items():
        assert torch.equal(ours[name], value), name


def test_other_strides() -> None:
    index, tensors = drawn(40, 3, 8, 16, 8, gated=True, dtype=torch.float32)
    other = {n: None if t is None else t.transpose(0, -1).contiguous().transpose(0, -1) for n, t in tensors.items()}
    assert not other["x"].is_contiguous() and not other["up_weight"].is_contiguous()
    probe = torch.randn(8, 40).T
    one, two = with_gradients(index, tensors, probe), with_gradients(index, other, probe)
    for name in one:
        torch.testing.assert_close(two[name], one[name])


def test_expanded_gradient() -> None:
    index, tensors = drawn(40, 3, 8, 16, 8, dtype=torch.float32)
    tensors["up_weight"].requires_grad_()
    call(index, tensors).sum().backward()
    assert tensors["up_weight"].grad.any()


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.uint8])
def test_other_whole_numbers(index_dtype) -> None:
    index, tensors = drawn(40, 3, 8, 16, 8)
    assert torch.equal(call(index.to(index_dtype), tensors), call(index, tensors))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("worth_calls", [0, 10**9])
def test_same_bits_from_run_to_run(impl, threads, dtype, worth_calls, monkeypatch) -> None:
    # Of widths that products split by threads. With another number of threads bits differ; see README.md of the op.
    monkeypatch.setattr(torch_grouped, "_WORTH_CALLS", worth_calls)
    index, tensors = drawn(700, 16, 64, 40, 64, gated=True, dtype=dtype)
    probe = torch.randn(700, 64).to(dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with fastffn.use_backend(impl):
            runs = [with_gradients(index, tensors, probe) for _ in range(3)]
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(run[name], runs[0][name]) for name in run)


@pytest.mark.parametrize("impl", IMPLS)
def test_what_is_no_number_stays_in_its_token(impl) -> None:
    what_is_no_number_stays_in_its_token(impl)


def what_is_no_number_stays_in_its_token(impl) -> None:
    index, tensors = drawn(30, 3, 8, 8, 8, dtype=torch.float32)
    clean = call(index, tensors)
    spoilt = tensors | {"x": tensors["x"].clone()}
    spoilt["x"][7] = float("nan")
    spoilt["x"][11] = float("inf")
    with fastffn.use_backend(impl):
        y = call(index, spoilt)
    others = [n for n in range(30) if n not in (7, 11)]
    torch.testing.assert_close(y[others], clean[others])
    assert y[7].isnan().all()


@settings(max_examples=1000, deadline=None)
@given(
    T=st.integers(1, 12),
    E=st.integers(1, 5),
    D=st.integers(1, 9),
    W=st.integers(1, 9),
    O=st.integers(1, 9),
    bias=st.booleans(),
    gated=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    impl=st.sampled_from(IMPLS),
    bad=st.sampled_from([float("nan"), float("inf"), float("-inf")]),
    where=st.integers(0, 10**6),
)
def test_bad_values_stay_in_their_token(T, E, D, W, O, bias, gated, dtype, impl, bad, where) -> None:  # noqa: E741
    """The output of the other tokens, and the gradient that they get, are what they were."""
    if impl == "cpu" and dtype == torch.float64:  # which it refuses
        dtype = torch.float32
    index, tensors = drawn(T, E, D, W, O, bias=bias, gated=gated, dtype=dtype, seed=where)
    probe = torch.randn(T, O, generator=torch.Generator().manual_seed(where)).to(dtype)
    token, column = where % T, where // T % D
    spoilt = tensors | {"x": tensors["x"].clone()}
    spoilt["x"][token, column] = bad
    with fastffn.use_backend(impl):
        good, found = with_gradients(index, tensors, probe), with_gradients(index, spoilt, probe)
    others = torch.arange(T) != token
    for name in ("y", "x"):
        assert torch.equal(found[name][others], good[name][others])
    if bad != bad:
        assert found["y"][token].isnan().all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("worth_calls", [0, 10**9])
def test_tokens_of_no_mlp(impl, worth_calls, monkeypatch) -> None:
    monkeypatch.setattr(torch_grouped, "_WORTH_CALLS", worth_calls)
    tokens_of_no_mlp(impl)


def tokens_of_no_mlp(impl) -> None:
    """Where an index is out of range and nobody can say so in time, the token gets zeros and gives no gradient."""
    index, tensors = drawn(30, 3, 8, 8, 8, dtype=torch.float32)
    index[4], index[9] = -1, 3
    good = torch.ones(30, dtype=torch.bool)
    good[[4, 9]] = False
    with fastffn.use_backend(impl):
        with pytest.raises(IndexRangeError, match=r"from -1 to 3; there are 3 MLPs"):
            call(index, tensors)
        operator = OPS["grouped_mlp"].operator.default
        leaves = {name: None if t is None else t.clone().requires_grad_() for name, t in tensors.items()}
        y = operator(leaves["x"], index, *(leaves[name] for name in NAMES[1:]), "gelu")[0]
        probe = torch.randn(30, 8)
        y.backward(probe)
    expected = with_gradients(index[good], tensors | {"x": tensors["x"][good]}, probe[good])
    torch.testing.assert_close(y[good].detach(), expected["y"])
    assert not y[~good].any() and not leaves["x"].grad[~good].any()
    for name in NAMES[1:5]:
        torch.testing.assert_close(leaves[name].grad, expected[name])


def test_out_is_filled() -> None:
    index, tensors = drawn(30, 3, 8, 8, 5)
    out = torch.full((30, 5), float("nan"), dtype=torch.float64)
    arguments = (tensors["x"], index, *(tensors[name] for name in NAMES[1:]))
    assert grouped_mlp(*arguments, out=out) is out
    assert torch.equal(out, grouped_mlp(*arguments))


def test_memory_is_that_of_the_tokens_and_their_mlp() -> None:
    T, D, W, O = 1000, 16, 8, 16  # noqa: E741
    peaks = {}
    for E in (2, 64, 512):
        index, tensors = drawn(T, E, D, W, O, dtype=torch.float32)
        with torch.no_grad():
            peaks[E, "forward"] = peak_bytes(lambda i=index, t=tensors: call(i, t), torch.device("cpu"))
        tensors["x"].requires_grad_()  # without the weights' gradients, which grow with E
        peaks[E, "both"] = peak_bytes(lambda i=index, t=tensors: call(i, t).sum().backward(), torch.device("cpu"))
    for what in ("forward", "both"):
        # Some 60 bytes a token are the sort's. With 2 MLPs they go one after the other, with 64 all at once.
        assert all(peaks[E, what] < T * (4 * (2 * D + 4 * W + 3 * O) + 60) for E in (2, 64))
        assert peaks[512, what] < 1.1 * peaks[64, what]


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"x": torch.randn(5, 9)}, ShapeError, r"x has the shape \[5, 9\].*D = 8"),
        ({"x": torch.randn(5)}, ShapeError, r"x has the shape \[5\]"),
        ({"x": torch.ones(5, 8, dtype=torch.int64)}, DtypeError, "x is torch.int64"),
        ({"up_weight": torch.randn(3, 0, 8)}, ShapeError, r"\[3, 0, 8\]"),
        ({"up_weight": torch.randn(16, 8)}, ShapeError, r"up_weight has the shape \[16, 8\]"),
        ({"down_weight": torch.randn(2, 6, 16)}, ShapeError, "down_weight.*E = 3"),
        ({"up_bias": torch.randn(16)}, ShapeError, r"up_bias has the shape \[16\]; it must be \[3, 16\]"),
        ({"down_bias": torch.randn(3, 6, dtype=torch.float64)}, DtypeError, "down_bias is torch.float64"),
        ({"gate_bias": torch.randn(3, 16)}, ShapeError, "gate_bias is given without"),
    ],
)
def test_bad_input(changes, error, words) -> None:
    _, tensors = drawn(5, 3, 8, 16, 6, dtype=torch.float32)
    with pytest.raises(error, match=words):
        call(torch.zeros(5, dtype=torch.int64), tensors | changes)


def test_bad_index() -> None:
    _, tensors = drawn(5, 3, 8, 16, 6, dtype=torch.float32)
    with pytest.raises(ShapeError, match=r"index has the shape \[4\]; it must be \[5\]"):
        call(torch.zeros(4, dtype=torch.int64), tensors)
    with pytest.raises(DtypeError, match=r"index is torch.float32"):
        call(torch.zeros(5), tensors)
    with fastffn.use_backend("grouped"), pytest.raises(BackendError, match="no backend 'grouped'"):
        call(torch.zeros(5, dtype=torch.int64), tensors)
