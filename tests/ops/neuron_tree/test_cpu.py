"""The compiled kernels: every instruction set of this machine, larger shapes, the same bits from any thread count."""

from __future__ import annotations

import multiprocessing
import os
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastffn.errors import BackendError
from fastffn.ops import cpu, neuron_tree
from fastffn.ops.dispatch import use_backend
from fastffn.ops.neuron_tree import NEURON_TREE
from fastffn.ops.neuron_tree.cpu import IMPL
from fastffn.ops.neuron_tree.request import Request
from tests.ops.isa import instruction_set
from tests.ops.neuron_tree.cases import Case, make
from tests.ops.neuron_tree.test_backends import agrees

pytestmark = pytest.mark.skipif(not cpu.instruction_sets(), reason="fastffn was built without a C++ compiler")
every_isa = pytest.mark.parametrize("isa", cpu.instruction_sets())
ACTIVATIONS = ["gelu", "gelu_new", "quick_gelu", "relu", "relu2", "silu", "tanh", "sigmoid", "linear"]


@pytest.fixture(autouse=True)
def threads_as_they_were():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def run(case: Case) -> list[torch.Tensor]:
    """Output, what is saved, and all gradients."""
    y, scores, last = IMPL.forward(*case, keep=True, out=None)
    gradient = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype)
    found = IMPL.backward(gradient, *case, scores, last, needs=(True,) * 4)
    return [y, scores, last, *(g for g in found if g is not None)]


@every_isa
@settings(max_examples=60, deadline=None)
@given(
    case=st.builds(
        make,
        st.one_of(st.integers(1, 150), st.integers(151, 1500), st.just(5000)),
        d_model=st.integers(1, 70),
        d_out=st.integers(1, 70),
        depth=st.integers(0, 10),
        trees=st.integers(1, 5),
        dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
        bias=st.booleans(),
        activation=st.sampled_from(ACTIVATIONS),
        straight_through=st.booleans(),
        strided=st.booleans(),
        seed=st.integers(0, 2**31),
    )
)
def test_agrees_with_the_definition(isa: str, case: Case) -> None:
    with instruction_set(isa):
        agrees(IMPL, case)


