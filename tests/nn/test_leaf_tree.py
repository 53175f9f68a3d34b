from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastffn
from fastffn import DenseConfig, DenseFFN, LeafTreeConfig, auxiliary_loss
from fastffn.errors import ConfigError, DtypeError, ShapeError
from fastffn.nn.leaf_path import DENSE_LEVELS, binary_entropy
from tests.nn.leaf_trees import leaf_outputs, one_path, tree


def test_state_dict_is_the_documented_format() -> None:
    ffn = tree(d_model=6, d_out=5, depth=3, leaf_width=2, shared=4)
    assert {k: tuple(v.shape) for k, v in ffn.state_dict().items()} == {
        "node_weight": (7, 6),
        "node_bias": (7,),
        "leaf_up_weight": (8, 2, 6),
        "leaf_up_bias": (8, 2),
        "leaf_down_weight": (8, 5, 2),
        "leaf_down_bias": (8, 5),
        "shared.up.weight": (4, 6),
        "shared.up.bias": (4,),
        "shared.down.weight": (5, 4),
        "shared.down.bias": (5,),
    }


def test_gated_state_dict() -> None:
    names = {k: tuple(v.shape) for k, v in tree(depth=3, leaf_width=2, shared=4, gated=True).state_dict().items()}
    plain = tree(depth=3, leaf_width=2, shared=4).state_dict()
    assert {k: names[k] for k in set(names) - set(plain)} == {
        "leaf_gate_weight": (8, 2, 6),
        "leaf_gate_bias": (8, 2),
        "shared.gate.weight": (4, 6),
        "shared.gate.bias": (4,),
    }


@pytest.mark.parametrize("depth", [0, 1, 3])
@pytest.mark.parametrize("decisions", ["soft", "hard", "straight_through"])
def test_gated_leaves_and_gradients(depth, decisions) -> None:
    ffn = tree(depth=depth, d_out=4, gated=True, activation="silu", shared=3, decisions=decisions).double()
    x = torch.randn(30, 6, dtype=torch.float64, requires_grad=True)
    probe = torch.randn(30, 4, dtype=torch.float64)
    leaves, path = leaf_outputs(ffn, x), ffn.path(x)
    if decisions == "soft":
        mixed = torch.einsum("tl,tlo->to", ffn.leaf_weights(x), leaves)
    else:
        mixed = leaves[torch.arange(30), path.leaf]
        if decisions == "straight_through":
            scores = ffn.node_scores(x).gather(1, path.nodes)
            side = torch.where(scores >= 0, scores.sigmoid(), 1 - scores.sigmoid())
            mixed = mixed * (1 + side - side.detach()).prod(1, keepdim=True)
    wanted, y = mixed + ffn.shared(x), ffn(x)
    torch.testing.assert_close(y, wanted)
    inputs = [x, *ffn.parameters()]
    found = torch.autograd.grad((y * probe).sum(), inputs, allow_unused=True)
    for one, other in zip(found, torch.autograd.grad((wanted * probe).sum(), inputs, allow_unused=True), strict=True):
        if other is None or one is None:
            assert not any(value is not None and value.any() for value in (one, other))
        else:
            torch.testing.assert_close(one, other)
    hard = leaves[torch.arange(30), path.leaf] + ffn.shared(x)
    torch.testing.assert_close(ffn.eval()(x), hard)


def test_tree_by_hand() -> None:
    # D = O = W = 1. Scores at x = 2: node 0: 2 * 1 - 1 = 1 (right), node 2: 2 * -1 + 0.5 = -1.5 (left): leaf 2.
    ffn = tree(d_model=1, depth=2, leaf_width=1, activation="relu")
    with torch.no_grad():
        ffn.node_weight.copy_(torch.tensor([[1.0], [5.0], [-1.0]]))
        ffn.node_bias.copy_(torch.tensor([-1.0, 5.0, 0.5]))
        ffn.leaf_up_weight.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]).view(4, 1, 1))
        ffn.leaf_up_bias.zero_()
        ffn.leaf_down_weight.fill_(10.0)
        ffn.leaf_down_bias.copy_(torch.tensor([0.0, 1.0, 2.0, 3.0]).view(4, 1))
    x = torch.tensor([[2.0]])
    assert ffn.eval()(x).tolist() == [[62.0]]  # 10 * relu(3 * 2) + 2
    c0, c1, c2 = (1 / (1 + torch.exp(-torch.tensor(s))) for s in (1.0, 15.0, -1.5))
    weights = [(1 - c0) * (1 - c1), (1 - c0) * c1, c0 * (1 - c2), c0 * c2]
    torch.testing.assert_close(ffn.leaf_weights(x)[0], torch.stack(weights))
    mixed = sum(w * y for w, y in zip(weights, (20.0, 41.0, 62.0, 83.0), strict=True))
    torch.testing.assert_close(ffn.train()(x).squeeze(), mixed)


