"""BERT's task: which tokens are chosen, and what is seen in their place."""

from __future__ import annotations

import pytest
import torch

from fastffn.data.masking import Masking, mask_blocks, mask_tokens

MASKING = Masking(mask_token=3, special_tokens=(0, 3), vocabulary=1000)


def check_fates(ids: torch.Tensor, seen: torch.Tensor, chosen: torch.Tensor) -> None:
    assert torch.equal(seen[~chosen], ids[~chosen])
    masked, kept = seen[chosen] == 3, seen[chosen] == ids[chosen]
    assert float(masked.float().mean()) == pytest.approx(0.8, abs=0.02)
    assert float(kept.float().mean()) == pytest.approx(0.1, abs=0.02)


def test_masking_follows_bert() -> None:
    ids = torch.randint(10, 1000, (100, 200))
    maskable = torch.ones_like(ids, dtype=torch.bool)
    maskable[:, 0] = False
    seen, chosen = mask_tokens(ids, maskable, MASKING, generator=torch.Generator().manual_seed(7))
    assert not chosen[:, 0].any()
    assert float(chosen[:, 1:].float().mean()) == pytest.approx(0.15, abs=0.01)
    check_fates(ids, seen, chosen)
    again = mask_tokens(ids, maskable, MASKING, generator=torch.Generator().manual_seed(7))
    assert torch.equal(again[0], seen)


def test_every_block_has_as_many_to_predict() -> None:
    ids = torch.randint(10, 1000, (150, 130))
    ids[:, ::2] = 0
    seen, labels = mask_blocks(ids, MASKING, 5, 7)
    chosen = labels != -100
    assert torch.equal(chosen.sum(1), torch.full((150,), 20))  # of 19.5
    assert not chosen[:, ::2].any() and torch.equal(labels[chosen], ids[chosen])
    check_fates(ids, seen, chosen)
    # Where there are fewer others, special ones make up for them.
    ids[0, 1:-3] = 0
    few = mask_blocks(ids, MASKING)[1][0] != -100
    assert int(few.sum()) == 20 and few[-3] and few[-1]


def test_masks_of_a_block_depend_on_the_block_and_the_key_alone() -> None:
    ids = torch.randint(10, 1000, (6, 64))
    seen, labels = mask_blocks(ids, MASKING, 1, 2)
    for order in ([5, 3], [0]):
        again = mask_blocks(ids[order], MASKING, 1, 2)
        assert torch.equal(again[0], seen[order]) and torch.equal(again[1], labels[order])
    assert not torch.equal(mask_blocks(ids, MASKING, 1, 3)[1], labels)
    assert not torch.equal((labels[0] != -100), (labels[1] != -100))
