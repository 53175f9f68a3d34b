"""A look at what a model has learned, on held-out text."""

from __future__ import annotations

from typing import Any

import torch

from fastffn.data.masking import Masking, mask_blocks


@torch.no_grad()
def continuation(model: Any, tokenizer: Any, block: list[int], seed: int) -> dict[str, str]:
    """`prompt`, the beginning of a block, and `continuation`, 64 tokens at most that a causal model puts after it."""
    from transformers import set_seed

    length = max(1, min(32, len(block) // 4))
    ids = torch.tensor([block[:length]], device=model.device)
    set_seed(seed)
    generated = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=min(64, len(block) - length),
        do_sample=True,
        top_k=50,
        use_cache=True,
        pad_token_id=tokenizer.eos_token_id,
    )
    return {
        "prompt": tokenizer.decode(block[:length]),
        "continuation": tokenizer.decode(generated[0, length:].tolist()),
    }


@torch.no_grad()
def filled(model: Any, tokenizer: Any, block: list[int], masking: Masking) -> dict[str, str]:
    """`masked`, 64 tokens of a block at most, and `filled`, the same with the likeliest tokens in the masks' place."""
    ids = torch.tensor([block[:64]])
    _, labels = mask_blocks(ids, masking)
    seen = torch.where(labels == -100, ids, masking.mask_token).to(model.device)
    best = model(input_ids=seen).logits.argmax(-1)
    answer = torch.where(seen == masking.mask_token, best, seen)
    return {"masked": tokenizer.decode(seen[0].tolist()), "filled": tokenizer.decode(answer[0].tolist())}
