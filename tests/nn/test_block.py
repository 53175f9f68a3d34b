from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastffn import BlockConfig, BlockFFN, DenseConfig, DenseFFN, build
from fastffn.errors import ConfigError
from fastffn.nn.block import expand, merged_weight, multiply, project


def by_hand(right: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
    """`L Pi R` from three whole matrices, written down entry by entry."""
    k, q, width = right.shape
    height = left.shape[1]
    big_r, pi, big_l = torch.zeros(k * q, k * width), torch.zeros(k * q, k * q), torch.zeros(k * height, k * q)
    for block in range(k):
        big_r[block * q : (block + 1) * q, block * width : (block + 1) * width] = right[block]
        big_l[block * height : (block + 1) * height, block * q : (block + 1) * q] = left[block]
        for p in range(q):
            pi[p * k + block, block * q + p] = 1  # entry (block, p) of R x goes to place (p, block)
    return big_l @ pi @ big_r


def random_factors(k: int, q: int, width: int, height: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(k, q, width), torch.randn(k, height, q)


# q / k a whole number, not one, and below one; k = 1; wide and tall.
SHAPES = [(2, 4, 4, 6), (4, 8, 8, 24), (3, 5, 5, 7), (3, 7, 9, 7), (4, 3, 3, 8), (4, 2, 5, 2), (1, 3, 3, 5)]


def test_state_dict_is_the_documented_format() -> None:
    ffn = BlockFFN(BlockConfig(d_model=8, d_hidden=20, d_out=12, blocks=4, rank=3, gated=True))
    assert {k: tuple(v.shape) for k, v in ffn.state_dict().items()} == {
        "up.r": (4, 2, 2),
        "up.l": (4, 5, 2),
        "up.bias": (20,),
        "up.a.weight": (3, 8),
        "up.b.weight": (20, 3),
        "gate.r": (4, 2, 2),
        "gate.l": (4, 5, 2),
        "gate.bias": (20,),
        "gate.a.weight": (3, 8),
        "gate.b.weight": (20, 3),
        "down.r": (4, 3, 5),
        "down.l": (4, 3, 3),
        "down.bias": (12,),
        "down.a.weight": (3, 20),
        "down.b.weight": (12, 3),
    }
    plain = BlockFFN(BlockConfig(d_model=8, blocks=2, bias=False))
    assert set(plain.state_dict()) == {"up.r", "up.l", "down.r", "down.l"}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_formula(shape: tuple[int, int, int, int]) -> None:
    right, left = random_factors(*shape)
    weight = by_hand(right, left)
    torch.testing.assert_close(expand(right, left), weight)
    x = torch.randn(5, 2, weight.shape[1])
    torch.testing.assert_close(multiply(x, right, left), x @ weight.T, rtol=1e-4, atol=1e-5)


def test_each_output_block_sees_every_input_block() -> None:
    weight = expand(*random_factors(4, 8, 8, 16)).view(4, 16, 4, 8)
    ranks = torch.linalg.matrix_rank(weight.transpose(1, 2))
    assert torch.equal(ranks, torch.full((4, 4), 2))  # q / k
    assert torch.linalg.matrix_rank(weight.reshape(64, 32)) == 32  # all of min(in, out)
    # Fewer than k inner entries a block: some see nothing of each other.
    narrow = expand(*random_factors(4, 3, 3, 8)).view(4, 8, 4, 3)
    assert int((narrow.abs().amax((1, 3)) == 0).sum()) == 16 - 12


def test_ffn_is_the_dense_one_with_the_merged_weights() -> None:
    ffn = BlockFFN(BlockConfig(d_model=8, d_hidden=20, blocks=2, rank=3, activation="relu"))
    x = torch.randn(5, 8)
    up = expand(ffn.up.r, ffn.up.l) + ffn.up.b.weight @ ffn.up.a.weight
    down = expand(ffn.down.r, ffn.down.l) + ffn.down.b.weight @ ffn.down.a.weight
    torch.testing.assert_close(ffn(x), (x @ up.T + ffn.up.bias).relu() @ down.T + ffn.down.bias)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_projection_recovers_a_matrix_of_its_form(shape: tuple[int, int, int, int]) -> None:
    weight = expand(*(factor.double() for factor in random_factors(*shape)))
    torch.testing.assert_close(expand(*project(weight, shape[0])), weight)


@settings(max_examples=25, deadline=None)
@given(k=st.integers(1, 5), d_in=st.integers(1, 5), d_out=st.integers(1, 5), seed=st.integers(0, 2**31))
def test_projection_is_the_nearest_matrix_of_its_form(k: int, d_in: int, d_out: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(k * d_out, k * d_in, generator=generator, dtype=torch.float64)
    right, left = (factor.requires_grad_() for factor in project(weight, k))
    error = (expand(right, left) - weight).square().sum()
    # Its residual is at a stationary point ...
    for gradient in torch.autograd.grad(error, (right, left)):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-8)
    # ... and is what Eckart and Young allow each sub-matrix, at the rank that the layout gives it.
    q = min(d_in, d_out)
    ranks = torch.zeros(k, k, dtype=torch.long)
    for t in range(k * q):
        ranks[t // q, t % k] += 1
    parts = weight.view(k, d_out, k, d_in).transpose(1, 2)
    best = sum(torch.linalg.svdvals(parts[b, j])[ranks[b, j] :].square().sum() for b in range(k) for j in range(k))
    torch.testing.assert_close(error.detach(), best)


def test_no_change_of_the_factors_comes_nearer() -> None:
    weight = torch.randn(12, 20, dtype=torch.float64)
    right, left = project(weight, 4)
    best = (expand(right, left) - weight).norm()
    for size in (1e-3, 1e-1, 1.0):
        for _ in range(20):
            other = expand(right + size * torch.randn_like(right), left + size * torch.randn_like(left))
            assert (other - weight).norm() > best


def test_one_block_reproduces_dense() -> None:
    dense = DenseFFN(DenseConfig(d_model=12, d_hidden=20)).double()
    ffn = BlockFFN.from_dense(dense, BlockConfig(blocks=1))
    x = torch.randn(7, 12, dtype=torch.float64)
    torch.testing.assert_close(ffn(x), dense(x))


def test_spectral_start_is_balanced_and_copies_the_bias() -> None:
    dense = DenseFFN(DenseConfig(d_model=16, d_hidden=48))
    ffn = BlockFFN.from_dense(dense, BlockConfig(blocks=4))
    torch.testing.assert_close(ffn.up.r.norm(), ffn.up.l.norm())
    assert torch.equal(ffn.up.bias, dense.up.bias)


def test_the_low_rank_term_takes_the_directions_that_stand_out() -> None:
    dense = DenseFFN(DenseConfig(d_model=32, d_hidden=64))
    with torch.no_grad():
        dense.up.weight.add_(torch.randn(64, 3) @ torch.randn(3, 32))
    weight = dense.up.weight.detach()

    def error(**options) -> float:
        up = BlockFFN.from_dense(dense, BlockConfig(**options)).up
        factors = (up.a.weight, up.b.weight) if options.get("rank") else ()
        return float((merged_weight(up.r, up.l, *factors) - weight).norm() / weight.norm())

    errors = [error(blocks=4, rank=rank) for rank in (0, 1, 2, 3, 8)]
    assert errors == sorted(errors, reverse=True)
    assert errors[3] < 0.2 < errors[0]
    # The other order, the low-rank term after the projection, is further away.
    residual = weight - expand(*project(weight, 4))
    assert errors[3] < float(torch.linalg.svdvals(residual)[3:].norm() / weight.norm())


@pytest.mark.parametrize("rank", [0, 32])
@pytest.mark.parametrize(("blocks", "d_model"), [(4, 256), (12, 240)])
def test_normal_start_has_the_dense_variance(rank: int, blocks: int, d_model: int) -> None:
    dense = DenseFFN(DenseConfig(d_model=d_model, d_hidden=2 * d_model))
    with torch.no_grad():
        dense.up.weight.normal_(0, 0.02)
    ffn = BlockFFN.from_dense(dense, BlockConfig(blocks=blocks, rank=rank, start="normal"))
    up = ffn.up
    block = expand(up.r, up.l).detach()
    assert float(block.std()) == pytest.approx(0.02 / (2**0.5 if rank else 1), rel=0.05)
    assert float(ffn.merge().up.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
    assert float(up.r.detach().std()) == pytest.approx(float(up.l.detach().std()), rel=0.05)


@pytest.mark.parametrize("start", ["spectral", "normal"])
def test_build_starts_like_a_dense_ffn(start: str) -> None:
    ffn = build(BlockConfig(d_model=128, d_hidden=256, start=start))
    # torch.nn.Linear: uniform +-1/sqrt(in), variance 1 / (3 in).
    assert float(expand(ffn.up.r, ffn.up.l).detach().var()) == pytest.approx(1 / (3 * 128), rel=0.1)
    assert float(expand(ffn.down.r, ffn.down.l).detach().var()) == pytest.approx(1 / (3 * 256), rel=0.1)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"blocks": 0}, "blocks is 0"),
        ({"blocks": -4}, "blocks is -4"),
        ({"blocks": 2.5}, "blocks is 2.5"),
        ({"blocks": 5}, r"d_hidden 128.*Numbers that do: 1, 2, 4, 8, 16, 32\."),
        ({"blocks": 8, "d_out": 12}, r"d_out 12.*Numbers that do: 1, 2, 4\."),
        ({"rank": -1}, "rank is -1"),
        ({"rank": 1.5}, "rank is 1.5"),
        ({"rank": 33}, r"min\(in, out\) = 32"),
        ({"start": "random"}, "spectral, normal"),
    ],
    ids=str,
)
def test_bad_fields(fields: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build(BlockConfig(**({"d_model": 32} | fields)))


def test_the_merged_weight_is_rounded_once() -> None:
    right, left = (factor.bfloat16() for factor in random_factors(3, 7, 9, 7))
    a, b = torch.randn(4, 27).bfloat16(), torch.randn(21, 4).bfloat16()
    exact = expand(right.double(), left.double())
    assert torch.equal(merged_weight(right, left), exact.bfloat16())
    assert torch.equal(merged_weight(right, left, a, b), (exact + b.double() @ a.double()).bfloat16())


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("widths", [(8, 20, 8), (12, 24, 24), (20, 12, 16), (32, 64, 32)], ids=str)
def test_frobenius_decay_is_a_gradient_step_on_the_norm_of_the_product(rank: int, widths: tuple) -> None:
    d_model, d_hidden, d_out = widths
    config = BlockConfig(d_model=d_model, d_hidden=d_hidden, d_out=d_out, blocks=4, rank=rank, gated=True)
    ffn = BlockFFN(config).double()
    loss = 0.0
    for linear in ffn._linears().values():
        weight = expand(linear.r, linear.l)
        if rank:
            weight = weight + linear.b.weight @ linear.a.weight
        loss = loss + 0.5 * weight.square().sum()
    loss.backward()
    expected = {
        name: parameter.detach() - 0.1 * (0 if parameter.grad is None else parameter.grad)
        for name, parameter in ffn.named_parameters()
    }
    changed = {name for name, parameter in ffn.named_parameters() if parameter.grad is not None}
    assert changed == {name for name in expected if "bias" not in name}
    ffn.decay_product_(0.1)
    for name, parameter in ffn.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], msg=name)


def test_from_dense_takes_no_widths_from_the_config() -> None:
    dense = DenseFFN(DenseConfig(d_model=8, d_hidden=12, activation="relu", dropout=0.25)).to(torch.float64)
    ffn = BlockFFN.from_dense(dense, BlockConfig(blocks=2, activation="silu"))
    assert dataclasses.asdict(ffn.config) == dataclasses.asdict(dense.config) | {
        "blocks": 2,
        "rank": 0,
        "start": "spectral",
    }
    assert ffn.up.r.dtype == torch.float64
