"""Distances between tensors: chunked against plain, by hand, and with padding that must not count."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastffn.train.distill import losses


def problem(bias: bool, dtype=torch.float64):
    """Features of student and teacher `[13, 6]`, weights `[11, 6]`, and the student's leaves."""
    made = [torch.randn(13, 6), torch.randn(11, 6), torch.randn(11), torch.randn(13, 6), torch.randn(11, 6)]
    features, weight, b, goal, goal_weight = (x.to(dtype) for x in made)
    leaves = [features.requires_grad_(), weight.requires_grad_(), *([b.requires_grad_()] if bias else [])]
    return leaves, goal @ goal_weight.T


def test_divergence_is_kl_of_the_teacher_to_the_student() -> None:
    student, teacher = torch.randn(5, 7).double(), torch.randn(5, 7).double()
    p, q = (teacher / 2).softmax(-1), (student / 2).softmax(-1)
    expected = (p * (p / q).log()).sum(-1)
    torch.testing.assert_close(losses.divergence(student, teacher, 2.0).double(), expected, atol=1e-6, rtol=1e-5)
    assert float(losses.divergence(teacher, teacher).abs().max()) < 1e-6
    assert not torch.allclose(losses.divergence(teacher, student, 2.0).double(), expected, atol=1e-3)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens_at_once", [1, 4, 13, 100])
def test_chunked_equals_plain(bias, tokens_at_once) -> None:
    leaves, goal = problem(bias)
    plain = 0.5 * losses.divergence(F.linear(*leaves), goal, 1.5).sum()
    expected = torch.autograd.grad(3 * plain, leaves)
    sizes = []

    def part(logits: torch.Tensor, rows: slice) -> torch.Tensor:
        sizes.append(len(logits))
        return 0.5 * losses.divergence(logits, goal[rows], 1.5).sum()

    given = (*leaves, *([None] if not bias else []))
    chunked = losses.chunked_loss(*given, part, at_once=11 * tokens_at_once)
    torch.testing.assert_close(chunked, plain.float(), rtol=1e-5, atol=1e-6)
    for found, wanted in zip(torch.autograd.grad(3 * chunked, leaves), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    assert sum(sizes) == 13 and max(sizes) == min(13, tokens_at_once)


def test_chunked_gives_gradients_only_to_those_who_want_them() -> None:
    (features, weight), goal = problem(False)
    part = lambda logits, rows: losses.divergence(logits, goal[rows]).sum()  # noqa: E731
    frozen = losses.chunked_loss(features, weight.detach(), None, part, at_once=33)
    frozen.backward()
    assert features.grad is not None and weight.grad is None
    head = losses.chunked_loss(features.detach(), weight, None, part, at_once=33)
    head.backward()
    assert weight.grad is not None
    with torch.no_grad():
        assert not losses.chunked_loss(features, weight, None, part).requires_grad
    assert float(losses.chunked_loss(features[:0], weight, None, part).detach()) == 0.0


def test_chunked_under_autocast() -> None:
    (features, weight), goal = problem(False, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = losses.chunked_loss(
            features, weight, None, lambda logits, rows: losses.divergence(logits, goal[rows]).sum(), at_once=33
        )
    loss.backward()
    plain = losses.divergence(features @ weight.T, goal).sum()
    expected = torch.autograd.grad(plain, (features, weight))
    assert float(loss.detach()) == pytest.approx(float(plain.detach()), rel=0.02)
    for found, wanted in zip((features.grad, weight.grad), expected, strict=True):
        assert found.dtype == torch.float32
        assert float((found - wanted).norm() / wanted.norm()) < 0.03


def test_memory_is_that_of_a_chunk() -> None:
    """The largest tensor that is made holds a chunk of logits, not all of them."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            found = func(*args, **(kwargs or {}))
            for x in found if isinstance(found, (tuple, list)) else (found,):
                if isinstance(x, torch.Tensor):
                    largest = max(largest, x.numel())
            return found

    features, weight = torch.randn(256, 8, requires_grad=True), torch.randn(100, 8, requires_grad=True)
    with Watch():
        losses.chunked_loss(features, weight, None, lambda x, rows: x.square().sum(), at_once=3000).backward()
    assert largest == 3000


def test_normalised_error() -> None:
    wanted = torch.tensor([[3.0, 4.0], [0.0, 5.0]])
    error, size = losses.squared_error(torch.tensor([[3.0, 3.0], [2.0, 5.0]]), wanted)
    assert (float(error), float(size)) == (5.0, 50.0)


def test_pooling_leaves_padding_out() -> None:
    states = torch.tensor([[[1.0, 0.0], [3.0, 2.0], [100.0, 100.0]], [[5.0, 5.0], [9.0, 9.0], [9.0, 9.0]]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert losses.mean_pooled(states, mask).tolist() == [[2.0, 1.0], [5.0, 5.0]]
    distance = losses.cosine_distance(torch.tensor([[2.0, 0.0], [1.0, 0.0]]), torch.tensor([[5.0, 0.0], [0.0, 3.0]]))
    torch.testing.assert_close(distance, torch.tensor([0.0, 1.0]))
