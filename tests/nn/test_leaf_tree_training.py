"""Leaf trees in training: decisions, losses, counts, memory."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fastffn import DenseConfig, DenseFFN, auxiliary_loss
from fastffn.measure.memory import peak_bytes
from fastffn.nn.leaf_path import DENSE_LEVELS, binary_entropy
from tests.nn.leaf_trees import leaf_outputs, tree

CPU = torch.device("cpu")


def test_leaf_dropout_of_gated_leaves() -> None:
    ffn = tree(d_model=6, d_out=1, depth=1, leaf_width=500, leaf_dropout=0.4, activation="linear", gated=True)
    with torch.no_grad():
        for name, value in ffn.named_parameters():
            if name.startswith("leaf"):
                value.fill_(1.0 if name in ("leaf_up_bias", "leaf_gate_bias", "leaf_down_weight") else 0.0)
    y = ffn(torch.randn(200, 6)).detach()
    assert y.std() > 5 and float(y.mean()) == pytest.approx(500, rel=0.02)


def test_soft_training_is_the_mixture_of_all_leaves() -> None:
    ffn = tree(depth=3, d_out=4, shared=5).double()
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    rows = x.view(-1, 6)
    mixed = torch.einsum("tl,tlo->to", ffn.leaf_weights(rows), leaf_outputs(ffn, rows)) + ffn.shared(rows)
    torch.testing.assert_close(ffn(x), mixed.view(2, 9, 4))


def test_firm_decisions_make_soft_and_hard_one() -> None:
    ffn = tree(depth=3).double()
    with torch.no_grad():
        ffn.node_weight.mul_(1e9)
        ffn.node_bias.mul_(1e9)
    x = torch.randn(50, 6, dtype=torch.float64)
    torch.testing.assert_close(ffn.train()(x), ffn.eval()(x))


def test_hard_training_is_evaluation_and_teaches_nodes_nothing() -> None:
    ffn = tree(depth=3, decisions="hard")
    x = torch.randn(50, 6)
    y = ffn(x)
    assert torch.equal(y, ffn.eval()(x))
    y.sum().backward()
    assert ffn.node_weight.grad is None and ffn.leaf_up_weight.grad.any()


@pytest.mark.parametrize("depth", [1, 3, DENSE_LEVELS + 1])
def test_straight_through_gradient(depth) -> None:
    ffn = tree(depth=depth, decisions="straight_through", leaf_width=2).double()
    x = torch.randn(40, 6, dtype=torch.float64, requires_grad=True)
    probe = torch.randn(40, 6, dtype=torch.float64)
    y = ffn(x)
    assert torch.equal(y, copy.deepcopy(ffn).eval()(x))
    y.backward(probe)
    own, own_x = ffn.node_weight.grad, x.grad.clone()
    # The same with the weights of the sides spelled out, through all scores.
    ffn.zero_grad()
    x.grad = None
    path = ffn.path(x)
    scores = ffn.node_scores(x).gather(1, path.nodes)
    side = torch.where(scores >= 0, scores.sigmoid(), 1 - scores.sigmoid())
    straight = 1 + side - side.detach()
    leaf = leaf_outputs(ffn, x)[torch.arange(40), path.leaf]
    (leaf * straight.prod(1, keepdim=True)).backward(probe)
    torch.testing.assert_close(own, ffn.node_weight.grad)
    torch.testing.assert_close(own_x, x.grad)
    assert own.any()


def test_straight_through_learns_to_decide() -> None:
    """Two leaves that cannot learn, one right for each half of the inputs: only the decision can lower the loss."""
    ffn = tree(d_model=2, d_out=1, depth=1, leaf_width=1, decisions="straight_through")
    with torch.no_grad():
        ffn.leaf_up_weight.zero_(), ffn.leaf_down_weight.zero_()
        ffn.leaf_down_bias.copy_(torch.tensor([[-1.0], [1.0]]))
        ffn.node_weight.copy_(torch.tensor([[-0.2, 0.3]])), ffn.node_bias.zero_()
    x = torch.randn(400, 2)
    target = torch.sign(x[:, :1])
    optimizer = torch.optim.Adam([ffn.node_weight, ffn.node_bias], lr=0.05)
    before = (ffn(x) - target).square().mean().item()
    for _ in range(100):
        optimizer.zero_grad()
        (ffn(x) - target).square().mean().backward()
        optimizer.step()
    assert (ffn(x) - target).square().mean().item() < 0.2 * before


def test_region_leak_turns_decisions_round() -> None:
    x = torch.randn(4000, 6)
    for decisions in ("soft", "hard"):
        ffn = tree(decisions=decisions, region_leak=1.0).double()
        plain = tree(decisions=decisions).double()
        plain.load_state_dict(ffn.state_dict())
        with torch.no_grad():
            plain.node_weight.neg_(), plain.node_bias.neg_()
        # Always turned round is the mirrored tree: node 1 and 2 are reached the other way round too.
        torch.testing.assert_close(ffn(x.double()), plain(x.double()))
        assert torch.equal(ffn.eval()(x.double()), ffn(x.double()))
    ffn = tree(depth=1, region_leak=0.25, decisions="hard")
    with torch.no_grad():
        ffn.node_weight.zero_(), ffn.node_bias.fill_(1.0)
    ffn(x)
    assert 0.2 < ffn.leaf_usage[0] / 4000 < 0.3
    assert ffn.eval().path(x).leaf.all()


def test_leaf_dropout_drops_hidden_activations() -> None:
    ffn = tree(d_model=6, d_out=1, depth=1, leaf_width=500, leaf_dropout=0.4, activation="linear")
    with torch.no_grad():
        ffn.leaf_up_weight.zero_(), ffn.leaf_up_bias.fill_(1.0)
        ffn.leaf_down_weight.fill_(1.0), ffn.leaf_down_bias.zero_()
    x = torch.randn(200, 6)
    y = ffn(x)
    assert y.std() > 5 and float(y.detach().mean()) == pytest.approx(500, rel=0.02)
    assert torch.equal(ffn.eval()(x), torch.full((200, 1), 500.0))


def test_hardening_loss_is_the_mean_entropy() -> None:
    ffn = tree(depth=3, hardening_weight=3.0)
    x = torch.randn(5, 7, 6)
    ffn(x)
    torch.testing.assert_close(auxiliary_loss(ffn), 3 * ffn.node_entropies(x).mean())
    auxiliary_loss(ffn).backward()
    assert ffn.node_weight.grad.any()


def test_soft_balance_loss() -> None:
    ffn = tree(depth=2, balance_weight=0.5)
    x = torch.randn(100, 6)
    ffn(x)
    share = torch.bincount(ffn.path(x).leaf, minlength=4) / 100
    torch.testing.assert_close(auxiliary_loss(ffn), 0.5 * 4 * (share * ffn.leaf_weights(x).mean(0)).sum())
    with torch.no_grad():
        ffn.node_weight.zero_(), ffn.node_bias.fill_(30.0)
    ffn(x)
    assert auxiliary_loss(ffn).item() == pytest.approx(0.5 * 4)  # all in one leaf


def test_hard_losses_are_those_of_the_visited_nodes() -> None:
    ffn = tree(depth=2, decisions="hard", balance_weight=0.5)
    x = torch.randn(100, 6)
    ffn(x)
    nodes, scores = ffn.path(x).nodes, ffn.node_scores(x)
    total = 0.0
    for j in range(3):
        visits = (nodes == j).any(1)
        right, c = (scores[visits, j] >= 0).float().mean(), scores[visits, j].sigmoid().mean()
        total = total + visits.sum() / 200 * 2 * (right * c + (1 - right) * (1 - c))
    torch.testing.assert_close(auxiliary_loss(ffn), 0.5 * total)
    auxiliary_loss(ffn).backward()
    assert ffn.node_weight.grad.any()
    ffn = tree(depth=2, decisions="hard", hardening_weight=2.0)
    ffn(x)
    expected = 2 * binary_entropy(ffn.node_scores(x).gather(1, ffn.path(x).nodes)).mean()
    torch.testing.assert_close(auxiliary_loss(ffn), expected)


@pytest.mark.parametrize("decisions", ["soft", "hard"])
def test_balance_loss_balances(decisions) -> None:
    ffn = tree(depth=3, decisions=decisions, balance_weight=1.0)
    with torch.no_grad():
        ffn.node_bias.fill_(1.0)
    x = torch.randn(500, 6)
    optimizer = torch.optim.Adam(ffn.parameters(), lr=0.03)
    ffn(x)
    before = int(ffn.leaf_usage.max())
    for _ in range(80):
        optimizer.zero_grad()
        ffn(x)
        auxiliary_loss(ffn).backward()
        optimizer.step()
    ffn.reset_usage()
    ffn(x)
    assert int(ffn.leaf_usage.max()) < 0.6 * before


def test_usage_and_dead_leaves() -> None:
    ffn = tree(depth=2)
    assert ffn.usage_report() == "4 leaves, no tokens counted yet"
    with torch.no_grad():
        ffn.node_weight.zero_()
        ffn.node_bias.copy_(torch.tensor([1.0, 1.0, -1.0]))  # right, then left: leaf 2
    for _ in range(2):
        ffn(torch.randn(5, 6))
    assert ffn.leaf_usage.tolist() == [0, 0, 10, 0]
    assert ffn.dead_leaves() == [0, 1, 3]
    assert "10 tokens over 4 leaves: 3 dead (0, 1, 3)" in ffn.usage_report()
    ffn.eval()(torch.randn(5, 6))
    assert int(ffn.leaf_usage.sum()) == 10
    assert "leaf_usage" not in ffn.state_dict()
    ffn.reset_usage()
    assert not ffn.leaf_usage.any()


@pytest.mark.parametrize("decisions", ["soft", "hard", "straight_through"])
def test_checkpointing_counts_once(decisions) -> None:
    fields = {"decisions": decisions, "hardening_weight": 1.0, "balance_weight": 1.0}
    plain, kept = tree(**fields), tree(**fields)
    kept.load_state_dict(plain.state_dict())
    x = torch.randn(20, 6)
    for ffn, run in ((plain, plain), (kept, lambda x: checkpoint(kept, x, use_reentrant=False))):
        y = run(x.clone().requires_grad_())
        before = ffn._asked
        (y.sum() + auxiliary_loss(ffn)).backward()
        assert ffn._asked is before
        assert int(ffn.leaf_usage.sum()) == 20
    for one, other in zip(plain.parameters(), kept.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)
    assert plain.node_weight.grad.any()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("decisions", ["hard", "straight_through"])
@pytest.mark.parametrize("depth", [2, DENSE_LEVELS + 1])
@pytest.mark.parametrize("gated", [False, True])
def test_training_compiles_in_one_graph(decisions, depth, gated) -> None:
    torch._dynamo.reset()
    ffn = tree(depth=depth, decisions=decisions, hardening_weight=1.0, balance_weight=1.0, region_leak=1.0, gated=gated)
    x = torch.randn(9, 6)
    results = []
    for run in (ffn, torch.compile(ffn, fullgraph=True, backend="aot_eager")):
        ffn.zero_grad()
        y = run(x)
        (y.square().sum() + auxiliary_loss(ffn)).backward()
        results.append([y.detach(), *(p.grad.clone() for p in ffn.parameters())])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
    assert int(ffn.leaf_usage.sum()) == 18


@pytest.mark.parametrize("decisions", ["soft", "straight_through"])
def test_deterministic(decisions) -> None:
    ffn = tree(d_model=16, depth=7, leaf_width=3, decisions=decisions)
    x, probe = torch.randn(800, 16), torch.randn(800, 16)
    runs = []
    for _ in range(3):
        ffn.zero_grad()
        ffn(x).backward(probe)
        runs.append([p.grad.clone() for p in ffn.parameters()])
    assert all(torch.equal(one, other) for run in runs[1:] for one, other in zip(run, runs[0], strict=True))


@pytest.mark.parametrize(
    ("depth", "leaf_width", "D", "T"),
    # In the last one the weights and their gradients are larger than the activations.
    [(4, 8, 32, 2000), (2, 64, 32, 2000), (7, 1, 32, 2000), (6, 2, 32, 2000), (8, 8, 768, 512)],
)
def test_soft_training_needs_little_more_memory_than_dense(depth, leaf_width, D, T) -> None:
    ffn = tree(d_model=D, depth=depth, leaf_width=leaf_width)
    dense = DenseFFN(DenseConfig(d_model=D, d_hidden=2**depth * leaf_width))
    x = torch.randn(T, D)

    def step(module: torch.nn.Module):
        module.zero_grad()
        return lambda: module(x).square().sum().backward()

    assert peak_bytes(step(ffn), CPU) <= 1.5 * peak_bytes(step(dense), CPU)


@pytest.mark.parametrize("decisions", ["hard", "straight_through"])
def test_hard_training_needs_memory_for_one_leaf(decisions) -> None:
    T, D, W = 2000, 16, 8
    peaks = []
    for depth in (2, 9):
        ffn = tree(d_model=D, depth=depth, leaf_width=W, decisions=decisions)
        x = torch.randn(T, D)
        parameters = 2 * 4 * sum(p.numel() for p in ffn.parameters())
        peaks.append(peak_bytes(lambda f=ffn, x=x: f(x).square().sum().backward(), CPU) - parameters)
    # 4 bytes; the tokens in order, activations, outputs, their gradients; the path is integers of 8 bytes.
    assert peaks[0] < T * 4 * (6 * D + 4 * W + 62) and peaks[1] < T * 4 * (6 * D + 4 * W + 62 + 10 * 9)
    # All hidden activations of all leaves would be T * 4096 numbers.
    assert peaks[1] < 0.1 * T * 4 * 4096