@every_isa
@pytest.mark.parametrize(
    "shape",
    [
        {"tokens": 700, "depth": 14, "trees": 1},  # three stages
        {"tokens": 300, "depth": 9, "trees": 3, "d_model": 770, "d_out": 257},
        {"tokens": 3, "depth": 2, "trees": 16},
        {"tokens": 9000, "depth": 2, "trees": 1, "d_model": 16, "d_out": 16},  # parts of several blocks
        {"tokens": 1, "depth": 14, "trees": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_shapes(isa: str, shape: dict, dtype: torch.dtype) -> None:
    with instruction_set(isa):
        agrees(IMPL, make(**shape, dtype=dtype))


@pytest.mark.parametrize("tokens", [1, 7, 100, 129, 3000, 9000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_from_any_number_of_threads_and_from_run_to_run(tokens: int, dtype: torch.dtype) -> None:
    case = make(tokens, d_model=50, d_out=33, depth=6, trees=2, dtype=dtype)
    torch.set_num_threads(1)
    expected = run(case)
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        for ours, theirs in zip(run(case), expected, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("trees", [1, 3, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_token_gets_the_same_output_in_any_batch(trees: int, dtype: torch.dtype) -> None:
    case = make(600, d_model=130, d_out=75, depth=7, trees=trees, dtype=dtype)
    y, scores, last = IMPL.forward(*case, keep=True, out=None)
    for few in (slice(0, 1), slice(5, 12), slice(100, 220), slice(599, 600)):
        part = IMPL.forward(case.x[few], *case[1:], keep=True, out=None)
        for ours, theirs in zip(part, (y[few], scores[:, few], last[:, few]), strict=True):
            assert torch.equal(ours, theirs)


def test_misaligned_and_strided_input() -> None:
    case = make(300, d_model=37, d_out=21, depth=5)
    expected = run(case)

    def shifted(tensor: torch.Tensor) -> torch.Tensor:
        room = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
        return room[1:].view(tensor.shape).copy_(tensor)

    moved = Case(*(shifted(t) if isinstance(t, torch.Tensor) else t for t in case))
    apart = torch.empty(300, 90)
    apart[:, 3:40] = case.x
    for other in (moved, case._replace(x=apart[:, 3:40]), case._replace(x=case.x.T.contiguous().T)):
        for ours, theirs in zip(run(other), expected, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("tokens", [5, 300])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_in_its_token(tokens: int, bad: float) -> None:
    case = make(tokens, depth=6, trees=1)
    clean = IMPL.forward(*case, keep=False, out=None)[0]
    case.x[2, 3] = bad
    y, _, last = IMPL.forward(*case, keep=True, out=None)
    others = torch.arange(tokens) != 2
    assert torch.equal(y[others], clean[others])
    assert not y[2].isfinite().all()
    assert bool((last >= 63).all()) and bool((last <= 126).all())
    if bad != bad:
        assert last[0, 2] == 63  # left at every node


def test_nodes_that_nobody_visits_get_zeros() -> None:
    case = make(200, depth=4, trees=1, activation="linear")
    case.b_in[0, 0] = -1e4  # everybody goes left
    found = run(case)
    assert set(found[2].flatten().tolist()) <= set(range(15, 23))
    for gradient in found[4:7]:
        right = [2, 5, 6, *range(11, 15), *range(23, 31)]
        assert not gradient[0, right].any()
        assert gradient[0, 0].any()


def test_gradients_that_nobody_needs_are_left_out() -> None:
    case = make(200)
    y, scores, last = IMPL.forward(*case, keep=True, out=None)
    whole = IMPL.backward(torch.ones_like(y), *case, scores, last, needs=(True,) * 4)
    for alone in range(4):
        needs = tuple(index == alone for index in range(4))
        found = IMPL.backward(torch.ones_like(y), *case, scores, last, needs=needs)
        for index in range(4):
            assert torch.equal(found[index], whole[index]) if index == alone else found[index] is None


def _in_child(case: Case, queue) -> None:
    torch.set_num_threads(4)
    queue.put([tensor.double().sum().item() for tensor in run(case)])


def test_a_forked_child_does_not_hang() -> None:
    case = make(2000, depth=6)
    torch.set_num_threads(2)
    expected = [tensor.double().sum().item() for tensor in run(case)]
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
    cases = [make(tokens, depth=6, d_model=33, seed=tokens) for tokens in (3, 90, 500, 2000)]
    expected = [run(case) for case in cases]
    failures: list[int] = []

    def work(number: int) -> None:
        for _ in range(5):
            for ours, theirs in zip(run(cases[number]), expected[number], strict=True):
                if not torch.equal(ours, theirs):
                    failures.append(number)

    workers = [threading.Thread(target=work, args=(number % 4,)) for number in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert failures == []


def test_many_shallow_trees_are_left_to_dense() -> None:
    def chosen(tokens: int, trees: int, depth: int) -> str:
        return NEURON_TREE.choose(Request("cpu", torch.float32, tokens, trees, depth, 768, 768)).name

    assert {chosen(tokens, 1, 11) for tokens in (1, 64, 4096)} == {"cpu"}
    # What holds for every kind of processor measured; test_backends.py tells them apart.
    assert chosen(1, 128, 4) == "cpu"
    assert chosen(1, 256, 0) == "cpu" and chosen(256, 256, 0) == "dense"
    assert chosen(2048, 64, 1) == "dense"


def test_an_unknown_instruction_set_is_refused() -> None:
    words = "FASTFFN_CPU_ISA is 'avx51'; this machine runs"
    with instruction_set("avx51"), use_backend("cpu"), pytest.raises(BackendError, match=words):
        neuron_tree(*make(3)[:5])


def test_the_fastest_instruction_set_is_chosen() -> None:
    with instruction_set(""):
        assert cpu.compiled().isa == 0
    with instruction_set(cpu.instruction_sets()[-1]):
        assert cpu.compiled().isa == len(cpu.instruction_sets()) - 1


def test_without_the_compiled_module_everything_runs_and_says_so_once(monkeypatch) -> None:
    cpu._missing.cache_clear()
    NEURON_TREE.forget()
    monkeypatch.setattr(cpu, "_load", lambda: (None, "the compiled module fastffn._cpu cannot be loaded (gone)"))
    case = make(20)
    try:
        with pytest.warns(UserWarning, match="without its compiled kernels.*gone.*C\\+\\+ compiler"):
            assert neuron_tree(*case[:5]).shape == (20, 7)
        neuron_tree(*case[:5])  # a second warning would be an error
        with use_backend("cpu"), pytest.raises(BackendError, match="gone"):
            neuron_tree(*case[:5])
    finally:
        cpu._missing.cache_clear()
        NEURON_TREE.forget()


def test_settings_are_documented() -> None:
    from fastffn.settings import ENVIRONMENT

    assert "FASTFFN_CPU_ISA" in ENVIRONMENT
    assert os.environ.get("FASTFFN_CPU_ISA", "") in ("", *cpu.instruction_sets())
