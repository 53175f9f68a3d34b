"""`leaf_mixture` from plain torch operators, without a tensor of `[T, L, O]`, in the memory of a dense FFN.

Each leaf's hidden activations are scaled by the weight m_l of the leaf; then one product with the weights of all leaves

    y = (m * act(x W_up + b_up)) W_down + m b_down,        [T, L W] x [L W, O]  +  [T, L] x [L, O]

Kept for the backward pass are the hidden values before the activation, `[T, L W]`, and the scores; the mixture and the
activations are computed again, a chunk of tokens at a time, so that beside those two nothing of that size is held.
Sums over tokens go through the chunks in order, in float32 at least.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fastffn.ops.activations import get_activation, get_activation_backward
from fastffn.ops.dispatch import Impl, Tensors

# Chunks: an eighth of the tokens, but no fewer than CHUNK_ROWS, for products that are worth adding to the weights'
# gradients, and no fewer than make CHUNK_VALUES hidden values: they would only cost calls.
CHUNKS = 8
CHUNK_ROWS = 96
CHUNK_VALUES = 2**15


def _chunks(tokens: int, values: int) -> Iterator[slice]:
    rows = max(1, -(-tokens // CHUNKS), CHUNK_ROWS, CHUNK_VALUES // values)
    return (slice(start, min(start + rows, tokens)) for start in range(0, tokens, rows))


class Mixture:
    """The weights of the leaves for some tokens, in float32 at least.

    Nodes and leaves come first inside, `[2^level, tokens]`: each level is contiguous, and so are its two sides.

    Args:
        scores: `[T, N]` of all nodes.

    Attributes:
        leaves: `[T, L]`, the weights, contiguous.
    """

    def __init__(self, scores: torch.Tensor) -> None:
        wide = torch.promote_types(scores.dtype, torch.float32)
        scores = scores.T.to(wide, memory_format=torch.contiguous_format)
        self.right, self.left = torch.sigmoid(scores), torch.sigmoid(-scores)
        # The weights that arrive at the nodes of each level, and at last at the leaves.
        self.levels = [scores.new_ones(1, scores.shape[1])]
        for level in self._slices():
            weights = self.levels[-1]
            self.levels.append(torch.stack((weights * self.left[level], weights * self.right[level]), 1).flatten(0, 1))
        self.leaves = self.levels[-1].T.contiguous()

    def _slices(self) -> list[slice]:
        depth = (self.right.shape[0] + 1).bit_length() - 1
        return [slice(2**level - 1, 2 ** (level + 1) - 1) for level in range(depth)]

    def gradient(self, of_leaves: torch.Tensor) -> torch.Tensor:
        """The gradient of the scores `[T, N]` from that of the weights of the leaves `[T, L]`."""
        result = torch.empty_like(self.right)
        above = of_leaves.T.contiguous()
        for number, level in reversed(list(enumerate(self._slices()))):
            of_left, of_right = above.unflatten(0, (-1, 2)).unbind(1)
            left, right = self.left[level], self.right[level]
            result[level] = self.levels[number] * left * right * (of_right - of_left)
            above = of_left * left + of_right * right
        return result.T


def _forward(
    x: torch.Tensor,
    scores: torch.Tensor,
    kept: torch.Tensor | None,
    up_weight: torch.Tensor,
    up_bias: torch.Tensor,
    down_weight: torch.Tensor,
    down_bias: torch.Tensor,
    activation: str,
    *,
    keep: bool,
    out: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    leaves, width, _ = up_weight.shape
    act = get_activation(activation)
    down = _as_matrix(down_weight)
    up = up_weight.flatten(0, 1).T
    y = x.new_empty(x.shape[0], down.shape[1]) if out is None else out
    hidden = x.new_empty(x.shape[0] if keep else 0, leaves * width)
    for rows in _chunks(x.shape[0], leaves * width):
        if keep:
            own = torch.addmm(up_bias.flatten(), x[rows], up, out=hidden[rows])
        else:
            own = torch.addmm(up_bias.flatten(), x[rows], up)
        weights = Mixture(scores[rows]).leaves.to(x.dtype)
        active = act(own).unflatten(1, (leaves, width)) * weights.unsqueeze(2)
        if kept is not None:
            active *= kept[rows]
        torch.addmm(weights @ down_bias, active.flatten(1), down, out=y[rows])
    return (y, hidden) if keep else (y,)


def _backward(
    gradient: torch.Tensor,
    x: torch.Tensor,
    scores: torch.Tensor,
    kept: torch.Tensor | None,
    up_weight: torch.Tensor,
    up_bias: torch.Tensor,
    down_weight: torch.Tensor,
    down_bias: torch.Tensor,
    activation: str,
    hidden: torch.Tensor,
    *,
    needs: tuple[bool, ...],
) -> Tensors:
    leaves, width, _ = up_weight.shape
    act, act_backward = get_activation(activation), get_activation_backward(activation)
    down = _as_matrix(down_weight)
    up = up_weight.flatten(0, 1)
    need_x, need_scores, _, need_up, need_up_bias, need_down, need_down_bias = needs
    wide = torch.promote_types(x.dtype, torch.float32)
    of_x = torch.empty_like(x, memory_format=torch.contiguous_format) if need_x else None
    of_scores = torch.empty_like(scores, memory_format=torch.contiguous_format) if need_scores else None
    of_up = torch.zeros(up.shape, dtype=wide, device=x.device) if need_up else None
    of_up_bias = x.new_zeros(leaves * width, dtype=wide) if need_up_bias else None
    of_down = torch.zeros(down.shape, dtype=wide, device=x.device) if need_down else None
    of_down_bias = torch.zeros_like(down_bias, dtype=wide) if need_down_bias else None
    for rows in _chunks(x.shape[0], leaves * width):
        of_y = gradient[rows]
        mixture = Mixture(scores[rows])
        weights = mixture.leaves.to(x.dtype)
        active = act(hidden[rows]).unflatten(1, (leaves, width))
        if kept is not None:
            active = active * kept[rows]
        # Gradient of the scaled activations.
        of_scaled = (of_y @ down.T).unflatten(1, (leaves, width))
        if of_scores is not None:
            of_weights = _sum_of_leaf(of_scaled * active, wide) + of_y @ down_bias.T
            of_scores[rows] = mixture.gradient(of_weights)
        del mixture
        if of_down is not None:
            _add_product(of_down, (active * weights.unsqueeze(2)).flatten(1), of_y)
        del active
        if of_down_bias is not None:
            _add_product(of_down_bias, weights, of_y)
        of_scaled *= weights.unsqueeze(2)
        if kept is not None:
            of_scaled *= kept[rows]
        of_hidden = act_backward(of_scaled.flatten(1), hidden[rows])
        del of_scaled
        if of_up is not None:
            _add_product(of_up, of_hidden, x[rows])
        if of_up_bias is not None:
            of_up_bias += of_hidden.sum(0, dtype=wide)
        if of_x is not None:
            torch.mm(of_hidden, up, out=of_x[rows])
    del down
    return (
        of_x,
        of_scores,
        None,
        None if of_up is None else of_up.to(x.dtype).view_as(up_weight),
        None if of_up_bias is None else of_up_bias.to(x.dtype).view_as(up_bias),
        None if of_down is None else _as_weight(of_down.to(x.dtype), leaves),
        None if of_down_bias is None else of_down_bias.to(x.dtype),
    )


def _sum_of_leaf(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`[T, L, W]` summed over W."""
    return values.squeeze(2).to(dtype) if values.shape[2] == 1 else values.sum(2, dtype=dtype)


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """`total += left.T @ right`; `total` may be wider than the factors."""
    if total.dtype == left.dtype:
        total.addmm_(left.T, right)
    else:
        total += left.T @ right


def _as_matrix(down_weight: torch.Tensor) -> torch.Tensor:
    """`[L, O, W]` as `[L W, O]`: a copy of the parameters, not of anything that grows with the tokens."""
    return down_weight.transpose(1, 2).flatten(0, 1)


def _as_weight(down: torch.Tensor, leaves: int) -> torch.Tensor:
    """The inverse of `_as_matrix`."""
    return down.unflatten(0, (leaves, -1)).transpose(1, 2).contiguous()


# Plain torch operators only, like the implementation of that name of other operations: one name asks for all of them.
IMPL = Impl(name="torch_grouped", forward=_forward, backward=_backward)