def test_a_score_of_zero_goes_right() -> None:
    ffn = tree(depth=3).eval()
    with torch.no_grad():
        ffn.node_weight.zero_()
        ffn.node_bias.zero_()
    assert ffn.path(torch.randn(2, 6)).leaf.tolist() == [7, 7]


@settings(max_examples=150, deadline=None)
@given(
    T=st.one_of(st.integers(0, 30), st.integers(1000, 3000)),
    depth=st.integers(0, 8),
    W=st.integers(1, 33),
    D=st.integers(1, 20),
    O=st.integers(1, 20),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 99),
)
def test_evaluation_is_one_leaf(T, depth, W, D, O, dtype, seed) -> None:  # noqa: E741
    torch.manual_seed(seed)
    ffn = tree(d_model=D, d_out=O, depth=depth, leaf_width=W).to(dtype).eval()
    x = torch.randn(D, T).T.to(dtype)
    path = ffn.path(x)
    y = ffn(x)
    assert y.shape == (T, O) and y.dtype == dtype
    exact = leaf_outputs(copy.deepcopy(ffn).double(), x[:50].double())
    for n, (leaf, nearest) in enumerate(one_path(ffn, x[:50])):
        # Within rounding of zero two ways of computing a score may disagree.
        if nearest > 40 * torch.finfo(dtype).eps:
            assert int(path.leaf[n]) == leaf
        expected = exact[n, int(path.leaf[n])]
        torch.testing.assert_close(
            y[n].double(),
            expected,
            rtol=8 * torch.finfo(dtype).eps * D,
            atol=0.05 if dtype not in (torch.float32, torch.float64) else 1e-5,
        )


def test_paths_below_the_dense_levels() -> None:
    ffn = tree(depth=DENSE_LEVELS + 3, leaf_width=1).double().eval()
    x = torch.randn(300, 6, dtype=torch.float64)
    path = ffn.path(x)
    assert path.leaf.tolist() == [leaf for leaf, _ in one_path(ffn, x)]
    assert path.nodes.shape == (300, DENSE_LEVELS + 3)
    assert torch.equal((path.nodes[:, 1:] - 1) // 2, path.nodes[:, :-1])
    assert len(set(path.leaf.tolist())) > 30


def test_depth_0_is_dense() -> None:
    ffn = tree(depth=0, leaf_width=7, d_out=4)
    dense = DenseFFN(DenseConfig(d_model=6, d_hidden=7, d_out=4))
    names = {"up.weight": "leaf_up_weight", "up.bias": "leaf_up_bias", "down.weight": "leaf_down_weight"}
    names["down.bias"] = "leaf_down_bias"
    dense.load_state_dict({name: getattr(ffn, ours)[0] for name, ours in names.items()})
    x = torch.randn(5, 6)
    for decisions in ("soft", "hard", "straight_through"):
        again = tree(depth=0, leaf_width=7, d_out=4, decisions=decisions)
        again.load_state_dict(ffn.state_dict())
        for training in (True, False):
            torch.testing.assert_close(again.train(training)(x), dense(x))
    ffn.train()(x).sum().backward()
    assert ffn.leaf_up_weight.grad.any()


def test_entropies() -> None:
    ffn = tree(depth=2).double()
    x = torch.randn(30, 6, dtype=torch.float64)
    c = ffn.node_scores(x).sigmoid()
    torch.testing.assert_close(ffn.node_entropies(x), -(c * c.log() + (1 - c) * (1 - c).log()).mean(0))
    assert binary_entropy(torch.tensor([1e4, -1e4])).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("decisions", ["soft", "hard", "straight_through"])
def test_what_is_no_number_stays_in_its_token(decisions) -> None:
    ffn = tree(depth=DENSE_LEVELS + 2, leaf_width=1, decisions=decisions)
    x = torch.randn(30, 6)
    spoilt = x.clone()
    spoilt[3], spoilt[5, 2], spoilt[8] = float("nan"), float("inf"), -float("inf")
    others = [n for n in range(30) if n not in (3, 5, 8)]
    for training in (True, False):
        ffn.train(training)
        torch.testing.assert_close(ffn(spoilt)[others], ffn(x)[others])
        assert ffn(spoilt)[3].isnan().all()
    assert ffn.path(spoilt).leaf[3] == 0
    assert ((ffn.path(spoilt).leaf >= 0) & (ffn.path(spoilt).leaf < ffn.config.leaves)).all()


@pytest.mark.parametrize("decisions", ["soft", "hard", "straight_through"])
@pytest.mark.parametrize("shape", [(0, 6), (3, 0, 6)])
def test_no_tokens(decisions, shape) -> None:
    ffn = tree(decisions=decisions, hardening_weight=1.0, balance_weight=1.0, depth=DENSE_LEVELS + 1)
    y = ffn(torch.randn(shape))
    (y.sum() + auxiliary_loss(ffn)).backward()
    assert y.shape == shape
    assert auxiliary_loss(ffn).item() == 0
    assert ffn.eval()(torch.randn(shape)).shape == shape


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"depth": -1}, "depth is -1.*from 0 to 30"),
        ({"depth": 31}, "depth is 31.*from 0 to 30"),
        ({"depth": 2.0}, "depth is 2.0"),
        ({"leaf_width": 0}, "leaf_width is 0"),
        ({"leaf_width": -2}, "leaf_width is -2"),
        ({"shared": -1}, "shared is -1"),
        ({"decisions": "harsh"}, "soft, hard, straight_through"),
        ({"region_leak": 1.1}, "region_leak is 1.1"),
        ({"leaf_dropout": 1.0}, "leaf_dropout is 1.0"),
        ({"leaf_dropout": 0.5, "decisions": "hard"}, "soft training only"),
        ({"hardening_weight": -1.0}, "hardening_weight is -1.0"),
        ({"balance_weight": float("nan")}, "balance_weight is nan"),
    ],
)
def test_bad_fields(fields, words) -> None:
    with pytest.raises(ConfigError, match=words):
        LeafTreeConfig(**({"d_model": 8} | fields))


