"""Against the published package itself, fastfeedforward 0.2.1."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastffn import LeafTreeConfig, LeafTreeFFN
from fastffn.errors import CheckpointError
from fastffn.nn.published_leaf_tree import published_kind

fff = pytest.importorskip("fastfeedforward")

OURS = {
    "node_weights": "node_weight",
    "node_biases": "node_bias",
    "w1s": "leaf_up_weight",
    "b1s": "leaf_up_bias",
    "w2s": "leaf_down_weight",
    "b2s": "leaf_down_bias",
}
shapes = {
    "d_model": st.integers(1, 20),
    "width": st.integers(1, 9),
    "d_out": st.integers(1, 20),
    "depth": st.integers(1, 5),
    "seed": st.integers(0, 999),
}


def pair(d_model, width, d_out, depth, seed, **options):
    torch.manual_seed(seed)
    theirs = fff.FFF(d_model, width, d_out, depth, **options)
    decisions = "hard" if options.get("train_hardened") else "soft"
    ours = LeafTreeFFN.from_fastfeedforward(theirs.state_dict(), decisions=decisions)
    return theirs, ours, torch.randn(17, d_model)


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def in_their_layout(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if name in ("w1s", "w2s"):
        return tensor.transpose(1, 2)
    return tensor.unsqueeze(1) if name == "node_biases" else tensor


@settings(max_examples=60, deadline=None)
@given(**shapes)
def test_training(d_model, width, d_out, depth, seed) -> None:
    theirs, ours, x = pair(d_model, width, d_out, depth, seed, usage_mode="soft")
    x.requires_grad_()
    y, entropies = theirs(x, return_entropies=True)
    close(ours(x), y)
    close(ours.node_entropies(x), entropies)
    close(ours.leaf_weights(x).sum(0), theirs.leaf_usage)
    probe = torch.randn_like(y)
    ((y * probe).sum() + entropies.sum()).backward()
    their_x, x.grad = x.grad, None
    ((ours(x) * probe).sum() + ours.node_entropies(x).sum()).backward()
    close(x.grad, their_x)
    for name, own in OURS.items():
        close(in_their_layout(name, getattr(ours, own).grad), getattr(theirs, name).grad)


@settings(max_examples=40, deadline=None)
@given(**shapes)
def test_evaluation(d_model, width, d_out, depth, seed) -> None:
    theirs, ours, x = pair(d_model, width, d_out, depth, seed)
    # Where we differ on purpose: in evaluation the package forgets the leaves' output biases.
    close(ours.eval()(x), theirs.eval()(x) + theirs.b2s[ours.path(x).leaf])
    with torch.no_grad():
        theirs.b2s.zero_()
    ours = LeafTreeFFN.from_fastfeedforward(theirs.state_dict())
    close(ours.eval()(x), theirs(x))


@settings(max_examples=30, deadline=None)
@given(**shapes)
def test_hardened_training(d_model, width, d_out, depth, seed) -> None:
    theirs, ours, x = pair(d_model, width, d_out, depth, seed, train_hardened=True)
    y = theirs(x)
    close(ours(x), y)
    probe = torch.randn_like(y)
    (y * probe).sum().backward()
    (ours(x) * probe).sum().backward()
    for name, own in OURS.items():
        if name.startswith("node"):
            assert not theirs.get_parameter(name).grad.any() and getattr(ours, own).grad is None
        else:
            close(in_their_layout(name, getattr(ours, own).grad), getattr(theirs, name).grad)


@pytest.mark.parametrize("mode", ["none", "soft", "hard"])
def test_exports_back(mode) -> None:
    theirs, ours, x = pair(7, 3, 5, 3, 0, usage_mode=mode)
    theirs(x)
    ours = LeafTreeFFN.from_fastfeedforward(theirs.state_dict())
    assert ours.config == LeafTreeConfig(d_model=7, d_out=5, depth=3, leaf_width=3, activation="relu")
    state = ours.to_fastfeedforward(usage=mode != "none")
    assert {k: (v.shape, v.dtype) for k, v in state.items()} == {
        k: (v.shape, v.dtype) for k, v in theirs.state_dict().items()
    }
    for name in OURS:
        assert torch.equal(state[name], theirs.state_dict()[name])
    again = fff.FFF(7, 3, 5, 3, usage_mode=mode)
    again.load_state_dict(state)
    assert torch.equal(again(x), theirs(x))


def test_exported_usage_counts_paths() -> None:
    ours = LeafTreeFFN(LeafTreeConfig(d_model=4, depth=2))
    ours.leaf_usage.copy_(torch.tensor([1, 2, 3, 4]))
    state = ours.to_fastfeedforward(usage=True)
    assert state["node_usage"].tolist() == [10, 3, 7] and state["leaf_usage"].tolist() == [1, 2, 3, 4]
    assert LeafTreeFFN.from_fastfeedforward(state).leaf_usage.tolist() == [1, 2, 3, 4]


def test_depth_0() -> None:
    theirs = fff.FFF(4, 3, 5, 0)
    x = torch.randn(6, 4)
    ours = LeafTreeFFN.from_fastfeedforward(theirs.state_dict())
    close(ours(x), theirs(x))
    close(ours.eval()(x), theirs(x))
    # Where we differ on purpose: the package cannot evaluate a single leaf.
    with pytest.raises(UnboundLocalError):
        theirs.eval()(x)


def test_where_the_package_is_wrong() -> None:
    """What docs/trees.md says about the package, so that it stays true."""
    theirs, ours, x = pair(6, 2, 3, 3, 1, usage_mode="soft")
    theirs(x)
    # Tokens that reach the nodes of a level are no more than the tokens; here each level counts them again.
    assert float(theirs.node_usage[3:7].sum()) > 1.5 * 17
    theirs, _, x = pair(6, 2, 3, 3, 1, usage_mode="hard")
    theirs(x)
    # Rounded products of weights: hardly any token is counted at a leaf.
    assert float(theirs.leaf_usage.sum()) < 17
    ours(x)
    assert int(ours.leaf_usage.sum()) == 17


def test_activation_and_fields() -> None:
    theirs = fff.FFF(4, 3, 4, 2, activation=torch.nn.GELU())
    x = torch.randn(6, 4)
    ours = LeafTreeFFN.from_fastfeedforward(theirs.state_dict(), activation="gelu", hardening_weight=3.0)
    close(ours(x), theirs(x))
    assert ours.config.hardening_weight == 3.0


def test_the_other_class_of_that_name_is_recognised() -> None:
    training = {
        "linear_in.weight": torch.zeros(15, 4),
        "linear_in.bias": torch.zeros(15),
        "linear_out.weight": torch.zeros(4, 15),
    }
    benchmark = {"w1s": torch.zeros(15, 4), "w2s": torch.zeros(15, 4)}
    for state in (training, benchmark):
        assert published_kind(state) == "neuron_tree"
        with pytest.raises(CheckpointError, match=r"UltraFastBERT.*neuron_tree"):
            LeafTreeFFN.from_fastfeedforward(state)
    assert published_kind(fff.FFF(4, 3, 4, 2).state_dict()) == "leaf_tree"
    assert published_kind({"weight": torch.zeros(3, 3)}) is None


def test_half_a_state_dict() -> None:
    state = fff.FFF(4, 3, 5, 2).state_dict()
    for name in OURS:
        part = {key: value for key, value in state.items() if key != name}
        with pytest.raises(CheckpointError, match=name):
            LeafTreeFFN.from_fastfeedforward(part)
    with pytest.raises(CheckpointError, match="weight"):
        LeafTreeFFN.from_fastfeedforward({"weight": torch.zeros(3, 3)})
    with pytest.raises(CheckpointError, match=r"head.weight"):
        LeafTreeFFN.from_fastfeedforward(state | {"head.weight": torch.zeros(3)})
    with pytest.raises(CheckpointError, match="depth is 3, but w1s has 4 leaves"):
        LeafTreeFFN.from_fastfeedforward(state | {"depth": torch.tensor(3)})
    with pytest.raises(CheckpointError, match="do not fit together"):
        LeafTreeFFN.from_fastfeedforward(state | {"b2s": torch.zeros(4, 4)})
    with pytest.raises(CheckpointError, match="power of two"):
        LeafTreeFFN.from_fastfeedforward(state | {"w1s": torch.zeros(3, 4, 3)})


def test_gated_leaves_cannot_be_exported() -> None:
    with pytest.raises(CheckpointError, match="leaves of this tree are gated"):
        LeafTreeFFN(LeafTreeConfig(d_model=4, gated=True)).to_fastfeedforward()


def test_a_shared_part_cannot_be_exported() -> None:
    with pytest.raises(CheckpointError, match="shared part of width 4"):
        LeafTreeFFN(LeafTreeConfig(d_model=4, shared=4)).to_fastfeedforward()
