"""The `narrow` kind, by hand: who sleeps, what merging wakes, what is refused."""

from __future__ import annotations

import pytest
import torch

from fastffn import DenseConfig, DenseFFN, NarrowConfig, NarrowFFN, build
from fastffn.errors import ConfigError


def test_the_largest_neurons_stay_awake_in_their_order() -> None:
    dense = DenseFFN(DenseConfig(d_model=2, d_hidden=4))
    with torch.no_grad():
        dense.up.weight.copy_(torch.tensor([[1.0, 0], [3, 4], [0, 2], [0, 0.1]]))
        dense.down.weight.copy_(torch.tensor([[1.0, 0.1, 3, 100], [0, 0, 4, 0]]))
        dense.up.bias.copy_(torch.arange(4.0))
    # Sizes 1, 0.5, 10, 10.
    ffn = NarrowFFN.from_dense(dense, NarrowConfig(width=2))
    assert ffn.up.bias.tolist() == [2, 3]
    assert torch.equal(ffn.down.weight, dense.down.weight[:, 2:])
    assert torch.equal(ffn.asleep.up.weight, dense.up.weight[:2])
    assert ffn.asleep.up.bias.tolist() == [0, 1]
    assert set(dict(ffn.named_parameters())) == {"up.weight", "up.bias", "down.weight", "down.bias"}


def test_merging_wakes_and_changes_nothing() -> None:
    ffn = build(NarrowConfig(d_model=6, d_hidden=20, width=3))
    merged = ffn.merge()
    x = torch.randn(5, 6)
    torch.testing.assert_close(merged(x), ffn(x))
    assert merged.up.weight.shape == (20, 6)
    assert torch.equal(merged.up.weight[:3], ffn.up.weight)
    torch.testing.assert_close(merged.up.bias[:3], ffn.up.bias)
    assert not merged.down.weight[:, 3:].any()
    merged(x).square().sum().backward()
    # What was asleep begins to learn: first the way out.
    assert merged.down.weight.grad[:, 3:].any() and not merged.up.weight.grad[3:].any()


@pytest.mark.parametrize("gated", [False, True])
def test_the_woken_read_with_weights_twice_as_large_as_the_others(gated: bool) -> None:
    ffn = build(NarrowConfig(d_model=6, d_hidden=20, width=3, gated=gated))
    with torch.no_grad():
        for name in ("up", "gate") if gated else ("up",):
            getattr(ffn, name).weight.mul_(50)
    merged = ffn.merge()
    for name in ("up", "gate") if gated else ("up",):
        woken, before = getattr(merged, name).weight[3:], getattr(ffn.asleep, name).weight
        awake = getattr(ffn, name).weight
        assert woken.square().mean().item() == pytest.approx(4 * awake.square().mean().item())
        torch.testing.assert_close(woken / woken.norm(), before / before.norm())
    with torch.no_grad():
        ffn.asleep.up.weight.zero_()
    assert not ffn.merge().up.weight[3:].any()


def test_the_woken_respond_to_what_they_did() -> None:
    """Weights and biases grow alike; those that are large already, or have nothing to be measured by, stay."""
    ffn = build(NarrowConfig(d_model=6, d_hidden=20, width=3))
    with torch.no_grad():
        ffn.asleep.up.bias.uniform_(-1, 1)
        ffn.up.weight.mul_(50)
    merged, x = ffn.merge(), torch.randn(5, 6)
    growth = (merged.up.weight[3:] / ffn.asleep.up.weight).mean()
    before = x @ ffn.asleep.up.weight.T + ffn.asleep.up.bias
    assert growth > 10
    torch.testing.assert_close(merged.up(x)[:, 3:], growth * before, rtol=1e-4, atol=1e-4)
    for scale in (1e-3, 0.0):
        with torch.no_grad():
            ffn.up.weight.mul_(scale)
        merged = ffn.merge()
        assert torch.equal(merged.up.weight[3:], ffn.asleep.up.weight)
        assert torch.equal(merged.up.bias[3:], ffn.asleep.up.bias)
    assert ffn.to("meta").merge().up.weight.is_meta


def test_dense_with_the_rest_silenced() -> None:
    dense = DenseFFN(DenseConfig(d_model=6, d_hidden=8, gated=True, activation="silu"))
    ffn = NarrowFFN.from_dense(dense, NarrowConfig(width=5))
    awake = {tuple(row) for row in ffn.up.weight.tolist()}
    with torch.no_grad():
        for neuron, row in enumerate(dense.up.weight.tolist()):
            if tuple(row) not in awake:
                dense.down.weight[:, neuron] = 0
    x = torch.randn(4, 6)
    torch.testing.assert_close(ffn(x), dense(x))


@pytest.mark.parametrize("width", [0, 16, -1, 2.5])
def test_widths_that_make_no_sense(width) -> None:
    with pytest.raises(ConfigError, match=rf"width is {width}.*below d_hidden \(16\)"):
        build("narrow", d_model=4, width=width)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_dropped_neurons_are_gone_and_merge_as_zeros(gated: bool, bias: bool) -> None:
    dense = DenseFFN(DenseConfig(d_model=6, d_hidden=8, gated=gated, bias=bias))
    kept, dropped = (NarrowFFN.from_dense(dense, NarrowConfig(width=5, drop=drop)) for drop in (False, True))
    assert not any(name.startswith("asleep") for name in dropped.state_dict())
    x = torch.randn(7, 6)
    assert torch.equal(kept(x), dropped(x))
    merged = dropped.merge()
    assert merged.up.weight.shape == (8, 6) and not merged.up.weight[5:].any()
    torch.testing.assert_close(merged(x), dropped(x))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_say_who_stays_and_the_rest_is_made_up_for(gated: bool, bias: bool, dtype: torch.dtype) -> None:
    dense = DenseFFN(DenseConfig(d_model=6, d_hidden=8, gated=gated, bias=bias)).to(dtype)
    rows = torch.randn(600, 6, dtype=dtype)
    rows[:, 0] = 1
    with torch.no_grad():
        # Small weights, but the only neurons that these tokens make work; one that does nothing; twins.
        dense.up.weight[2] *= 0
        dense.up.weight[2, 0] = 8
        dense.up.weight[6], dense.down.weight[:, 6] = dense.up.weight[5], 0.02 * dense.down.weight[:, 5]
        if gated:
            dense.gate.weight[2], dense.gate.weight[6] = dense.up.weight[2], dense.gate.weight[5]
            dense.gate.weight[2, 0] = 8
        if bias:
            for name in ("up", "gate") if gated else ("up",):
                getattr(dense, name).bias[6] = getattr(dense, name).bias[5]
    blind = NarrowFFN.from_dense(dense, NarrowConfig(width=7, drop=True))
    shown = NarrowFFN.from_dense(dense, NarrowConfig(width=7, drop=True), rows)
    assert shown.up.weight.dtype == dtype and all(p.requires_grad for p in shown.parameters())
    assert any(torch.equal(row, dense.up.weight[2]) for row in shown.up.weight)
    errors = [float((ffn(rows) - dense(rows)).detach().square().mean()) for ffn in (shown, blind)]
    assert errors[0] <= errors[1]
    # The twin that stays does the work of both.
    torch.testing.assert_close(shown(rows), dense(rows), rtol=0.1, atol=0.1 if dtype == torch.bfloat16 else 5e-3)
