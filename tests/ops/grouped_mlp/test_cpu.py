"""The compiled kernels: every instruction set of this machine, larger shapes, the same bits from any thread count."""

from __future__ import annotations

import multiprocessing
import threading
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastffn.errors import BackendError
from fastffn.ops import OPS, cpu, grouped_mlp
from fastffn.ops.activations import ACTIVATIONS
from fastffn.ops.dispatch import select, use_backend
from fastffn.ops.grouped_mlp import reference, routes, torch_grouped
from fastffn.ops.grouped_mlp.cpu import IMPL
from tests.ops.grouped_mlp.test_grouped_mlp import NAMES, call, check, drawn
from tests.ops.isa import instruction_set

pytestmark = pytest.mark.skipif(not cpu.instruction_sets(), reason="fastffn was built without a C++ compiler")
every_isa = pytest.mark.parametrize("isa", cpu.instruction_sets())
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def threads_as_they_were():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def arguments_of(index: torch.Tensor, tensors: dict, activation: str = "gelu") -> tuple[Any, ...]:
    """As an implementation takes them."""
    return (tensors["x"], index, *(tensors[name] for name in NAMES[1:]), activation)


def run(index: torch.Tensor, tensors: dict, backward: Any = IMPL.backward) -> list[torch.Tensor]:
    """Output, what is saved, and all gradients."""
    arguments = arguments_of(index, tensors)
    y, *saved = IMPL.forward(*arguments, keep=True, out=None)
    gradient = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype)
    needs = tuple(isinstance(t, torch.Tensor) and t.is_floating_point() for t in arguments[:-1])
    found = backward(gradient, *arguments, *saved, needs=needs)
    return [y, *saved, *(g for g in found if g is not None)]


@every_isa
@settings(max_examples=80, deadline=None)
@given(
    T=st.one_of(st.integers(1, 40), st.integers(1, 1500), st.just(5000)),
    E=st.one_of(st.integers(1, 4), st.integers(1, 64)),
    D=st.integers(1, 70),
    W=st.one_of(st.integers(1, 40), st.sampled_from([64, 97])),
    O=st.integers(1, 70),
    bias=st.booleans(),
    gated=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    seed=st.integers(0, 2**31),
)
def test_agrees_with_the_definition(isa, T, E, D, W, O, bias, gated, dtype, activation, seed) -> None:  # noqa: E741
    index, tensors = drawn(T, E, D, W, O, bias=bias, gated=gated, dtype=dtype, seed=seed)
    with instruction_set(isa), use_backend("cpu"):
        check(index, tensors, activation)


@every_isa
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    "shape", [(3, 2, 770, 257, 401), (700, 3, 401, 130, 770), (1300, 1, 9, 600, 5), (40, 64, 50, 3, 6)]
)
def test_several_blocks_of_depth_columns_and_tokens(isa, shape, gated) -> None:
    index, tensors = drawn(*shape, gated=gated, dtype=torch.float32)
    with instruction_set(isa), use_backend("cpu"):
        check(index, tensors)


@pytest.mark.parametrize(
    "shape", [(1, 4, 300, 200, 300), (16, 16, 96, 64, 96), (150, 2, 200, 150, 90), (5000, 9, 50, 33, 41)]
)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_from_any_number_of_threads_and_from_run_to_run(shape, gated, dtype) -> None:
    case = drawn(*shape, gated=gated, dtype=dtype)
    torch.set_num_threads(1)
    expected = run(*case)
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        for ours, theirs in zip(run(*case), expected, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [False, True])
def test_saves_what_the_others_save_and_takes_what_they_saved(dtype, gated) -> None:
    case = drawn(300, 7, 37, 21, 26, gated=gated, dtype=dtype)
    _, order, ends, up, gate = IMPL.forward(*arguments_of(*case), keep=True, out=None)
    for other in (reference.IMPL, torch_grouped.IMPL):
        _, *saved = other.forward(*arguments_of(*case), keep=True, out=None)
        assert torch.equal(saved[0], order) and torch.equal(saved[1], ends)
        torch.testing.assert_close(saved[2], up)
        assert saved[3].shape == gate.shape
        torch.testing.assert_close(saved[3], gate)
        ours, theirs = run(*case), run(*case, backward=other.backward)
        for mine, its in zip(ours, theirs, strict=True):
            assert mine.dtype == its.dtype
            scale = max([1.0, *its.double().abs().flatten().tolist()])
            torch.testing.assert_close(mine.double(), its.double(), rtol=0, atol=16 * torch.finfo(dtype).eps * scale)


