from __future__ import annotations

import pytest
import torch

from fastffn import DenseConfig, LeafTreeConfig, LeafTreeFFN
from fastffn.nn import DenseFFN
from fastffn.nn.start import leaf_tree as start
from tests.nn.start.test_moe import by_topic

D, H = 12, 41


def dense_ffn(**fields) -> DenseFFN:
    return DenseFFN(DenseConfig(**({"d_model": D, "d_hidden": H, "d_out": 7, "activation": "silu"} | fields)))


@pytest.mark.parametrize("depth", [0, 3])
@pytest.mark.parametrize("shared", [0, 5])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", [1, 3, 300])
def test_leaves_of_all_neurons_are_the_dense_ffn(depth, shared, gated, bias, tokens) -> None:
    """Soft, too: all leaves are alike. Three tokens leave most leaves empty. One leaf has room for more."""
    dense = dense_ffn(gated=gated, bias=bias)
    config = LeafTreeConfig(depth=depth, leaf_width=H - shared + 2 * (depth == 0), shared=shared)
    ffn = LeafTreeFFN.from_dense(dense, config, torch.randn(tokens, D))
    x = torch.randn(50, D)
    for training in (True, False):
        torch.testing.assert_close(ffn.train(training)(x), dense(x), rtol=1e-3, atol=1e-4)


def test_topics_find_their_neurons(monkeypatch: pytest.MonkeyPatch) -> None:
    dense, x = by_topic(3000)
    config = LeafTreeConfig(depth=2, leaf_width=10)
    wanted = dense(x[2000:]).detach()

    def error() -> float:
        ffn = LeafTreeFFN.from_dense(dense, config, x[:2000])
        return float(((ffn.eval()(x[2000:]) - wanted).square().mean() / wanted.var()).detach())

    best = error()
    assert best < 0.05
    # Against random decisions, and the neurons that do most for all tokens in every leaf.
    monkeypatch.setattr(start.Splitter, "__call__", lambda *_: (torch.randn(D), torch.zeros(()), None))
    assert best < 0.3 * error()


def test_decisions_are_firm_and_share_the_tokens_out() -> None:
    dense, x = dense_ffn(), torch.randn(800, D)
    ffn = LeafTreeFFN.from_dense(dense, LeafTreeConfig(depth=3), x)
    assert ffn.config.leaf_width == H // 4
    assert ffn.path(x).leaf.bincount(minlength=8).tolist() == pytest.approx([100] * 8, abs=15)
    scores = ffn.node_scores(x).gather(1, ffn.path(x).nodes)
    assert float(scores.std().detach()) == pytest.approx(start.FIRMNESS, rel=0.3)
    # Soft training begins with about the same outputs.
    y = ffn.eval()(x)
    assert float(((ffn.train()(x) - y).square().mean() / y.var()).detach()) < 0.1


def test_one_leaf_keeps_the_neurons_that_do_most() -> None:
    dense, x = dense_ffn(), torch.randn(900, D)
    with torch.no_grad():
        dense.down.weight[:, 9:] *= 1e-4
    ffn = LeafTreeFFN.from_dense(dense, LeafTreeConfig(depth=0, leaf_width=9), x).eval()
    torch.testing.assert_close(ffn.leaf_up_weight[0], dense.up.weight[:9])
    torch.testing.assert_close(ffn(x), dense(x), rtol=1e-2, atol=1e-2)


def test_pruning_to_one_leaf_beats_dropping_neurons() -> None:
    """The weights out of those that stay take up what the others did, as far as the tokens tell."""
    dense, rows = dense_ffn(), torch.randn(3000, 4) @ torch.randn(4, D)
    x, held_out = rows[:2000], rows[2000:]
    ffn = LeafTreeFFN.from_dense(dense, LeafTreeConfig(depth=0, leaf_width=20), x).eval()
    hidden = dense.hidden(held_out)
    kept = (dense.hidden(x).square().mean(0) * dense.down.weight.square().sum(0)).argsort(descending=True)[:20]
    dropped = hidden[:, kept] @ dense.down.weight[:, kept].T
    wanted = dense(held_out)
    of_dropped = (wanted - dropped).var(0).sum()
    assert float(((ffn(held_out) - wanted).square().mean(0).sum() / of_dropped).detach()) < 0.3


def test_an_empty_leaf_is_made_for_all_tokens() -> None:
    """Its mean output on them is the mean of what is wanted."""
    dense, x = dense_ffn(), torch.randn(3, D)
    ffn = LeafTreeFFN.from_dense(dense, LeafTreeConfig(depth=3, leaf_width=6), x)
    empty = sorted(set(range(8)) - set(ffn.path(x).leaf.tolist()))
    assert len(empty) >= 5
    for leaf in empty:
        hidden = torch.nn.functional.silu(x @ ffn.leaf_up_weight[leaf].T + ffn.leaf_up_bias[leaf])
        y = hidden @ ffn.leaf_down_weight[leaf].T + ffn.leaf_down_bias[leaf]
        torch.testing.assert_close(y.mean(0), dense(x).mean(0), rtol=1e-3, atol=1e-4)
