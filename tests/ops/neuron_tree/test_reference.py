"""The definition itself: a tree worked by hand, gradients, the loop that a reader would write."""

from __future__ import annotations

import math

import pytest
import torch

from fastffn.ops.activations import get_activation
from fastffn.ops.neuron_tree import reference
from tests.ops.neuron_tree.cases import Case, make


def test_a_tree_worked_by_hand() -> None:
    # Two inputs, relu. The root looks at x0; its left child at x1, its right child at -x1.
    w_in = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]])
    b_in = torch.tensor([[0.5, 0.0, 1.0]])
    w_out = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 10.0, 0.0], [0.0, 0.0, 100.0]]])
    x = torch.tensor([[1.5, -2.0], [-1.5, 3.0], [-0.5, 4.0], [-1.5, -3.0]])
    y, scores, last = reference.neuron_tree(x, w_in, b_in, w_out, "relu")
    assert y.tolist() == [
        [2.0, 0.0, 300.0],  # 2 at the root: right; there 1 + 2
        [0.0, 30.0, 0.0],  # -1: left; there 3
        [0.0, 40.0, 0.0],  # exactly 0: left; there 4
        [0.0, 0.0, 0.0],  # -1: left; there -3, which relu cuts off
    ]
    assert scores.tolist() == [[[2.0, 3.0], [-1.0, 3.0], [0.0, 4.0], [-1.0, -3.0]]]
    assert last.tolist() == [[2, 1, 1, 1]]


def one_token_at_a_time(case: Case) -> torch.Tensor:
    """The definition once more, in scalars."""
    x, w_in, b_in, w_out, activation, _ = case
    act = get_activation(activation)
    rows = []
    for token in x:
        y = torch.zeros(w_out.shape[2], dtype=x.dtype)
        for tree in range(len(w_in)):
            node = 0
            while node < w_in.shape[1]:
                s = token @ w_in[tree, node] + (0 if b_in is None else b_in[tree, node])
                y = y + act(s) * w_out[tree, node]
                node = 2 * node + (2 if s > 0 else 1)
        rows.append(y)
    return torch.stack(rows)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("depth", "trees"), [(0, 5), (1, 1), (4, 3)])
def test_it_is_the_loop_over_single_tokens(depth: int, trees: int, bias: bool) -> None:
    case = make(30, depth=depth, trees=trees, bias=bias, dtype=torch.float64, activation="silu")
    torch.testing.assert_close(reference.neuron_tree(*case)[0], one_token_at_a_time(case))


def test_depth_zero_is_a_dense_ffn_of_as_many_neurons_as_trees() -> None:
    case = make(30, depth=0, trees=11, dtype=torch.float64)
    hidden = torch.nn.functional.gelu(case.x @ case.w_in[:, 0].T + case.b_in[:, 0])
    torch.testing.assert_close(reference.neuron_tree(*case)[0], hidden @ case.w_out[:, 0])


@pytest.mark.parametrize("bias", [False, True])
def test_gradcheck(bias: bool) -> None:
    case = make(6, depth=2, trees=2, bias=bias, dtype=torch.float64)
    tensors = [t.requires_grad_() for t in case.tensors]

    def run(*given: torch.Tensor) -> torch.Tensor:
        x, w_in, *rest = given
        return reference.neuron_tree(x, w_in, rest[0] if bias else None, rest[-1])[0]

    assert torch.autograd.gradcheck(run, tensors)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ["gelu", "relu2", "quick_gelu"])
@pytest.mark.parametrize("through", [False, True])
def test_backward_is_what_autograd_makes_of_it(bias: bool, activation: str, through: bool) -> None:
    case = make(40, depth=4, trees=3, bias=bias, dtype=torch.float64, activation=activation, straight_through=through)
    tensors = [t.requires_grad_() for t in case.tensors]
    y, scores, last = reference.neuron_tree(*case)
    gradient = torch.randn_like(y)
    expected = torch.autograd.grad(y, tensors, gradient)
    given = case.to(torch.float64)
    with torch.no_grad():
        found = reference.backward(gradient, *given, scores.detach(), last, needs=(True,) * 4)
    assert (found[2] is None) is not bias
    for ours, theirs in zip([t for t in found if t is not None], expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_straight_through_is_the_gradient_of_weighted_branches() -> None:
    # A root and two leaves of one number each, the activation the identity. Weighing the branches,
    # y = s w + sigmoid(s) r if it goes right, s w + (1 - sigmoid(s)) l if left, w, r and l being what the nodes add.
    w_in, b_in = torch.tensor([[[1.0], [0.0], [0.0]]]), torch.tensor([[0.0, 5.0, 7.0]])
    w_out = torch.tensor([[[2.0], [1.0], [1.0]]])
    x = torch.tensor([[0.3], [-0.4]], requires_grad=True)
    y = reference.neuron_tree(x, w_in, b_in, w_out, "linear", True)[0]
    torch.testing.assert_close(y, torch.tensor([[0.6 + 7.0], [-0.8 + 5.0]]))
    (gradient,) = torch.autograd.grad(y.sum(), x)
    p = torch.sigmoid(x.detach())
    slope = p * (1 - p)
    torch.testing.assert_close(gradient, 2.0 + slope * torch.tensor([[7.0], [-5.0]]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_are_kept_in_float32(dtype: torch.dtype) -> None:
    # 2,048 ones and one half: a running sum in either dtype would lose the half, or come to a halt at 256.
    width = 2049
    x = torch.ones(1, width, dtype=dtype)
    x[0, -1] = 0.5
    ones = torch.ones(1, 1, width, dtype=dtype)
    _, scores, _ = reference.neuron_tree(x, ones, None, ones[..., :1], "linear")
    assert scores.item() == 2048.5


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_bad_values_stay_in_their_token_and_the_path_in_the_tree(bad: float) -> None:
    case = make(20, depth=4, trees=2)
    good = reference.neuron_tree(*case)
    case.x[7, 3] = bad
    y, _, last = reference.neuron_tree(*case)
    others = torch.arange(20) != 7
    assert torch.equal(y[others], good[0][others])
    assert torch.equal(last[:, others], good[2][:, others])
    assert not torch.isfinite(y[7]).all()
    assert ((last >= 15) & (last <= 30)).all()
    if math.isnan(bad):
        assert (last[:, 7] == 15).all()  # left all the way
