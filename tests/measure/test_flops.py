from __future__ import annotations

import pytest
import torch

from fastffn import BlockConfig, LowRankConfig, build
from fastffn.convert.fresh import ModelShape, fresh_model, step_bound
from fastffn.measure.flops import count_flops, layer_flops, step_flops

SEED = ModelShape(layers=6, d_model=768, heads=12, sequence=1024, vocabulary=50257)


def test_counts_matrix_products() -> None:
    a, b = torch.empty(3, 5, device="meta"), torch.empty(5, 7, device="meta")
    assert count_flops(lambda: a @ b) == 2 * 3 * 5 * 7


def test_half_of_causal_attention() -> None:
    q = torch.empty(2, 8, 4, device="meta")
    assert count_flops(lambda: q @ q.mT) == 2 * 8 * 8 * 4  # half of 2 * 2 * 8 * 8 * 4
    assert count_flops(lambda: q @ q.mT, causal=False) == 2 * 2 * 8 * 8 * 4


def test_the_published_shape_by_hand() -> None:
    tokens, d, v, layers = 1024, 768, 50257, 6
    forward = layers * (12 * d * d * 2 * tokens + 2 * 2 * tokens * tokens * d // 2) + 2 * tokens * d * v
    bound = step_bound(SEED, LowRankConfig(rank=192))
    assert bound.dense == pytest.approx(3 * forward, rel=1e-3)
    # The figures that the field quotes for this shape: a free FFN gives 1.49, rank d/4 about 1.29.
    assert bound.speedup_of_free_ffn == pytest.approx(1.49, abs=0.01)
    assert bound.speedup == pytest.approx(1.29, abs=0.01)


def test_a_higher_rank_allows_less() -> None:
    shape = ModelShape(layers=2, d_model=64, heads=4, sequence=32, vocabulary=100)
    bounds = [step_bound(shape, LowRankConfig(rank=rank)).speedup for rank in (2, 8, 32, 64)]
    assert bounds == sorted(bounds, reverse=True)
    # At full rank the factors cost more than the dense FFN.
    assert bounds[-1] < 1
    assert bounds[0] < step_bound(shape, LowRankConfig(rank=2)).speedup_of_free_ffn


def test_blocks_cost_what_their_formula_says() -> None:
    d, h, k, tokens = 64, 256, 4, 32
    with torch.device("meta"):
        ffn = build(BlockConfig(d_model=d, d_hidden=h, blocks=k))
    assert layer_flops(ffn, tokens, d) == 3 * 2 * tokens * 2 * d * (d + h) // k


def test_batched_products_of_an_ffn_are_not_taken_for_attention() -> None:
    shape = ModelShape(layers=2, d_model=64, heads=4, sequence=32, vocabulary=100)
    block, low_rank = BlockConfig(blocks=4), LowRankConfig(rank=16)  # of equal cost
    assert step_bound(shape, block) == step_bound(shape, low_rank)
    with torch.device("meta"):
        whole = fresh_model(shape, low_rank)
    assert step_bound(shape, low_rank).factorised == step_flops(whole, shape.sequence)


def test_forward_alone_is_a_third() -> None:
    with torch.device("meta"):
        ffn = build("dense", d_model=8, d_hidden=32)
    assert layer_flops(ffn, 5, 8, backward=False) == 2 * 5 * 8 * 32 * 2
    assert layer_flops(ffn, 5, 8) == 3 * layer_flops(ffn, 5, 8, backward=False)


@pytest.mark.parametrize("depth", [0, 3, 7])
def test_a_leaf_tree_needs_one_node_of_each_of_the_upper_levels(depth: int) -> None:
    with torch.device("meta"):
        ffn = build("leaf_tree", d_model=8, depth=depth, leaf_width=4).eval()
    # Those below the fifth are no matrix products.
    assert layer_flops(ffn, 5, 8, backward=False) == 2 * 5 * (min(depth, 5) * 8 + 4 * (8 + 8))


def test_layers_that_stay_dense_cost_what_dense_layers_cost() -> None:
    shape = ModelShape(layers=3, d_model=64, heads=4, sequence=32, vocabulary=100)
    one, none = step_bound(shape, LowRankConfig(rank=8), 1), step_bound(shape, LowRankConfig(rank=8))
    assert one.dense == none.dense
    assert 3 * (one.factorised - none.factorised) == none.dense - none.factorised
    with torch.device("meta"):
        whole = fresh_model(shape, LowRankConfig(rank=8), dense_layers=1)
    assert one.factorised == step_flops(whole, shape.sequence)
