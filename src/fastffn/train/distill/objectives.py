"""What each phase minimises, given student, teacher and a batch.

A batch holds `input_ids [B, T]` and, where sequences differ in length, `attention_mask [B, T]`. Sums over a held-out
text are kept as pairs of numerator and denominator, so that every token counts alike whatever the batches.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from fastffn.convert.match import fastffn_modules
from fastffn.data.masking import Masking, mask_tokens
from fastffn.nn import auxiliary_loss
from fastffn.train.distill import losses
from fastffn.train.distill.models import InputsOf, Task, dense_ffns, lm_features, lm_head

Batch = dict[str, torch.Tensor]
Sums = dict[str, tuple[float, float]]


class Shown(NamedTuple):
    """What both models see of a batch, which tokens count, `[B, T]`, and which of those are to be predicted."""

    inputs: Batch
    real: torch.Tensor
    predicted: torch.Tensor


class Objective(ABC):
    """Base of the objectives.

    Args:
        teacher: frozen.
        masking: for masked language models.
    """

    def __init__(self, teacher: Any, masking: Masking | None = None) -> None:
        self.teacher = teacher
        self.masking = masking

    def shown(self, batch: Batch, generator: torch.Generator | None = None) -> Shown:
        """The inputs of both models; a masked language model's are masked anew each time."""
        ids = batch["input_ids"]
        real = batch["attention_mask"].bool() if "attention_mask" in batch else torch.ones_like(ids, dtype=torch.bool)
        if self.masking is None:
            return Shown(batch, real, real)
        seen, chosen = mask_tokens(ids, real & self.masking.maskable(ids), self.masking, generator=generator)
        return Shown(batch | {"input_ids": seen}, real, chosen)

    @abstractmethod
    def loss(self, student: Any, batch: Batch) -> torch.Tensor:
        """The training loss, a scalar with a gradient; what the kinds ask for beside it is in it."""

    @abstractmethod
    def sums(self, student: Any, batch: Batch, generator: torch.Generator | None = None) -> Sums:
        """What `metrics` wants to know of a batch of held-out text. Masks are drawn with `generator`."""

    @abstractmethod
    def metrics(self, sums: Sums) -> dict[str, float]:
        """Of the sums of all batches: `loss`, without what the kinds ask for, and what else there is to know."""


class FFNRegression(Objective):
    """Each FFN of the student computes what the teacher's dense one does, on what the teacher's is given.

    The loss: the mean over FFNs of the squared error over the squares of the dense one's outputs. No padding counts.
    """

    def __init__(self, teacher: Any, masking: Masking | None, paths: list[str]) -> None:
        super().__init__(teacher, masking)
        self.dense = dense_ffns(teacher, paths)

    def _errors(
        self, student: Any, batch: Batch, generator: torch.Generator | None = None
    ) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        shown = self.shown(batch, generator)
        with torch.no_grad(), InputsOf(self.teacher, list(self.dense)) as found:
            self.teacher.base_model(**shown.inputs)  # no logits are needed
        ffns = dict(fastffn_modules(student))
        errors = {}
        for path, dense in self.dense.items():
            x = found[path][shown.real]
            with torch.no_grad():
                wanted = dense(x)
            errors[path] = losses.squared_error(ffns[path](x), wanted)
        return errors

    def loss(self, student: Any, batch: Batch) -> torch.Tensor:
        """See `Objective.loss`."""
        errors = self._errors(student, batch)
        total = torch.stack([error / size for error, size in errors.values()]).sum() + auxiliary_loss(student)
        return total / len(errors)

    @torch.no_grad()
    def sums(self, student: Any, batch: Batch, generator: torch.Generator | None = None) -> Sums:
        """See `Objective.sums`; one pair for each FFN, by its path."""
        errors = self._errors(student, batch, generator)
        return {path: (float(error), float(size)) for path, (error, size) in errors.items()}

    def metrics(self, sums: Sums) -> dict[str, float]:
        """`loss`, the mean, and each FFN's error by its path."""
        errors = {path: error / size for path, (error, size) in sums.items()}
        return {"loss": sum(errors.values()) / len(errors)} | errors


