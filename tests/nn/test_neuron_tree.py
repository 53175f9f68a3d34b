from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune

from fastffn import DenseConfig, NeuronTreeConfig, NeuronTreeFFN, build, ops
from fastffn.errors import CheckpointError, ConfigError, FastFFNError
from fastffn.measure.flops import layer_flops
from fastffn.ops.neuron_tree import reference


def test_state_dict_is_the_documented_format() -> None:
    ffn = NeuronTreeFFN(NeuronTreeConfig(d_model=8, d_out=6, depth=2, trees=3, shared=5))
    assert {k: tuple(v.shape) for k, v in ffn.state_dict().items()} == {
        "w_in": (3, 7, 8),
        "b_in": (3, 7),
        "w_out": (3, 7, 6),
        "shared.up.weight": (5, 8),
        "shared.up.bias": (5,),
        "shared.down.weight": (6, 5),
        "shared.down.bias": (6,),
    }
    assert list(NeuronTreeFFN(NeuronTreeConfig(d_model=8, depth=1)).state_dict()) == ["w_in", "b_in", "w_out"]


def test_the_shared_part_is_added() -> None:
    torch.manual_seed(1)
    ffn = NeuronTreeFFN(NeuronTreeConfig(d_model=8, depth=2, trees=3, shared=5, activation="relu"))
    x = torch.randn(10, 8)
    with_it = ffn(x)
    shared, ffn.shared = ffn.shared, None
    torch.testing.assert_close(with_it, ffn(x) + shared(x))


def test_widths() -> None:
    config = NeuronTreeConfig(depth=11, trees=2, shared=64)
    assert (config.neurons, config.active_neurons) == (2 * 4095, 2 * 12 + 64)


