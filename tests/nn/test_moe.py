from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fastffn import MoEConfig, MoEFFN, auxiliary_loss
from fastffn.errors import ConfigError, DtypeError, ShapeError
from fastffn.measure.memory import peak_bytes


def moe(**fields) -> MoEFFN:
    return MoEFFN(MoEConfig(**({"d_model": 6, "experts": 5, "expert_width": 4} | fields)))


def expert(ffn: MoEFFN, e: int, x: torch.Tensor) -> torch.Tensor:
    hidden = x @ ffn.expert_up_weight[e].T + (0 if ffn.expert_up_bias is None else ffn.expert_up_bias[e])
    if ffn.expert_gate_weight is None:
        hidden = F.gelu(hidden)
    else:
        bias = 0 if ffn.expert_gate_bias is None else ffn.expert_gate_bias[e]
        hidden = F.gelu(x @ ffn.expert_gate_weight[e].T + bias) * hidden
    return hidden @ ffn.expert_down_weight[e].T + (0 if ffn.expert_down_bias is None else ffn.expert_down_bias[e])


def by_token(ffn: MoEFFN, x: torch.Tensor) -> torch.Tensor:
    rows = []
    for row in x:
        scores = ffn.router.weight @ row
        best = scores.argsort(descending=True)[: ffn.config.active]
        weights = scores[best].softmax(0) if ffn.config.active > 1 else scores.softmax(0)[best]
        rows.append(sum(w * expert(ffn, int(e), row) for w, e in zip(weights, best, strict=True)))
    return torch.stack(rows)


def test_state_dict_is_the_documented_format() -> None:
    ffn = moe(d_out=3, gated=True, noise=True)
    assert {k: tuple(v.shape) for k, v in ffn.state_dict().items()} == {
        "router.weight": (5, 6),
        "noise.weight": (5, 6),
        "expert_up_weight": (5, 4, 6),
        "expert_up_bias": (5, 4),
        "expert_gate_weight": (5, 4, 6),
        "expert_gate_bias": (5, 4),
        "expert_down_weight": (5, 3, 4),
        "expert_down_bias": (5, 3),
    }
    assert set(moe(bias=False).state_dict()) == {"router.weight", "expert_up_weight", "expert_down_weight"}


@pytest.mark.parametrize("active", [1, 2, 5])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_formula_and_gradients(active, gated, bias) -> None:
    ffn = moe(active=active, gated=gated, bias=bias, d_out=3).double()
    x = torch.randn(20, 6, dtype=torch.float64, requires_grad=True)
    probe = torch.randn(20, 3, dtype=torch.float64)
    wanted = torch.autograd.grad((by_token(ffn, x) * probe).sum(), [x, *ffn.parameters()])
    y = ffn(x)
    torch.testing.assert_close(y, by_token(ffn, x))
    found = torch.autograd.grad((y * probe).sum(), [x, *ffn.parameters()])
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)
    # The router learns from the task, with a single expert too.
    assert found[1].abs().max() > 1e-4


@pytest.mark.parametrize("active", [1, 2, 5])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_sums_experts_and_a_shared_part(active, gated, bias) -> None:
    ffn = moe(active=active, gated=gated, bias=bias, d_out=3, shared=4, weighting="sum").double()
    x = torch.randn(20, 6, dtype=torch.float64, requires_grad=True)
    probe = torch.randn(20, 3, dtype=torch.float64)
    y, parameters = ffn(x), list(ffn.parameters())
    chosen = (x @ ffn.router.weight.T).topk(active, 1).indices
    every = torch.stack([expert(ffn, e, x) for e in range(5)], 1)
    picked = torch.zeros(20, 5, dtype=torch.float64).scatter_(1, chosen, 1.0)
    summed = (every * picked.unsqueeze(2)).sum(1) + ffn.shared(x)
    torch.testing.assert_close(y, summed)
    with torch.no_grad():
        assert torch.equal(ffn(x), y)
    # The router's gradient is that of a mixture in which each chosen expert has its share of the softmax over all.
    weights = (x @ ffn.router.weight.T).softmax(1)
    mixed = (every.detach() * (picked * weights).unsqueeze(2)).sum(1)
    total = (probe * (summed + mixed)).sum()
    wanted = torch.autograd.grad(total, [x, *parameters])
    found = torch.autograd.grad((y * probe).sum(), [x, *parameters])
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)
    assert found[1].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sum_is_the_same_with_and_without_gradients(dtype) -> None:
    ffn, x = moe(weighting="sum", shared=3).to(dtype), torch.randn(50, 6, dtype=dtype)
    y = ffn(x)
    with torch.no_grad():
        assert torch.equal(ffn(x), y)