class LogitDistance(Objective):
    """KL(teacher || student) of token distributions; beside it, if asked, the cross-entropy with the text.

    Causal models: of every token. Masked ones: of the tokens that were chosen.
    """

    def __init__(
        self, teacher: Any, masking: Masking | None, *, temperature: float = 1.0, text_weight: float = 0.0
    ) -> None:
        super().__init__(teacher, masking)
        self.temperature = temperature
        self.text_weight = text_weight
        lm_head(teacher)

    def _targets(self, shown: Shown, ids: torch.Tensor) -> torch.Tensor:
        """The text's own token at each place that is predicted, `[N]`; -100 where the text has none."""
        targets = ids
        if self.masking is None:
            targets = torch.full_like(ids, -100)
            targets[:, :-1] = torch.where(shown.real[:, 1:], ids[:, 1:], -100)
        return targets[shown.predicted]

    def loss(self, student: Any, batch: Batch) -> torch.Tensor:
        """See `Objective.loss`."""
        shown = self.shown(batch)
        with torch.no_grad():
            wanted = lm_features(self.teacher, shown.inputs)[shown.predicted]
        features = lm_features(student, shown.inputs)[shown.predicted]
        extra = auxiliary_loss(student)
        targets = self._targets(shown, batch["input_ids"])
        tokens, texts = len(targets), int((targets != -100).sum())
        ours, theirs = lm_head(student), lm_head(self.teacher)

        def share(logits: torch.Tensor, rows: slice) -> torch.Tensor:
            with torch.no_grad():
                goal = theirs(wanted[rows])
            # Squared, the temperature does not change how large gradients are.
            part = losses.divergence(logits, goal, self.temperature).sum() * (self.temperature**2 / tokens)
            if self.text_weight:
                nats = F.cross_entropy(logits.float(), targets[rows], reduction="sum", ignore_index=-100)
                part = part + nats * (self.text_weight / texts)
            return part

        return losses.chunked_loss(features, ours.weight, ours.bias, share) + extra

    @torch.no_grad()
    def sums(self, student: Any, batch: Batch, generator: torch.Generator | None = None) -> Sums:
        """See `Objective.sums`."""
        shown = self.shown(batch, generator)
        features = [lm_features(model, shown.inputs)[shown.predicted] for model in (student, self.teacher)]
        heads = [lm_head(model) for model in (student, self.teacher)]
        targets = self._targets(shown, batch["input_ids"])
        found = dict.fromkeys(("kl", "kl_at_temperature", "student_nats", "teacher_nats"), 0.0)
        for rows in losses.chunks(len(targets), heads[0].weight.shape[0]):
            ours, theirs = (head(x[rows]).float() for head, x in zip(heads, features, strict=True))
            found["kl"] += float(losses.divergence(ours, theirs).sum())
            if self.temperature != 1:
                found["kl_at_temperature"] += float(losses.divergence(ours, theirs, self.temperature).sum())
            for name, scores in (("student_nats", ours), ("teacher_nats", theirs)):
                found[name] += float(F.cross_entropy(scores, targets[rows], reduction="sum", ignore_index=-100))
        if self.temperature == 1:
            found["kl_at_temperature"] = found["kl"]
        tokens, texts = len(targets), int((targets != -100).sum())
        return {name: (value, texts if name.endswith("nats") else tokens) for name, value in found.items()}

    def metrics(self, sums: Sums) -> dict[str, float]:
        """`loss`; `kl` at temperature 1; nats a token of the text for the student and the teacher."""
        found = {name: value / max(1, count) for name, (value, count) in sums.items()}
        soft = self.temperature**2 * found.pop("kl_at_temperature")
        return {"loss": soft + self.text_weight * found["student_nats"]} | found


class StateDistance(Objective):
    """For encoders without a head: how far last hidden states, and the sentences' mean-pooled ones, are apart.

    The loss is the normalised squared error over unpadded tokens, plus the mean cosine distance of sentences.
    """

    def _found(self, student: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        shown = self.shown(batch)
        with torch.no_grad():
            wanted = self.teacher.base_model(**shown.inputs).last_hidden_state
        states = student.base_model(**shown.inputs).last_hidden_state
        error, size = losses.squared_error(states[shown.real], wanted[shown.real])
        pooled = (losses.mean_pooled(x, shown.real) for x in (states, wanted))
        return error, size, losses.cosine_distance(*pooled)

    def loss(self, student: Any, batch: Batch) -> torch.Tensor:
        """See `Objective.loss`."""
        error, size, distances = self._found(student, batch)
        return error / size + distances.mean() + auxiliary_loss(student)

    @torch.no_grad()
    def sums(self, student: Any, batch: Batch, generator: torch.Generator | None = None) -> Sums:
        """See `Objective.sums`."""
        error, size, distances = self._found(student, batch)
        return {
            "token_error": (float(error), float(size)),
            "sentence_distance": (float(distances.sum()), len(distances)),
        }

    def metrics(self, sums: Sums) -> dict[str, float]:
        """`loss` and its two parts, `token_error` and `sentence_distance`."""
        found = {name: value / count for name, (value, count) in sums.items()}
        return {"loss": sum(found.values())} | found


def end_to_end(
    task: Task, teacher: Any, masking: Masking | None, *, temperature: float, text_weight: float
) -> Objective:
    """The objective of the second phase."""
    if task == "states":
        return StateDistance(teacher)
    return LogitDistance(teacher, masking, temperature=temperature, text_weight=text_weight)
