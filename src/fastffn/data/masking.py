"""BERT's task: which tokens are to be predicted, and what the model sees in their place.

B sentences or blocks, T tokens of each
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fastffn.errors import DataError

if TYPE_CHECKING:
    from typing_extensions import Self

SHARE = 0.15


@dataclass(frozen=True)
class Masking:
    """What has to be known of a tokenizer.

    Attributes:
        mask_token: number of the mask token.
        special_tokens: those that are not chosen, unless a block has too few others.
        vocabulary: number of tokens.
    """

    mask_token: int
    special_tokens: tuple[int, ...]
    vocabulary: int

    @classmethod
    def of(cls, tokenizer: Any) -> Self:
        """That of a tokenizer.

        Raises:
            DataError: it has no mask token.
        """
        if tokenizer.mask_token_id is None:
            raise DataError(
                f"The tokenizer '{tokenizer.name_or_path}' has no mask token (mask_token), which a model of masked "
                "tokens needs."
            )
        return cls(tokenizer.mask_token_id, tuple(tokenizer.all_special_ids), len(tokenizer))

    def maskable(self, ids: torch.Tensor) -> torch.Tensor:
        """Which tokens are none of the special ones."""
        return ~torch.isin(ids, torch.tensor(self.special_tokens, device=ids.device))


def mask_tokens(
    ids: torch.Tensor, maskable: torch.Tensor, masking: Masking, *, generator: torch.Generator | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each token is chosen with a chance of 15%; of those 80% are masked, 10% become random ones, 10% stay.

    Args:
        ids: `[B, T]`; maskable: `[B, T]`, False for padding and special tokens.
        masking: see there.
        generator: of random numbers, on the device of `ids`; None: torch's own, whose state checkpoints keep.

    Returns:
        The ids that the models see, and which tokens were chosen, both `[B, T]`.
    """
    chance, fate = (torch.rand(ids.shape, device=ids.device, generator=generator) for _ in range(2))
    others = torch.randint(0, masking.vocabulary, ids.shape, device=ids.device, generator=generator)
    chosen = (chance < SHARE) & maskable
    return _seen(ids, chosen, fate, others, masking), chosen


def mask_blocks(ids: torch.Tensor, masking: Masking, *key: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As `mask_tokens`, but 15% of each block exactly: a mean over batches is then one over what is predicted.

    A block's masks depend on its tokens and on `key`, neither on its batch nor on device, process or machine.

    Args:
        ids: `[B, T]`, on any device.
        masking: see there.
        key: other numbers, other masks.

    Returns:
        The ids that the model sees, and its labels (-100 where nothing is to be predicted), both `[B, T]`.
    """
    length = ids.shape[1]
    drawn = []
    for block in ids.cpu():
        digest = hashlib.blake2b(block.numpy().tobytes() + repr(key).encode(), digest_size=7).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
        others = torch.randint(0, masking.vocabulary, (length,), generator=generator)
        drawn.append((*torch.rand(2, length, generator=generator), others))
    chance, fate, others = (torch.stack(parts).to(ids.device) for parts in zip(*drawn, strict=True))
    maskable = masking.maskable(ids)
    first = torch.where(maskable, chance, chance + 1).topk(max(1, round(SHARE * length)), largest=False).indices
    chosen = torch.zeros_like(maskable).scatter(1, first, True)
    return _seen(ids, chosen, fate, others, masking), torch.where(chosen, ids, -100)


def _seen(
    ids: torch.Tensor, chosen: torch.Tensor, fate: torch.Tensor, others: torch.Tensor, masking: Masking
) -> torch.Tensor:
    seen = torch.where(chosen & (fate < 0.8), torch.full_like(ids, masking.mask_token), ids)
    return torch.where(chosen & (fate >= 0.9), others, seen)