def test_sum_under_autocast_and_compiled() -> None:
    ffn, x = moe(weighting="sum", shared=3, gated=True), torch.randn(9, 6)
    with torch.autocast("cpu", torch.bfloat16):
        y = ffn(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), ffn(x), rtol=0.05, atol=0.05)
    torch._dynamo.reset()
    compiled = torch.compile(ffn, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), ffn(x))
    compiled(x).square().sum().backward()
    found = ffn.router.weight.grad.clone()
    ffn.zero_grad()
    ffn(x).square().sum().backward()
    torch.testing.assert_close(found, ffn.router.weight.grad)


def test_balance_loss_of_the_switch_transformer() -> None:
    ffn = moe(balance_weight=0.5, active=2)
    x = torch.randn(50, 6)
    ffn(x)
    scores = ffn.router(x)
    share = torch.bincount(scores.topk(2, 1).indices.flatten(), minlength=5) / 100
    torch.testing.assert_close(auxiliary_loss(ffn), 0.5 * 5 * (share * scores.softmax(1).mean(0)).sum())
    auxiliary_loss(ffn).backward()
    assert ffn.router.weight.grad.any() and ffn.expert_up_weight.grad is None


def test_noise_in_training_only() -> None:
    ffn = moe(noise=True, active=1)
    x = torch.randn(200, 6)
    y = ffn(x)
    assert not torch.equal(y, ffn(x))
    y.sum().backward()
    assert ffn.noise.weight.grad.any()
    assert torch.equal(ffn.eval()(x), ffn(x))


def test_usage_is_counted_once_under_checkpointing() -> None:
    ffn = moe()
    x = torch.randn(20, 6, requires_grad=True)
    y = checkpoint(ffn, x, use_reentrant=False)
    before = ffn._asked
    (y.sum() + auxiliary_loss(ffn)).backward()
    assert ffn._asked is before
    assert int(ffn.expert_usage.sum()) == 40
    ffn.eval()(x)
    assert int(ffn.expert_usage.sum()) == 40
    assert "expert_usage" not in ffn.state_dict()


def test_no_tokens() -> None:
    ffn = moe()
    y = ffn(torch.randn(3, 0, 6))
    (y.sum() + auxiliary_loss(ffn)).backward()
    assert y.shape == (3, 0, 6) and auxiliary_loss(ffn).item() == 0


def test_what_is_no_number_stays_in_its_token() -> None:
    ffn = moe().eval()
    x = torch.randn(20, 6)
    spoilt = x.clone()
    spoilt[4], spoilt[9] = float("nan"), float("inf")
    others = [n for n in range(20) if n not in (4, 9)]
    torch.testing.assert_close(ffn(spoilt)[others], ffn(x)[others])
    assert ffn(spoilt)[4].isnan().all()


def test_memory_does_not_grow_with_the_experts() -> None:
    peaks = []
    for experts in (64, 256):
        ffn = moe(d_model=32, experts=experts, expert_width=16).eval()
        x = torch.randn(2000, 32)
        with torch.no_grad():
            # What does grow are the scores.
            peaks.append(peak_bytes(lambda f=ffn, x=x: f(x), torch.device("cpu")) - 4 * 2000 * experts)
    assert peaks[1] < 1.1 * peaks[0]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"experts": 0}, "experts is 0"),
        ({"active": 0}, "active is 0"),
        ({"active": 6}, "active is 6, but there are only 5 experts"),
        ({"expert_width": 0}, "expert_width is 0"),
        ({"balance_weight": -0.1}, "balance_weight is -0.1"),
    ],
)
def test_bad_fields(fields, words) -> None:
    with pytest.raises(ConfigError, match=words):
        moe(**fields)


def test_bad_input() -> None:
    with pytest.raises(DtypeError, match=r"MoEFFN got an input of torch.int64"):
        moe()(torch.ones(3, 6, dtype=torch.int64))
    with pytest.raises(ShapeError, match="d_model=6"):
        moe()(torch.ones(3, 5))


def test_default_width_is_that_of_a_usual_ffn() -> None:
    assert MoEConfig(d_model=64, active=2).resolved().expert_width == 128


def test_margins_lie_between_the_last_chosen_and_the_first_that_is_not() -> None:
    ffn = MoEFFN(MoEConfig(d_model=6, experts=5, active=2, expert_width=3))
    x = torch.randn(20, 6)
    ranked = ffn.router(x).sort(1, descending=True).values
    torch.testing.assert_close(ffn.decision_margins(x), (ranked[:, 1] - ranked[:, 2]).detach())
    assert MoEFFN(MoEConfig(d_model=6, experts=2, active=2)).decision_margins(x).isinf().all()