def test_start_values_are_the_published_ones() -> None:
    ffn = NeuronTreeFFN(NeuronTreeConfig(d_model=64, depth=8, trees=4))
    for tensor, bound in ((ffn.w_in, 1 / 8), (ffn.b_in, 1 / 8), (ffn.w_out, 1 / 6)):
        values = tensor.detach()
        assert 0.99 * bound < float(values.abs().max()) <= bound
        assert float(values.std()) == pytest.approx(bound / 3**0.5, rel=0.05)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"depth": -1}, "depth is -1.*at least 0"),
        ({"depth": 31}, "depth is 31.*at most 30"),
        ({"depth": 2.5}, "depth is 2.5"),
        ({"depth": True}, "depth is True"),
        ({"trees": 0}, "trees is 0.*at least 1"),
        ({"shared": -8}, "shared is -8"),
    ],
)
def test_bad_fields(fields: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build(NeuronTreeConfig(**({"d_model": 8, "depth": 1} | fields)))


def test_the_deepest_tree_can_be_described() -> None:
    with torch.device("meta"):
        ffn = build(NeuronTreeConfig(d_model=768, depth=30))
    assert ffn.w_in.shape == (1, 2**31 - 1, 768)


def test_gated_is_refused() -> None:
    with pytest.raises(ConfigError, match="has no field 'gated'"):
        build("neuron_tree", d_model=8, gated=True)
    with pytest.raises(ConfigError, match="no gated form"):
        NeuronTreeConfig().fitted_to(DenseConfig(d_model=8, gated=True))
    assert NeuronTreeConfig(depth=3).fitted_to(DenseConfig(d_model=8, activation="relu")) == NeuronTreeConfig(
        d_model=8, depth=3, activation="relu"
    )


def test_only_visited_neurons_learn() -> None:
    torch.manual_seed(0)
    ffn = NeuronTreeFFN(NeuronTreeConfig(d_model=8, depth=5))
    ffn(torch.randn(1, 8)).sum().backward()
    for parameter in ffn.parameters():
        assert int((parameter.grad.reshape(63, -1) != 0).any(1).sum()) == 6


def test_flops_are_those_of_active_neurons() -> None:
    with torch.device("meta"):
        ffn = build(NeuronTreeConfig(d_model=24, d_out=16, depth=4, trees=3, shared=10))
    # Two FLOPs a multiply-add; a forward product and its two gradients.
    assert layer_flops(ffn, 50, 24) == 3 * 2 * 50 * ffn.config.active_neurons * (24 + 16)


def test_half_a_state_dict_is_refused() -> None:
    ffn = NeuronTreeFFN(NeuronTreeConfig(d_model=8, depth=2))
    state = ffn.state_dict()
    with pytest.raises(RuntimeError, match="b_in"):
        ffn.load_state_dict({"w_in": state["w_in"], "w_out": state["w_out"]})
    with pytest.raises(RuntimeError, match="size mismatch"):
        NeuronTreeFFN(NeuronTreeConfig(d_model=8, depth=3)).load_state_dict(state)


def masked(x, w_in_MD, b_in_M, w_out_MO, depth, activation):
    """Every neuron and a mask, node by node from the root, with nothing of ours."""
    nodes = 2 ** (depth + 1) - 1
    scores = x @ w_in_MD.T + b_in_M
    mask = torch.zeros_like(scores)
    for first in range(0, len(w_in_MD), nodes):
        mask[:, first] = 1
        for node in range(nodes // 2):
            right = (scores[:, first + node] > 0).to(scores)
            mask[:, first + 2 * node + 1] = mask[:, first + node] * (1 - right)
            mask[:, first + 2 * node + 2] = mask[:, first + node] * right
    return (activation(scores) * mask) @ w_out_MO


def no_ties(x, w_in, b_in) -> torch.Tensor:
    return ((x @ w_in.T + b_in).abs() > 1e-9).all(1)


@settings(max_examples=60, deadline=None)
@given(
    d_model=st.integers(1, 20),
    d_out=st.integers(1, 20),
    depth=st.integers(0, 6),
    trees=st.integers(1, 5),
    seed=st.integers(0, 2**31),
)
def test_the_training_modules_weights_compute_the_same(d_model, d_out, depth, trees, seed) -> None:
    torch.manual_seed(seed)
    neurons = trees * (2 ** (depth + 1) - 1)
    theirs = {
        "linear_in.weight": torch.randn(neurons, d_model, dtype=torch.float64),
        "linear_in.bias": torch.randn(neurons, dtype=torch.float64),
        "linear_out.weight": torch.randn(d_out, neurons, dtype=torch.float64),
    }
    ffn = NeuronTreeFFN.from_ultrafastbert(theirs, depth=depth)
    assert (ffn.config.trees, ffn.config.d_model, ffn.config.d_out) == (trees, d_model, d_out)
    w_in, b_in, w_out = (t.clone().requires_grad_() for t in theirs.values())
    x = torch.randn(40, d_model, dtype=torch.float64)
    x = x[no_ties(x, w_in, b_in)].requires_grad_()
    expected = masked(x, w_in, b_in, w_out.T, depth, F.gelu)
    y = ffn(x)
    torch.testing.assert_close(y, expected)
    gradient = torch.randn_like(y)
    wanted = torch.autograd.grad(expected, (x, w_in, b_in, w_out), gradient)
    ours = torch.autograd.grad(y, (x, ffn.w_in, ffn.b_in, ffn.w_out), gradient)
    torch.testing.assert_close(ours[0], wanted[0])
    torch.testing.assert_close(ours[1].reshape(neurons, -1), wanted[1])
    torch.testing.assert_close(ours[2].reshape(neurons), wanted[2])
    torch.testing.assert_close(ours[3].reshape(neurons, -1).T, wanted[3])


@settings(max_examples=60, deadline=None)
@given(
    d_model=st.integers(1, 20),
    d_out=st.integers(1, 20),
    depth=st.integers(0, 6),
    sparse=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_the_benchmarks_weights_compute_the_same(d_model, d_out, depth, sparse, seed) -> None:
    torch.manual_seed(seed)
    neurons = 2 ** (depth + 1) - 1
    w1s = torch.randn(neurons, d_model, dtype=torch.float64)
    w2s = torch.randn(neurons, d_out, dtype=torch.float64)
    ffn = NeuronTreeFFN.from_ultrafastbert({"w1s": w1s.reshape(-1, 1) if sparse else w1s, "w2s": w2s})
    assert (ffn.config.trees, ffn.config.depth, ffn.config.d_model, ffn.config.d_out) == (1, depth, d_model, d_out)
    x = torch.randn(40, d_model, dtype=torch.float64)
    none = torch.zeros(neurons, dtype=torch.float64)
    x = x[no_ties(x, w1s, none)].requires_grad_()
    w_in, w_out = w1s.clone().requires_grad_(), w2s.clone().requires_grad_()
    expected = masked(x, w_in, none, w_out, depth, F.gelu)
    y = ffn(x)
    torch.testing.assert_close(y, expected)
    gradient = torch.randn_like(y)
    wanted = torch.autograd.grad(expected, (x, w_in, w_out), gradient)
    for one, two in zip(torch.autograd.grad(y, (x, ffn.w_in, ffn.w_out), gradient), wanted, strict=True):
        torch.testing.assert_close(one.reshape(two.shape), two)


def test_published_weights_are_copied_and_trainable() -> None:
    w1s, w2s = torch.randn(7, 4), torch.randn(7, 5)
    ffn = NeuronTreeFFN.from_ultrafastbert({"w1s": w1s, "w2s": w2s})
    before = w1s.clone()
    with torch.no_grad():
        ffn.w_in.zero_()
    assert torch.equal(w1s, before)
    assert all(parameter.requires_grad and parameter.is_contiguous() for parameter in ffn.parameters())
    assert not ffn.b_in.any()


@pytest.mark.parametrize(
    ("state", "depth", "words"),
    [
        ({}, None, "holds nothing"),
        ({"ffn.w1s": torch.ones(7, 4), "ffn.w2s": torch.ones(7, 4)}, None, "prefixes"),
        ({"w1s": torch.ones(7, 4), "w2s": torch.ones(6, 4)}, None, "do not fit"),
        ({"w1s": torch.ones(6, 4), "w2s": torch.ones(6, 4)}, None, "no whole number of trees"),
        ({"w1s": torch.ones(7, 4), "w2s": torch.ones(7, 4)}, 3, "no whole number of trees of depth 3, 15"),
        ({"linear_in.weight": torch.ones(21, 4), "linear_out.weight": torch.ones(4, 21)}, None, "give depth="),
        ({"linear_in.weight": torch.ones(21, 4), "linear_out.weight": torch.ones(4, 21)}, -1, "depth is -1"),
        ({"linear_in.weight": torch.ones(21, 4), "linear_out.weight": torch.ones(4, 20)}, 2, "do not fit"),
        ({"node_weights": torch.ones(7, 4), "w1s": torch.ones(8, 4, 2), "w2s": torch.ones(8, 2, 4)}, None, "leaf_tree"),
    ],
)
def test_what_is_not_published_weights_is_refused(state: dict, depth: int | None, words: str) -> None:
    with pytest.raises(FastFFNError, match=words) as caught:
        NeuronTreeFFN.from_ultrafastbert(state, depth=depth)
    assert isinstance(caught.value, (CheckpointError, ConfigError))


def test_margins_are_the_smallest_scores_that_decide() -> None:
    ffn = build("neuron_tree", d_model=6, depth=2, trees=3).double()
    x = torch.randn(20, 6, dtype=torch.float64)
    _, scores, _ = reference.neuron_tree(x, ffn.w_in, ffn.b_in, ffn.w_out)
    scores = scores.detach()
    expected = [min(abs(float(scores[p, t, level])) for p in range(3) for level in range(2)) for t in range(20)]
    assert ffn.decision_margins(x).tolist() == expected
    assert build("neuron_tree", d_model=6, depth=0).decision_margins(x.float()).isinf().all()


def test_starts() -> None:
    torch.manual_seed(0)
    ffn = build("neuron_tree", d_model=64, depth=6, trees=4, start="normal")
    for weight in (ffn.w_in, ffn.w_out):
        assert float(weight.detach().std()) == pytest.approx(0.02, rel=0.05)
    assert not ffn.b_in.any()
    published = build("neuron_tree", d_model=64, depth=6, trees=4)
    assert float(published.w_in.detach().abs().max()) == pytest.approx(1 / 8, rel=0.01)
    assert float(published.w_out.detach().abs().max()) == pytest.approx(28**-0.5, rel=0.01)
    with pytest.raises(ConfigError, match="start is 'gpt'; it must be one of published, normal"):
        NeuronTreeConfig(start="gpt")


def test_weights_that_somebody_else_keeps_are_used() -> None:
    class Double(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return 2 * weight

    ffn = NeuronTreeFFN(NeuronTreeConfig(d_model=6, depth=3)).eval()
    x = torch.randn(20, 6)
    expected = ops.neuron_tree(x, 2 * ffn.w_in, ffn.b_in, ffn.w_out)
    called = functional_call(ffn, {"w_in": 2 * ffn.w_in}, (x,))
    parametrize.register_parametrization(ffn, "w_in", Double())
    torch.testing.assert_close(ffn(x), expected)
    torch.testing.assert_close(called, expected)
    prune.l1_unstructured(ffn, "w_out", 0.5)
    assert not ffn.w_out.all()
    torch.testing.assert_close(ffn(x), ops.neuron_tree(x, ffn.w_in, ffn.b_in, ffn.w_out))