@pytest.mark.parametrize("training", [True, False])
def test_bad_input(training) -> None:
    ffn = tree().train(training)
    with pytest.raises(DtypeError, match=r"LeafTreeFFN got an input of torch.int64.*x.float\(\)"):
        ffn(torch.ones(3, 6, dtype=torch.int64))
    with pytest.raises(ShapeError, match="d_model=6"):
        ffn(torch.ones(3, 5))


def test_default_widths() -> None:
    assert LeafTreeConfig(d_model=64).resolved().leaf_width == 16  # 16 leaves, as wide as 4 * 64
    assert LeafTreeConfig(d_model=2, depth=8).resolved().leaf_width == 1


def test_copies_and_files_keep_no_graph(tmp_path) -> None:
    ffn = tree(hardening_weight=1.0)
    ffn(torch.randn(3, 6))
    assert auxiliary_loss(ffn).item() > 0
    assert auxiliary_loss(copy.deepcopy(ffn)).item() == 0
    torch.save(ffn, tmp_path / "ffn.pt")
    loaded = torch.load(tmp_path / "ffn.pt", weights_only=False)
    assert auxiliary_loss(loaded).item() == 0
    assert torch.equal(loaded.node_weight, ffn.node_weight)


def test_margins_are_the_smallest_scores_on_the_path() -> None:
    ffn = fastffn.build("leaf_tree", d_model=6, depth=7, leaf_width=2).double()
    x = torch.randn(20, 6, dtype=torch.float64)
    scores, nodes = ffn.node_scores(x).detach(), ffn.path(x).nodes
    expected = [min(abs(float(scores[t, n])) for n in nodes[t]) for t in range(20)]
    assert ffn.decision_margins(x).tolist() == expected
    assert fastffn.build("leaf_tree", d_model=6, depth=0).decision_margins(x.float()).isinf().all()


@settings(max_examples=600, deadline=None)
@given(
    T=st.integers(1, 9),
    depth=st.integers(0, 8),
    W=st.integers(1, 5),
    D=st.integers(1, 9),
    d_out=st.integers(1, 9),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    bad=st.sampled_from([float("nan"), float("inf"), float("-inf")]),
    decisions=st.sampled_from(["eval", "soft", "hard", "straight_through"]),
    where=st.integers(0, 10**6),
)
def test_bad_values_stay_in_their_token_and_the_path_in_the_tree(
    T,
    depth,
    W,
    D,
    d_out,
    dtype,
    bad,
    decisions,
    where,
) -> None:
    torch.manual_seed(where)
    mode = "soft" if decisions == "eval" else decisions
    ffn = tree(d_model=D, d_out=d_out, depth=depth, leaf_width=W, decisions=mode).to(dtype).train(decisions != "eval")
    x = torch.randn(T, D, dtype=dtype)
    token = where % T
    spoilt = x.clone()
    spoilt[token, where // T % D] = bad
    good, found = ffn(x).detach(), ffn(spoilt).detach()
    others = torch.arange(T) != token
    # Who shares a leaf with the token makes another product of it: sums may come in another order.
    torch.testing.assert_close(found[others], good[others])
    leaf = ffn.path(spoilt).leaf
    assert bool((leaf >= 0).all()) and bool((leaf < 2**depth).all())
    if bad != bad:
        assert leaf[token] == 0 and found[token].isnan().all()
