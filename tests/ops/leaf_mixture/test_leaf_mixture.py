from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastffn.errors import DtypeError, ShapeError
from fastffn.measure.gate import gate
from fastffn.ops import OPS, leaf_mixture
from fastffn.ops.leaf_mixture import torch_chunked
from fastffn.ops.leaf_mixture.reference import definition, path_weights

NAMES = ("x", "scores", "up_weight", "up_bias", "down_weight", "down_bias")


def drawn(T, depth, D, W, O, *, dtype=torch.float64, seed=0):  # noqa: E741
    g = torch.Generator().manual_seed(seed)
    L = 2**depth

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    tensors = {
        "x": normal(T, D),
        "scores": 2 * normal(T, L - 1),
        "up_weight": normal(L, W, D) / D**0.5,
        "up_bias": normal(L, W),
        "down_weight": normal(L, O, W) / W**0.5,
        "down_bias": normal(L, O),
    }
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def with_gradients(tensors, probe, kept=None, *, reference=False, activation="gelu"):
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}
    if reference:
        y = definition(leaves["x"], leaves["scores"], kept, *(leaves[name] for name in NAMES[2:]), activation)
    else:
        y = leaf_mixture(*(leaves[name] for name in NAMES), kept=kept, activation=activation)
    gradients = torch.autograd.grad(y, list(leaves.values()), probe, allow_unused=True)
    filled = (torch.zeros_like(t) if g is None else g for t, g in zip(leaves.values(), gradients, strict=True))
    return {"y": y.detach()} | dict(zip(leaves, filled, strict=True))


def test_weights_by_hand() -> None:
    # Nodes 0, 1, 2 go right with 3/4, 1/2, 1/5.
    right = torch.tensor([[0.75, 0.5, 0.2]], dtype=torch.float64)
    weights = path_weights(torch.logit(right))
    torch.testing.assert_close(weights, torch.tensor([[0.125, 0.125, 0.6, 0.15]], dtype=torch.float64))
    assert path_weights(torch.empty(3, 0)).tolist() == [[1.0]] * 3


@settings(max_examples=300, deadline=None)
@given(
    T=st.integers(0, 60),
    depth=st.integers(0, 6),
    D=st.integers(1, 20),
    W=st.integers(1, 17),
    O=st.integers(1, 20),
    kept=st.booleans(),
    small_chunks=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 9),
)
def test_is_the_definition(T, depth, D, W, O, kept, small_chunks, dtype, seed) -> None:  # noqa: E741
    tensors = drawn(T, depth, D, W, O, dtype=dtype, seed=seed)
    g = torch.Generator().manual_seed(seed)
    probe = torch.randn(T, O, generator=g).to(dtype)
    mask = torch.randint(0, 2, (T, 2**depth, W), generator=g).to(dtype) * 2 if kept else None
    with pytest.MonkeyPatch.context() as patch:
        if small_chunks:
            patch.setattr(torch_chunked, "CHUNK_VALUES", 1)
            patch.setattr(torch_chunked, "CHUNK_ROWS", 1)
        ours = with_gradients(tensors, probe, mask)
    same = with_gradients(tensors, probe, mask, reference=True)
    exact = with_gradients(
        {name: t.double() for name, t in tensors.items()},
        probe.double(),
        None if mask is None else mask.double(),
        reference=True,
    )
    # The largest that what is summed up in each result can be: where it cancels, errors are measured by this.
    sizes = {name: t.double().abs() if name != "scores" else t.double() for name, t in tensors.items()}
    mask = None if mask is None else mask.double()
    terms = with_gradients(sizes, probe.double().abs(), mask, reference=True, activation="linear")
    # A score's gradient is a difference of weighted leaves: no larger than the largest leaf.
    leaves = 2**depth * terms["y"].abs().sum(1) * probe.double().abs().sum(1)
    terms["scores"] = leaves.amax(0, keepdim=True) if T else leaves
    for name in exact:
        if exact[name].numel():
            largest = max(exact[name].abs().max().item(), torch.finfo(torch.float64).tiny)
            cancelled = max(1.0, terms[name].abs().max().item() / largest)
            # The floor: the weights of the leaves are rounded to the dtype once, and so are scaled activations; sums
            # over the tokens are made in another order.
            gate(name, ours[name], same[name], exact[name], floor=4 * torch.finfo(dtype).eps * cancelled)
        assert ours[name].dtype == dtype and ours[name].shape == exact[name].shape


