"""What became of the trees of a trained model: where tokens go, what each level is worth, and what the choice is."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from fastffn.data.blocks import collate
from fastffn.nn import NeuronTreeFFN
from fastffn.train.config import PretrainConfig
from fastffn.train.text import read_text

# Validation sequences that are looked at, and how many at a time.
SEQUENCES, BATCH = 32, 8


@torch.no_grad()
def tree_usage(run: PretrainConfig, directory: Path) -> dict[str, Any]:
    """Looks at the model of a finished run.

    Returns:
        `leaves` of a tree; `effective_leaves`, the exponential of the entropy of how tokens spread over them, mean over
        trees and layers. Validation losses on some sequences: `loss`; `loss_by_level`, when trees end after level 0,
        1, ...; `loss_of_wrong_paths`, when every decision leads to the other child.
    """
    from transformers import AutoModelForCausalLM

    import fastffn.hf  # noqa: F401  (so that trees load)

    model: Any = AutoModelForCausalLM.from_pretrained(directory / run.ffn).eval()
    text = read_text(run, directory / "tokenizer")
    rows = [text.validation[i] for i in range(min(SEQUENCES, len(text.validation)))]
    ids = collate(rows)["input_ids"]
    trees = [module for module in model.modules() if isinstance(module, NeuronTreeFFN)]
    depth = trees[0].config.depth
    counts = {tree: torch.zeros(tree.config.trees, 2**depth, dtype=torch.int64) for tree in trees}
    hooks = [tree.register_forward_pre_hook(_count_into(counts[tree])) for tree in trees]
    loss = _loss(model, ids)
    for hook in hooks:
        hook.remove()
    share = torch.cat(list(counts.values())).double()
    share = share / share.sum(1, keepdim=True)
    effective = torch.exp(-(share * share.clamp_min(1e-12).log()).sum(1)).mean()
    by_level = [_changed(model, trees, ids, partial(_first, 2 ** (level + 1) - 1)) for level in range(depth + 1)]
    return {
        "leaves": 2**depth,
        "effective_leaves": float(effective),
        "loss": loss,
        "loss_by_level": by_level,
        "loss_of_wrong_paths": _changed(model, trees, ids, _mirrored),
    }


def last_nodes(tree: NeuronTreeFFN, x: torch.Tensor) -> torch.Tensor:
    """Where tokens `[T, D]` end: `[T, P]`, counted from the left on the last level."""
    scores = torch.einsum("td,pnd->tpn", x, tree.w_in) + tree.b_in
    node = torch.zeros(scores.shape[:2], dtype=torch.int64, device=x.device)
    for _ in range(tree.config.depth):
        node = 2 * node + 1 + (scores.gather(2, node.unsqueeze(2)).squeeze(2) > 0)
    return node - (2**tree.config.depth - 1)


def _count_into(counts: torch.Tensor) -> Callable[..., None]:
    def hook(tree: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        assert isinstance(tree, NeuronTreeFFN)
        last = last_nodes(tree, inputs[0].flatten(0, -2))
        counts.scatter_add_(1, last.T, torch.ones_like(last.T))

    return hook


def _loss(model: Any, ids: torch.Tensor) -> float:
    """Mean cross-entropy in nats a token, of each sequence's tokens but the first."""
    total = 0.0
    for batch in ids.split(BATCH):
        logits = model(input_ids=batch).logits[:, :-1].flatten(0, 1)
        total += float(F.cross_entropy(logits.float(), batch[:, 1:].flatten(), reduction="sum"))
    return total / ids[:, 1:].numel()


def _changed(
    model: Any, trees: list[NeuronTreeFFN], ids: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor]
) -> float:
    """The loss with other nodes; the trees are afterwards what they were."""
    names = ("w_in", "b_in", "w_out")
    before = [[getattr(tree, name) for name in names] for tree in trees]
    for tree in trees:
        for name in names:
            setattr(tree, name, nn.Parameter(change(getattr(tree, name).data).contiguous()))
    loss = _loss(model, ids)
    for tree, kept in zip(trees, before, strict=True):
        for name, parameter in zip(names, kept, strict=True):
            setattr(tree, name, parameter)
    return loss


def _first(count: int, nodes: torch.Tensor) -> torch.Tensor:
    return nodes[:, :count]


def _mirrored(nodes: torch.Tensor) -> torch.Tensor:
    """Nodes `[P, N, ...]` with each level in reverse order: whoever decides to go right meets the left child."""
    sizes = [2**level for level in range((nodes.shape[1] + 1).bit_length() - 1)]
    return torch.cat([level.flip(1) for level in nodes.split(sizes, 1)], 1)
