"""The weight transform with its proof: merge a checkpoint, then compare logits before it takes its name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fastffn.convert.checkpoint import merge_checkpoint
from fastffn.convert.files import new_directory
from fastffn.convert.loading import load_model, longest_sequence, model_class_of, read_config
from fastffn.errors import CheckpointError


def merge_and_compare(source: Path, target: Path, *, check: bool = True) -> dict[str, Any]:
    """Merges `source` into the new directory `target`; see `merge_checkpoint`.

    Args:
        source: a checkpoint with factors.
        target: directory to create.
        check: load both models, one after the other, and compare their logits (hidden states, of a model without a
            head) on random tokens.

    Returns:
        Layers, parameters, and with `check` the largest difference of two logits and the largest logit.

    Raises:
        CheckpointError: the merged model is not the same function; `target` is not created then.
    """
    with new_directory(target) as partial:
        merged = merge_checkpoint(source, partial).summary()
        if check:
            before, after = output_on_random_tokens(source), output_on_random_tokens(partial)
            difference = float((before - after).abs().max())
            largest = float(before.abs().max())
            # Generous to half precision, where factors and product round differently; a wrong tensor is far outside.
            if not difference <= 0.05 * largest:
                raise CheckpointError(
                    f"The merged model's logits differ from those of {source} by up to {difference:.3g} (largest logit "
                    f"{largest:.3g}): it is not the same function. {target} was not written."
                )
            merged |= {"largest_difference": difference, "largest_logit": largest}
    return merged


@torch.no_grad()
def output_on_random_tokens(checkpoint: Path, tokens: int = 64) -> torch.Tensor:
    """What a model of the architecture that the checkpoint names puts out first, in float32, on fixed random tokens."""
    model = load_model(model_class_of(read_config(checkpoint), checkpoint), checkpoint).eval()
    limit = longest_sequence(model.config) or tokens
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (1, max(1, min(tokens, limit))), generator=generator)
    output: torch.Tensor = model(input_ids=ids)[0].float()
    return output
