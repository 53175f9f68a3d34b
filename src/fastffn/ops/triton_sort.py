"""Tokens sorted by the number of their group: on the device, stable, without waiting for it.

A counting sort in three launches. T tokens in blocks of `BLOCK`, S groups, P sorts side by side:

    count    [P, blocks, S]: how many tokens of each group a block has
    scan     the same, but how many lie before the block; and where each group starts and ends
    scatter  a token goes to start of its group + those of the group in earlier blocks + those before it in its block

Integers only, every place is written once: always the same result.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastffn.ops.triton import FUSED, ceil_div, power_of_two

BLOCK = 128
# With more groups the table of counts is larger than what it sorts: torch's sort takes over.
MOST_GROUPS = 4096
# Groups, and blocks, that the scan takes at a time.
SCAN_GROUPS, SCAN_BLOCKS = 64, 64


class Sorted(NamedTuple):
    """The tokens of each group side by side.

    Attributes:
        order: `[P, T]`, which token stands at each place. int32.
        starts, ends: `[P, S]`, the places of each group. int32.
        tile_ends: `[P, S]`: if each group is cut into tiles of so many tokens as was asked, how many tiles there are
            up to its last. int32.
    """

    order: torch.Tensor
    starts: torch.Tensor
    ends: torch.Tensor
    tile_ends: torch.Tensor


@triton.jit
def _count(keys, counts, tokens, groups, BLOCK: tl.constexpr, GROUPS: tl.constexpr):
    """Grid [blocks, P]."""
    block, sort = tl.program_id(0), tl.program_id(1).to(tl.int64)
    token = block * BLOCK + tl.arange(0, BLOCK)
    inside = token < tokens
    key = tl.load(keys + sort * tokens + token, mask=inside, other=0)
    number = tl.histogram(key, GROUPS, mask=inside)
    group = tl.arange(0, GROUPS)
    tl.store(counts + (sort * tl.num_programs(0) + block) * groups + group, number, mask=group < groups)


@triton.jit
def _scan(counts, starts, ends, tile_ends, blocks, groups, TILE: tl.constexpr, G: tl.constexpr, B: tl.constexpr):
    """Grid [P]. `counts` becomes how many of a group lie in earlier blocks."""
    sort = tl.program_id(0).to(tl.int64)
    counts += sort * blocks * groups
    start = tl.zeros([], tl.int32)
    tiles = tl.zeros([], tl.int32)
    for first in range(0, groups, G):
        group = first + tl.arange(0, G)
        known = group < groups
        total = tl.zeros([G], tl.int32)
        for first_block in range(0, blocks, B):
            block = first_block + tl.arange(0, B)
            at = counts + block[:, None] * groups + group[None, :]
            mask = (block[:, None] < blocks) & known[None, :]
            number = tl.load(at, mask=mask, other=0)
            tl.store(at, total[None, :] + tl.cumsum(number, 0) - number, mask=mask)
            total += tl.sum(number, 0)
        end = start + tl.cumsum(total, 0)
        tl.store(starts + sort * groups + group, end - total, mask=known)
        tl.store(ends + sort * groups + group, end, mask=known)
        full = (total + TILE - 1) // TILE
        tl.store(tile_ends + sort * groups + group, tiles + tl.cumsum(full, 0), mask=known)
        start += tl.sum(total, 0)
        tiles += tl.sum(full, 0)


@triton.jit
def _scatter(keys, counts, starts, order, tokens, groups, BLOCK: tl.constexpr):
    """Grid [blocks, P]."""
    block, sort = tl.program_id(0), tl.program_id(1).to(tl.int64)
    keys += sort * tokens
    place = tl.arange(0, BLOCK)
    token = block * BLOCK + place
    inside = token < tokens
    key = tl.load(keys + token, mask=inside, other=-1)
    # The same numbers, lying along the other axis of a table of who precedes whom.
    other = tl.arange(0, BLOCK)
    other_key = tl.load(keys + block * BLOCK + other, mask=block * BLOCK + other < tokens, other=-2)
    before = (other_key[None, :] == key[:, None]) & (other[None, :] < place[:, None])
    rank = tl.sum(before.to(tl.int32), 1)
    earlier = tl.load(counts + (sort * tl.num_programs(0) + block) * groups + key, mask=inside, other=0)
    start = tl.load(starts + sort * groups + key, mask=inside, other=0)
    tl.store(order + sort * tokens + start + earlier + rank, token, mask=inside)


@triton.jit
def group_of(tile, tile_ends, groups, GROUPS: tl.constexpr):
    """The group that a tile belongs to, and which of its tiles it is; the number of groups for a tile too many."""
    number = tl.arange(0, GROUPS)
    end = tl.load(tile_ends + number, mask=number < groups, other=2147483647)
    group = tl.sum((end <= tile).to(tl.int32), 0)
    before = tl.max(tl.where(end <= tile, end, 0), 0)
    return group, tile - before


def tiles_at_most(tokens: int, groups: int, tile: int) -> int:
    """How many tiles there can be: each group may leave one that is not full."""
    return tokens // tile + min(groups, tokens)


def sort_by_group(keys_PT: torch.Tensor, groups: int, tile: int) -> Sorted:
    """Sorts tokens by group.

    Args:
        keys_PT: `[P, T]` int32, from 0 to `groups - 1`.
        groups: S.
        tile: tokens of a tile, for `tile_ends`.
    """
    sorts, tokens = keys_PT.shape
    starts, ends, tile_ends = (keys_PT.new_empty(sorts, groups) for _ in range(3))
    if groups > MOST_GROUPS:
        return _by_torch(keys_PT, groups, tile)
    order = torch.empty_like(keys_PT)
    blocks = ceil_div(tokens, BLOCK)
    counts = keys_PT.new_empty(sorts, blocks, groups)
    _count[(blocks, sorts)](
        keys_PT, counts, tokens, groups, BLOCK=BLOCK, GROUPS=power_of_two(groups), num_warps=4, **FUSED
    )
    _scan[(sorts,)](
        counts, starts, ends, tile_ends, blocks, groups, TILE=tile, G=SCAN_GROUPS, B=SCAN_BLOCKS, num_warps=4, **FUSED
    )
    _scatter[(blocks, sorts)](keys_PT, counts, starts, order, tokens, groups, BLOCK=BLOCK, num_warps=4, **FUSED)
    return Sorted(order, starts, ends, tile_ends)


def _by_torch(keys_PT: torch.Tensor, groups: int, tile: int) -> Sorted:
    keys, order = torch.sort(keys_PT, dim=1, stable=True)
    numbers = torch.arange(groups, dtype=torch.int32, device=keys.device).expand(len(keys), groups).contiguous()
    starts = torch.searchsorted(keys, numbers, out_int32=True)
    ends = torch.searchsorted(keys, numbers, right=True, out_int32=True)
    tiles = ((ends - starts + tile - 1) // tile).cumsum(1, dtype=torch.int32)
    return Sorted(order.int(), starts, ends, tiles)


def from_ends(order_T: torch.Tensor, ends_S: torch.Tensor, tile: int) -> Sorted:
    """What `sort_by_group` returned, from its order and the ends of its groups but for the last, which ends at T."""
    tokens = order_T.new_full((1,), len(order_T), dtype=torch.int32)
    ends = torch.cat([ends_S, tokens])
    starts = torch.cat([torch.zeros_like(tokens), ends_S])
    tiles = ((ends - starts + tile - 1) // tile).cumsum(0, dtype=torch.int32)
    return Sorted(order_T.int()[None], starts[None], ends[None], tiles[None])
