"""Published code in the same table, with the same weights where it computes the same function.

Each peer is a function `(case, layers) -> Contender`, or raises `LeftOut` with the reason.
"""

from __future__ import annotations

import importlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fastffn.bench.layer.case import LayerCase, memory
from fastffn.bench.layer.contender import Contender
from fastffn.nn import FFN, LeafTreeConfig, LeafTreeFFN, NeuronTreeFFN
from fastffn.ops.activations import get_activation


class LeftOut(Exception):  # noqa: N818 (nothing has gone wrong)
    """Why a peer is not in the table."""


class _TreePeer(nn.Module, ABC):
    """A way through the trees of a `neuron_tree`, on its own parameters; biases are added, which the original lacks."""

    def __init__(self, ffn: NeuronTreeFFN) -> None:
        super().__init__()
        self.w_in, self.b_in, self.w_out = ffn.w_in, ffn.b_in, ffn.w_out
        self.levels = ffn.config.depth + 1
        self.act = get_activation(ffn.config.activation)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[T, D] -> [T, O]`, one tree after the other."""
        y = self.tree(x, 0)
        for tree in range(1, len(self.w_in)):
            y = y + self.tree(x, tree)
        return y

    @abstractmethod
    def tree(self, x: torch.Tensor, tree: int) -> torch.Tensor:
        """The output of one tree."""


class GatherBmm(_TreePeer):
    """Level by level, each token fetches its node's row and takes the product with it (benchmark_pytorch/fff_bmm)."""

    def tree(self, x: torch.Tensor, tree: int) -> torch.Tensor:
        """See `_TreePeer.tree`."""
        node = torch.zeros(len(x), dtype=torch.long, device=x.device)
        nodes, scores = [], []
        for _ in range(self.levels):
            rows = self.w_in[tree].index_select(0, node)
            score = torch.bmm(x.unsqueeze(1), rows.unsqueeze(-1)).flatten() + self.b_in[tree].index_select(0, node)
            nodes.append(node)
            scores.append(score)
            node = 2 * node + 1 + (score > 0).long()
        rows = self.w_out[tree].index_select(0, torch.stack(nodes, 1).flatten())
        hidden = self.act(torch.stack(scores, 1))
        return torch.bmm(hidden.unsqueeze(1), rows.view(len(x), self.levels, -1)).squeeze(1)


class SparseCoo(_TreePeer):
    """The scores of the visited nodes as a sparse COO matrix, times all output rows (benchmark_pytorch/fff_sparse).

    The scores too come from a sparse product: a matrix that holds each token at the columns of its node, times all
    input rows as one column. The original numbers the rows of both matrices so that they are right for one token only;
    here they are right for several.
    """

    def tree(self, x: torch.Tensor, tree: int) -> torch.Tensor:
        """See `_TreePeer.tree`."""
        tokens, width = x.shape
        wanted, there = 4 * tokens * self.w_in[tree].numel(), memory(x.device)
        if torch.is_grad_enabled() and there is not None and wanted > there // 4:
            # torch takes the gradient of a sparse factor from the whole, dense product.
            raise LeftOut(f"would hold {wanted / 1e9:,.0f} GB for the gradient at {tokens} tokens")
        w_in, w_out = self.w_in[tree].reshape(-1, 1), self.w_out[tree]
        number = torch.arange(tokens, device=x.device)
        node = torch.zeros(tokens, dtype=torch.long, device=x.device)
        nodes, scores = [], []
        for _ in range(self.levels):
            columns = (node * width).unsqueeze(1) + torch.arange(width, device=x.device)
            where = torch.stack((number.repeat_interleave(width), columns.flatten()))
            spread = torch.sparse_coo_tensor(where, x.flatten(), (tokens, len(w_in)), check_invariants=False)
            score = torch.sparse.mm(spread, w_in).squeeze(1) + self.b_in[tree].index_select(0, node)
            nodes.append(node)
            scores.append(score)
            node = 2 * node + 1 + (score > 0).long()
        where = torch.stack((number.repeat_interleave(self.levels), torch.stack(nodes, 1).flatten()))
        values = self.act(torch.stack(scores, 1)).flatten()
        hidden = torch.sparse_coo_tensor(where, values, (tokens, len(w_out)), check_invariants=False)
        return torch.sparse.mm(hidden, w_out)


def _of_trees(kind: type[_TreePeer], name: str) -> Callable[[LayerCase, list[FFN]], Contender]:
    def make(case: LayerCase, layers: list[FFN]) -> Contender:
        trees = [layer for layer in layers if isinstance(layer, NeuronTreeFFN) and layer.shared is None]
        if len(trees) != len(layers):
            raise LeftOut("is a way through trees of neurons, of which this FFN does not consist (alone)")
        modules = [kind(tree) for tree in trees]
        return Contender(name, "peer", modules, trees, bounded=True, dtype=case.torch_dtype)

    return make


def _like(case: LayerCase) -> tuple[int, int]:
    """Depth and leaf width of the leaf tree with as many neurons in all, and active, as the FFN, or nearly so."""
    config = case.config
    depth = max(1, round(math.log2(config.total_width / config.active_width)))
    return depth, max(1, round(config.total_width / 2**depth))


def fastfeedforward(case: LayerCase, layers: list[FFN]) -> Contender:
    """The package fastfeedforward (arXiv 2308.14711), a leaf tree: the same function where the FFN is one."""
    try:
        published: Any = importlib.import_module("fastfeedforward").FFF
    except ImportError as error:
        raise LeftOut("is not installed: pip install fastfeedforward==0.2.1") from error
    if case.config.active_width == case.config.total_width:
        raise LeftOut("is a tree; this FFN evaluates all its neurons")
    if case.dtype != "fp32":
        raise LeftOut("writes its results in float32 only")
    trees = [layer for layer in layers if isinstance(layer, LeafTreeFFN)]
    config = trees[0].config if trees else None
    if config is not None and (config.shared or not config.depth or config.decisions != "soft"):
        raise LeftOut("has no shared part, no depth of 0, and trains with soft decisions only")
    if config is None:
        depth, width = _like(case)
        like = LeafTreeConfig(
            d_model=case.config.d_model,
            d_out=case.config.d_out,
            depth=depth,
            leaf_width=width,
            activation=case.config.activation,
        )
        with torch.device(case.device):
            models = [LeafTreeFFN(like) for _ in layers]
    else:
        like, models = config, trees
    act = get_activation(like.activation)
    modules, sources = [], []
    for model in models:
        module = published(like.d_model, like.leaf_width, like.d_out, like.depth, activation=_Act(act))
        module.load_state_dict(model.to_fastfeedforward())
        modules.append(_Guarded(module.to(case.device), like, memory(torch.device(case.device))))
        sources.append(_WithoutBiases(model))
    name = f"fastfeedforward {like.depth} x {like.leaf_width}"
    return Contender(name, "peer", modules, sources, bounded=config is not None)


class _Act(nn.Module):
    def __init__(self, act: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.act = act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(x)


class _Guarded(nn.Module):
    """The published module; in training it makes tensors of tokens x leaves x d_out, which may not fit."""

    def __init__(self, module: nn.Module, config: LeafTreeConfig, there: int | None) -> None:
        super().__init__()
        self.module, self.config, self.there = module, config, there

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert self.config.d_out
        # Outputs of all leaves, those weighted, and the gradients of both.
        wanted = 4 * 4 * len(x) * self.config.leaves * self.config.d_out
        if self.training and self.there is not None and wanted > self.there // 2:
            raise LeftOut(f"would hold {wanted / 1e9:,.0f} GB at {len(x)} tokens")
        y: torch.Tensor = self.module(x)
        return y


class _WithoutBiases(nn.Module):
    """What the package computes: in evaluation it leaves out the leaves' output biases."""

    def __init__(self, tree: LeafTreeFFN) -> None:
        super().__init__()
        self.tree = tree

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.tree(x)
        if self.tree.training:
            return y
        return y - self.tree.leaf_down_bias[self.tree.path(x).leaf]

    def decision_margins(self, x: torch.Tensor) -> torch.Tensor:
        return self.tree.decision_margins(x)


PEERS: dict[str, Callable[[LayerCase, list[FFN]], Contender]] = {
    "gather + bmm": _of_trees(GatherBmm, "gather + bmm"),
    "sparse COO": _of_trees(SparseCoo, "sparse COO"),
    "fastfeedforward": fastfeedforward,
}


def peers(case: LayerCase, layers: list[FFN]) -> tuple[list[Contender], dict[str, str]]:
    """The peers that can take part, and why the others do not."""
    found, left_out = [], {}
    for name, make in PEERS.items():
        try:
            found.append(make(case, layers))
        except LeftOut as reason:
            left_out[name] = str(reason)
    return found, left_out
