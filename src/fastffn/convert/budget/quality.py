"""How far a model is from what it was, on held-out text; and the budget that this is held against."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from fastffn.convert.calibration import Batch, evaluating
from fastffn.convert.loading import is_causal
from fastffn.errors import ConfigError, ConversionError

# Numbers of the dense model's predictions that are kept to compare with: 256 MB.
KEPT = 2**26
# Held-out tokens that tell the damage of a change of one FFN: distances from the dense model waver less than losses.
PROBED = 1024


class Quality(NamedTuple):
    """What a model is worth.

    Attributes:
        value: of a language model its loss in nats a token, of an encoder the mean cosine of its embeddings and the
            dense model's.
        damage: distance from the dense model, 0 for itself: mean KL divergence of the predictions in nats, or one less
            the cosine. It grows with the square of small errors, so those of several layers may be added up.
    """

    value: float
    damage: float


@dataclass(frozen=True)
class Budget:
    """What may be lost; one of the two.

    Args:
        max_loss_increase: part of the dense model's loss, such as 0.02; for causal language models.
        min_similarity: mean cosine of the embeddings and the dense model's, such as 0.99; for encoders.

    Raises:
        ConfigError: none or both are given, or one is out of range.
    """

    max_loss_increase: float | None = None
    min_similarity: float | None = None

    def __post_init__(self) -> None:
        """Checks the fields."""
        if (self.max_loss_increase is None) == (self.min_similarity is None):
            raise ConfigError("A budget is max_loss_increase or min_similarity; give one of them.")
        if self.max_loss_increase is not None and not 0 < self.max_loss_increase < 100:
            raise ConfigError(f"max_loss_increase is {self.max_loss_increase}; it must be above 0, such as 2% or 0.02.")
        if self.min_similarity is not None and not 0 < self.min_similarity < 1:
            raise ConfigError(f"min_similarity is {self.min_similarity}; it must be between 0 and 1, such as 0.99.")

    def allows(self, dense: Quality, now: Quality) -> bool:
        """Whether a model may become so."""
        if self.max_loss_increase is not None:
            return now.value <= dense.value * (1 + self.max_loss_increase)
        assert self.min_similarity is not None
        return now.value >= self.min_similarity

    def meter(self, model: Any, batches: Iterable[Batch]) -> Meter:
        """What measures it on a model, which is still dense.

        Raises:
            ConversionError: the model is none of the sort that the budget is made for, or the text has too few tokens.
        """
        causal = any(is_causal(kind.__name__) for kind in type(model).__mro__)
        if self.max_loss_increase is not None and not causal:
            raise ConversionError(
                f"{type(model).__name__} is no causal language model, whose loss could be measured on plain text; give "
                "min_similarity, which compares embeddings."
            )
        return (LossMeter if self.max_loss_increase is not None else SimilarityMeter)(model, batches)

    def __str__(self) -> str:
        if self.max_loss_increase is not None:
            return f"a loss at most {100 * self.max_loss_increase:.4g} % higher"
        return f"a similarity of at least {self.min_similarity}"


def _masked(batch: Batch) -> dict[str, torch.Tensor]:
    inputs = dict(batch) if isinstance(batch, Mapping) else {"input_ids": batch}
    ids = inputs.get("input_ids")
    if not isinstance(ids, torch.Tensor) or ids.ndim != 2:
        given = f"a mapping of {', '.join(map(str, inputs)) or 'nothing'}"
        if ids is not None:
            given = f"numbers of shape {list(ids.shape)}" if isinstance(ids, torch.Tensor) else type(ids).__name__
        raise ConversionError(
            f"A held-out batch is {given}; give token numbers [B, T], or a mapping with input_ids [B, T] and, where "
            "there is padding, attention_mask."
        )
    return {"attention_mask": torch.ones_like(ids)} | inputs


class Meter(ABC):
    """Measures a model against what it is now, on batches that are kept.

    Args:
        model: still dense; measured again as often as asked, whatever has become of it.
        batches: token numbers `[B, T]`, or mappings of them (`input_ids`) and, where there is padding,
            `attention_mask`.

    Attributes:
        dense: the model's quality at the start.
        tokens: how many it is measured on.
    """

    dense: Quality

    def __init__(self, model: Any, batches: Iterable[Batch]) -> None:
        self.model = model
        self.batches = [_masked(batch) for batch in batches]
        self.tokens = sum(int(batch["attention_mask"].sum()) for batch in self.batches)
        if self.tokens < 2:
            raise ConversionError(f"The held-out text has {self.tokens} tokens; quality is measured on some thousands.")

    @abstractmethod
    def measure(self, tokens: int | None = None) -> Quality:
        """The model's quality now; on the sequences that hold the first `tokens`, all if None."""

    def _sequences(self, tokens: int | None) -> Iterator[dict[str, torch.Tensor]]:
        """One at a time: the logits of a batch may be large."""
        device = next(self.model.parameters()).device
        read = 0
        for batch in self.batches:
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
                if tokens is not None and read >= tokens:
                    return
                kept = mask.bool()  # padding may be on either side
                read += int(kept.sum())
                yield {"input_ids": ids[kept][None].to(device), "attention_mask": mask[kept][None].to(device)}


class LossMeter(Meter):
    """The loss of a causal language model, and how far its predictions are from the dense model's."""

    def __init__(self, model: Any, batches: Iterable[Batch]) -> None:
        super().__init__(model, batches)
        positions = max(1, KEPT // model.config.vocab_size)
        self._every = -(-self.tokens // positions)
        self._kept: list[torch.Tensor] = []
        self._kept, loss = self._run(None)
        self.dense = Quality(loss, 0.0)

    @torch.no_grad()
    def measure(self, tokens: int | None = None) -> Quality:
        """See `Meter.measure`."""
        now, loss = self._run(tokens)
        pairs = zip(self._kept[: len(now)], now, strict=True)
        divergence = sum(float(F.kl_div(new, old, log_target=True, reduction="sum")) for old, new in pairs)
        return Quality(loss, divergence / max(1, sum(map(len, now))))

    @torch.no_grad()
    def _run(self, tokens: int | None) -> tuple[list[torch.Tensor], float]:
        """Log-probabilities of every so many positions of each sequence; and the loss."""
        kept, loss, scored = [], 0.0, 0
        with evaluating(self.model):
            for sequence in self._sequences(tokens):
                logits = self.model(**sequence).logits[0, :-1].float()
                wanted = sequence["input_ids"][0, 1:]
                loss += float(F.cross_entropy(logits, wanted, reduction="sum"))
                scored += len(wanted)
                kept.append(logits[:: self._every].log_softmax(1))
        return kept, loss / max(1, scored)


class SimilarityMeter(Meter):
    """The cosine of embeddings and the dense model's: the mean of the last hidden states over a sequence's tokens."""

    def __init__(self, model: Any, batches: Iterable[Batch]) -> None:
        super().__init__(model, batches)
        self._kept = self._run(None)
        self.dense = Quality(1.0, 0.0)

    def measure(self, tokens: int | None = None) -> Quality:
        """See `Meter.measure`."""
        now = self._run(tokens)
        similarity = float(F.cosine_similarity(now, self._kept[: len(now)], dim=1).mean())
        return Quality(similarity, 1 - similarity)

    @torch.no_grad()
    def _run(self, tokens: int | None) -> torch.Tensor:
        body = getattr(self.model, "base_model", self.model)
        with evaluating(self.model):
            states = [body(**sequence).last_hidden_state[0].float().mean(0) for sequence in self._sequences(tokens)]
        return torch.stack(states)
