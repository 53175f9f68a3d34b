"""The module with int8 weights: made from a trained tree, saved, loaded, moved; never trained."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastffn
from fastffn.errors import BackendError, ShapeError
from fastffn.nn import Int8NeuronTree, NeuronTreeConfig

CONFIG = NeuronTreeConfig(d_model=40, d_out=24, depth=4, trees=2, shared=6)


def made(config: NeuronTreeConfig = CONFIG) -> tuple[torch.nn.Module, Int8NeuronTree]:
    ffn = fastffn.build(config).eval()
    return ffn, Int8NeuronTree.from_float(ffn)


@pytest.mark.parametrize("shared", [0, 6])
def test_computes_nearly_what_the_tree_did(shared: int) -> None:
    ffn, tree = made(NeuronTreeConfig(d_model=300, d_out=64, depth=1, trees=40, shared=shared))
    x = torch.randn(50, 300)
    with torch.no_grad():
        expected, y = ffn(x), tree(x)
    away = (y - expected).norm(dim=1) / expected.norm(dim=1)
    # Of two levels one decides; few tokens stand within rounding of it in any of forty trees.
    assert 0 < float(away.median()) < 0.03


def test_takes_a_quarter_of_the_memory() -> None:
    ffn, tree = made(NeuronTreeConfig(d_model=768, depth=7))

    def size(module: torch.nn.Module) -> int:
        return sum(t.nbytes for t in module.state_dict().values())

    assert size(tree) < 0.26 * size(ffn)


def test_state_dict_round_trip(tmp_path) -> None:
    _, tree = made()
    other = Int8NeuronTree(CONFIG)
    x = torch.randn(9, 40)
    assert not torch.equal(tree(x), other(x).detach())
    save_file(tree.state_dict(), tmp_path / "tree.safetensors")
    other.load_state_dict(load_file(tmp_path / "tree.safetensors"))
    assert torch.equal(tree(x), other(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scales_stay_exact_when_the_module_is_narrowed(dtype: torch.dtype) -> None:
    _, tree = made()
    before = copy.deepcopy(tree)
    tree.to(dtype)
    for name in ("in_scale", "b_in", "out_scale", "w_in", "w_out"):
        assert torch.equal(getattr(tree, name), getattr(before, name)), name
    assert tree.shared is not None and tree.shared.up.weight.dtype == dtype
    y = tree(torch.randn(3, 40, dtype=dtype))
    assert y.dtype == dtype and y.shape == (3, 24)


def test_moves_between_devices() -> None:
    _, tree = made()
    assert all(tensor.is_meta for tensor in tree.to("meta").state_dict().values())


def test_shares_nothing_with_the_tree_it_was_made_from() -> None:
    ffn, tree = made()
    x = torch.randn(5, 40)
    before = tree(x)
    with torch.no_grad():
        for parameter in ffn.parameters():
            parameter.zero_()
    assert torch.equal(tree(x), before)


def test_has_nothing_to_train_and_says_so() -> None:
    _, tree = made()
    assert not any(parameter.requires_grad for parameter in tree.parameters())
    with pytest.raises(BackendError, match="for inference"):
        tree(torch.randn(3, 40, requires_grad=True))


def test_wrong_width_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"\[3, 41\]"):
        made()[1](torch.randn(3, 41))


def test_compiles_in_one_graph() -> None:
    _, tree = made()
    x = torch.randn(4, 40)
    compiled = torch.compile(tree, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), tree(x))