@settings(max_examples=500, deadline=None)
@given(
    T=st.integers(1, 9),
    depth=st.integers(0, 4),
    D=st.integers(1, 9),
    W=st.integers(1, 5),
    O=st.integers(1, 9),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    bad=st.sampled_from([float("nan"), float("inf"), float("-inf")]),
    of_scores=st.booleans(),
    where=st.integers(0, 10**6),
)
def test_bad_values_stay_in_their_token(T, depth, D, W, O, dtype, bad, of_scores, where) -> None:  # noqa: E741
    """The output of the other tokens, and the gradient that they get, are what they were."""
    tensors = drawn(T, depth, D, W, O, dtype=dtype, seed=where)
    probe = torch.randn(T, O, generator=torch.Generator().manual_seed(where)).to(dtype)
    name, token = "scores" if of_scores and depth else "x", where % T
    spoilt = tensors | {name: tensors[name].clone()}
    spoilt[name][token, where // T % spoilt[name].shape[1]] = bad
    good, found = with_gradients(tensors, probe), with_gradients(spoilt, probe)
    others = torch.arange(T) != token
    for result in ("y", "x", "scores"):
        assert torch.equal(found[result][others], good[result][others])
    if bad != bad:
        assert found["y"][token].isnan().all()


def test_gradcheck_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_chunked, "CHUNK_VALUES", 1)
    monkeypatch.setattr(torch_chunked, "CHUNK_ROWS", 1)
    tensors = drawn(9, 2, 3, 2, 2)
    values = [tensors[name].requires_grad_() for name in NAMES]
    assert len(list(torch_chunked._chunks(9, 8))) > 3
    assert torch.autograd.gradcheck(lambda *v: leaf_mixture(*v), values)


@pytest.mark.parametrize("T", [5, 0])
def test_opcheck(T) -> None:
    tensors = {name: t.requires_grad_() for name, t in drawn(T, 2, 3, 4, 5, dtype=torch.float32).items()}
    arguments = [tensors["x"], tensors["scores"], None, *(tensors[name] for name in NAMES[2:]), "gelu"]
    torch.library.opcheck(OPS["leaf_mixture"].operator.default, arguments)


@pytest.mark.parametrize("frozen", NAMES)
def test_gradients_that_nobody_needs_are_left_out(frozen) -> None:
    tensors = drawn(9, 2, 3, 4, 5)
    probe = torch.randn(9, 5, dtype=torch.float64)
    whole = with_gradients(tensors, probe)
    leaves = {name: t.clone().requires_grad_(name != frozen) for name, t in tensors.items()}
    leaf_mixture(*(leaves[name] for name in NAMES)).backward(probe)
    assert leaves[frozen].grad is None
    for name in NAMES:
        if name != frozen:
            torch.testing.assert_close(leaves[name].grad, whole[name])


def test_infinite_scores_choose_one_leaf() -> None:
    tensors = drawn(4, 2, 3, 4, 5)
    tensors["scores"] = torch.full((4, 3), float("inf"), dtype=torch.float64)
    t = tensors
    hidden = torch.nn.functional.gelu(t["x"] @ t["up_weight"][3].T + t["up_bias"][3])
    y = leaf_mixture(*(t[name] for name in NAMES))
    torch.testing.assert_close(y, hidden @ t["down_weight"][3].T + t["down_bias"][3])


def test_bad_input() -> None:
    t = drawn(4, 2, 3, 4, 5)

    def call(**changes):
        return leaf_mixture(*((t | changes)[name] for name in NAMES))

    with pytest.raises(ShapeError, match="power of two"):
        call(up_weight=t["up_weight"][:3])
    with pytest.raises(ShapeError, match=r"scores has the shape \[4, 4\]; it must be \[4, 3\]"):
        call(scores=torch.randn(4, 4))
    with pytest.raises(ShapeError, match="D = 3"):
        call(x=torch.randn(4, 4))
    with pytest.raises(DtypeError, match=r"x is torch.int64"):
        call(x=torch.ones(4, 3, dtype=torch.int64))