@pytest.mark.parametrize("gated", [False, True])
def test_misaligned_and_strided_input(gated) -> None:
    index, tensors = drawn(300, 5, 37, 19, 21, gated=gated, dtype=torch.float32)
    expected = run(index, tensors)

    def shifted(tensor: torch.Tensor | None) -> torch.Tensor | None:
        if tensor is None:
            return None
        return torch.empty(tensor.numel() + 1)[1:].view(tensor.shape).copy_(tensor)

    apart = torch.empty(300, 90)
    apart[:, 3:40] = tensors["x"]
    strided = {n: None if t is None else t.transpose(0, -1).contiguous().transpose(0, -1) for n, t in tensors.items()}
    assert not strided["up_weight"].is_contiguous()
    for other in ({n: shifted(t) for n, t in tensors.items()}, tensors | {"x": apart[:, 3:40]}, strided):
        for ours, theirs in zip(run(index, other), expected, strict=True):
            assert torch.equal(ours, theirs)


def test_a_result_that_is_not_contiguous_is_filled() -> None:
    case = drawn(30, 3, 8, 8, 5, dtype=torch.float32)
    out = torch.full((5, 30), float("nan")).T
    (y,) = IMPL.forward(*arguments_of(*case), keep=False, out=out)
    assert y is out
    assert torch.equal(out, IMPL.forward(*arguments_of(*case), keep=False, out=None)[0])


@pytest.mark.parametrize("tokens", [6, 30, 300])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_stays_in_its_token_and_in_its_mlp(tokens, bad, dtype) -> None:
    index, tensors = drawn(tokens, 3, 37, 20, 21, dtype=dtype)
    index = torch.arange(tokens) % 3
    clean = run(index, tensors)
    tensors["x"][4, 3] = bad
    spoilt = run(index, tensors)
    others = torch.arange(tokens) != 4
    assert torch.equal(spoilt[0][others], clean[0][others]) and not spoilt[0][4].isfinite().all()
    # The gradient of x, and those of the weights of the other MLPs.
    assert torch.equal(spoilt[5][others], clean[5][others])
    for ours, theirs in zip(spoilt[6:], clean[6:], strict=True):
        assert torch.equal(ours[[0, 2]], theirs[[0, 2]])


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("tokens", [0, 2, 100])
def test_mlps_without_tokens_get_zeros(tokens, gated) -> None:
    _, tensors = drawn(tokens, 5, 12, 9, 10, gated=gated, dtype=torch.float32)
    index = torch.full((tokens,), 3)
    for gradient in run(index, tensors)[6:]:
        assert not gradient[[0, 1, 2, 4]].any()
        assert tokens == 0 or gradient[3].any()


@pytest.mark.parametrize("gated", [False, True])
def test_gradients_that_nobody_needs_are_left_out(gated) -> None:
    index, tensors = drawn(200, 4, 12, 9, 10, gated=gated, dtype=torch.float32)
    arguments = arguments_of(index, tensors)
    y, *saved = IMPL.forward(*arguments, keep=True, out=None)
    there = [number for number, t in enumerate(arguments[:-1]) if t is not None and number != 1]
    whole = IMPL.backward(torch.ones_like(y), *arguments, *saved, needs=tuple(n in there for n in range(8)))
    for alone in there:
        needs = tuple(number == alone for number in range(8))
        run(
            *drawn(200, 4, 12, 9, 10, gated=gated, dtype=torch.float32, seed=1)
        )  # leaves other numbers in scratch memory
        found = IMPL.backward(torch.ones_like(y), *arguments, *saved, needs=needs)
        for number in range(8):
            assert torch.equal(found[number], whole[number]) if number == alone else found[number] is None


