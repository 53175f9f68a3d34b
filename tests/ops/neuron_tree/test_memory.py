"""The sparse path holds memory in proportion to tokens and active neurons; the dense route's is bounded."""

from __future__ import annotations

import pytest
import torch

import fastffn
from fastffn.measure.memory import peak_bytes
from fastffn.ops import neuron_tree
from fastffn.ops.neuron_tree import masked, torch_grouped
from tests.ops.neuron_tree.cases import make

WIDTH, DEPTH = 32, 13
NEURONS = 2 ** (DEPTH + 1) - 1


def peak(tokens: int, *, backward: bool) -> int:
    case = make(tokens, d_model=WIDTH, d_out=WIDTH, depth=DEPTH, trees=1)
    for tensor in case.tensors:
        tensor.requires_grad_(backward)

    def run() -> None:
        y = neuron_tree(*case[:5])
        if backward:
            y.sum().backward()

    with fastffn.use_backend("torch_grouped"):
        return peak_bytes(run, torch.device("cpu"))


@pytest.mark.parametrize("backward", [False, True])
def test_a_token_needs_memory_for_what_it_visits(backward: bool, monkeypatch) -> None:
    # One cut for both, the middle: 127 neurons above and 127 below, of 16,383.
    monkeypatch.setattr(torch_grouped, "best_cut", lambda *_, **__: 7)
    monkeypatch.setattr(torch_grouped, "walks", lambda *_: False)
    few, many = peak(2000, backward=backward), peak(6000, backward=backward)
    each = (many - few) / 4000
    evaluated = 2 * 127
    assert 4 * evaluated / 2 < each < 4 * (4 * evaluated + 6 * WIDTH + 16 * (DEPTH + 1))
    assert each < 0.15 * 4 * NEURONS


def test_what_is_kept_for_the_backward_pass() -> None:
    case = make(500, d_model=WIDTH, d_out=WIDTH, depth=DEPTH, trees=2)
    for tensor in case.tensors:
        tensor.requires_grad_()
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        neuron_tree(*case[:5])
    own = sum(kept.values()) - sum(tensor.nbytes for tensor in case.tensors)
    # A score for each visited neuron and the number of the last one.
    assert own == 500 * 2 * (4 * (DEPTH + 1) + 8)


def test_the_dense_route_is_bounded(monkeypatch) -> None:
    monkeypatch.setattr(masked, "CHUNK_ELEMENTS", 64 * 2047)
    case = make(3000, d_model=WIDTH, d_out=WIDTH, depth=10, trees=1)
    with fastffn.use_backend("dense"):
        peak = peak_bytes(lambda: neuron_tree(*case[:5]), torch.device("cpu"))
    # Scores and hidden activations of 64 tokens, not of 3,000; and the output.
    assert peak < 3 * 4 * 64 * 2047 + 4 * 3000 * WIDTH + 2**17
