from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

import fastffn
from fastffn import DenseConfig, DenseFFN, LeafTreeConfig, LeafTreeFFN, auxiliary_loss
from fastffn.errors import ConfigError, DtypeError, ShapeError
from fastffn.measure.memory import peak_bytes
from fastffn.nn.leaf_tree import DENSE_LEVELS, binary_entropy

CPU = torch.device("cpu")


def tree(**fields) -> LeafTreeFFN:
    return LeafTreeFFN(LeafTreeConfig(**({"d_model": 6, "depth": 2, "leaf_width": 3} | fields)))


def leaf_outputs(ffn: LeafTreeFFN, x: torch.Tensor) -> torch.Tensor:
    """Every leaf's output for every token, `[T, L, O]`: nothing of this is in the library."""
    act = fastffn.ops.activations.get_activation(ffn.config.activation)
    hidden = torch.einsum("td,lwd->tlw", x, ffn.leaf_up_weight) + ffn.leaf_up_bias
    if ffn.config.gated:
        hidden = act(torch.einsum("td,lwd->tlw", x, ffn.leaf_gate_weight) + ffn.leaf_gate_bias) * hidden
    else:
        hidden = act(hidden)
    return torch.einsum("tlw,low->tlo", hidden, ffn.leaf_down_weight) + ffn.leaf_down_bias


@torch.no_grad()
def one_path(ffn: LeafTreeFFN, x: torch.Tensor) -> list[tuple[int, float]]:
    """`(leaf, least |score| on the way)` of each token, one after the other."""
    found = []
    for row in x:
        node, nearest = 0, float("inf")
        for _ in range(ffn.config.depth):
            score = float(row.double() @ ffn.node_weight[node].double() + ffn.node_bias[node].double())
            nearest = min(nearest, abs(score))
            node = 2 * node + 1 + (score >= 0)
        found.append((node - (ffn.config.leaves - 1), nearest))
    return found


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


def test_leaf_dropout_of_gated_leaves() -> None:
    ffn = tree(d_model=6, d_out=1, depth=1, leaf_width=500, leaf_dropout=0.4, activation="linear", gated=True)
    with torch.no_grad():
        for name, value in ffn.named_parameters():
            if name.startswith("leaf"):
                value.fill_(1.0 if name in ("leaf_up_bias", "leaf_gate_bias", "leaf_down_weight") else 0.0)
    y = ffn(torch.randn(200, 6)).detach()
    assert y.std() > 5 and float(y.mean()) == pytest.approx(500, rel=0.02)


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


def test_soft_training_is_the_mixture_of_all_leaves() -> None:
    ffn = tree(depth=3, d_out=4, shared=5).double()
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    rows = x.view(-1, 6)
    mixed = torch.einsum("tl,tlo->to", ffn.leaf_weights(rows), leaf_outputs(ffn, rows)) + ffn.shared(rows)
    torch.testing.assert_close(ffn(x), mixed.view(2, 9, 4))


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


def test_entropies() -> None:
    ffn = tree(depth=2).double()
    x = torch.randn(30, 6, dtype=torch.float64)
    c = ffn.node_scores(x).sigmoid()
    torch.testing.assert_close(ffn.node_entropies(x), -(c * c.log() + (1 - c) * (1 - c).log()).mean(0))
    assert binary_entropy(torch.tensor([1e4, -1e4])).tolist() == [0.0, 0.0]


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


# Inside torch: it instantiates every autograd.Function that it traces.
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