def _in_child(case: tuple, queue: Any) -> None:
    torch.set_num_threads(4)
    found = run(*case)
    torch.set_num_threads(1)  # torch's own threads do hang in a forked child
    queue.put([tensor.double().sum().item() for tensor in found])


def test_a_forked_child_does_not_hang() -> None:
    case = drawn(2000, 6, 40, 30, 40, dtype=torch.float32)
    torch.set_num_threads(2)
    found = run(*case)
    torch.set_num_threads(1)
    expected = [tensor.double().sum().item() for tensor in found]
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(case, queue))
    child.start()
    try:
        assert queue.get(timeout=60) == expected
        child.join(60)
        assert child.exitcode == 0
    finally:
        child.kill()


def test_several_python_threads_at_once() -> None:
    cases = [drawn(tokens, 6, 40, 30, 33, dtype=torch.float32, seed=tokens % 7) for tokens in (3, 90, 500, 2000)]
    expected = [run(*case) for case in cases]
    failures: list[int] = []

    def work(number: int) -> None:
        for _ in range(5):
            for ours, theirs in zip(run(*cases[number]), expected[number], strict=True):
                if not torch.equal(ours, theirs):
                    failures.append(number)

    workers = [threading.Thread(target=work, args=(number % 4,)) for number in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert failures == []


def test_what_it_cannot_run_is_left_to_others() -> None:
    case = drawn(10, 3, 8, 8, 8)
    assert call(*case).dtype == torch.float64
    with use_backend("cpu"), pytest.raises(BackendError, match="takes float32, bfloat16 and float16, not float64"):
        call(*case)


def test_it_is_the_first_choice() -> None:
    assert OPS["grouped_mlp"].impls[0] is IMPL
    assert OPS["grouped_mlp"].verdicts()["cpu"] is None


def test_large_products_of_bfloat16_are_left_to_instructions_of_their_own(monkeypatch) -> None:
    example = OPS["grouped_mlp"].example._replace(tokens=4096, mlps=16, width=256, dtype=torch.bfloat16)
    monkeypatch.setattr(routes, "multiplies_bfloat16", lambda: True)
    monkeypatch.setattr(routes, "multiplies_tiles", lambda: False)
    assert "leaves it to torch_grouped" in (routes.why_not(example) or "")
    assert select("grouped_mlp", OPS["grouped_mlp"].impls, example) is torch_grouped.IMPL
    for other in ({"dtype": torch.float16}, {"tokens": 1000}, {"width": 64}, {"d_out": 64}):
        assert routes.why_not(example._replace(**other)) is None
    monkeypatch.setattr(routes, "multiplies_bfloat16", lambda: False)
    assert select("grouped_mlp", OPS["grouped_mlp"].impls, example) is IMPL


def test_products_of_whole_tiles_pay_from_fewer_tokens(monkeypatch) -> None:
    monkeypatch.setattr(routes, "multiplies_tiles", lambda: True)
    # 9 tokens of an MLP, 1,024 neurons, three maps of 1,024: 28 M multiply-adds an MLP; without gates 19 M.
    example = OPS["grouped_mlp"].example._replace(
        tokens=72, mlps=8, width=1024, d_model=1024, d_out=1024, gated=True, dtype=torch.bfloat16
    )
    assert "leaves it to torch_grouped" in (routes.why_not(example) or "")
    for other in ({"gated": False}, {"tokens": 63}, {"mlps": 10}, {"dtype": torch.float16}, {"dtype": torch.float32}):
        assert routes.why_not(example._replace(**other)) is None
    # Narrow ones are done in the cache by the compiled kernels, however many tokens there are.
    for narrow in ({"width": 127}, {"d_model": 64}, {"d_out": 64}):
        assert routes.why_not(example._replace(tokens=100_000, **narrow)) is None
    assert routes.why_not(example._replace(tokens=100_000, width=128)) is not None


def test_an_unknown_instruction_set_is_refused() -> None:
    index, tensors = drawn(3, 2, 4, 4, 4, dtype=torch.float32)
    words = "FASTFFN_CPU_ISA is 'avx51'"
    with instruction_set("avx51"), use_backend("cpu"), pytest.raises(BackendError, match=words):
        grouped_mlp(tensors["x"], index, *(tensors[name] for name in NAMES[1:]))
