"""The tokens that a model's FFNs meet: a uniform sample of them, taken in one pass over some batches."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fastffn.errors import ConversionError, FastFFNError

# Tokens kept for each FFN: enough for statistics of a few thousand dimensions, 25 MB at 768 of them in float32.
SAMPLE = 8192

Batch = Mapping[str, Any] | torch.Tensor

# What the part of a model below its head takes as well.
_TEXT = {"input_ids", "attention_mask", "token_type_ids"}


def sample_inputs(
    model: Any, paths: Sequence[str], batches: Iterable[Batch], *, sample: int = SAMPLE, seed: int = 0
) -> dict[str, torch.Tensor]:
    """The inputs of some FFNs, for a uniform sample of the tokens in `batches`; the same tokens in every layer.

    Args:
        model: in any mode, which it keeps; the pass is made in evaluation mode.
        paths: the FFNs.
        batches: the model's inputs as mappings, or token numbers `[B, T]`. Tokens whose `attention_mask [B, T]` is 0
            are left out. Each is read once and not kept: memory does not grow with their number.
        sample: tokens to keep; all of them where there are no more.
        seed: of the sample.

    Returns:
        path -> `[S, D]`, S at most `sample`, in the model's dtype and on its devices.

    Raises:
        ConversionError: there is no token, or the model refuses a batch.
    """
    reservoir = _Reservoir(sample, seed)
    number = -1
    with evaluating(model), _listening(model, paths, reservoir), torch.no_grad():
        for number, batch in enumerate(batches):
            _run(model, batch, number, reservoir)
    if not reservoir.seen:
        what = "no batch" if number < 0 else f"{number + 1} batches without a token that counts"
        raise ConversionError(f"The calibration holds {what}; give at least one batch of the model's inputs.")
    return {path: rows[: reservoir.seen] for path, rows in reservoir.rows.items()}


def check_enough(inputs: Mapping[str, torch.Tensor]) -> None:
    """Raises ConversionError where there are fewer tokens than dimensions: they say too little of an FFN's inputs."""
    for path, rows in inputs.items():
        tokens, width = rows.shape
        if tokens < width:
            raise ConversionError(
                f"The calibration has {tokens} tokens, but {path} needs {width} at least, one for each dimension of "
                f"its input; several times as many are better. Give more batches."
            )


class _Reservoir:
    """Vitter's algorithm R: after n tokens each is kept with the same probability, `sample / n`."""

    def __init__(self, sample: int, seed: int) -> None:
        self.sample = sample
        self.seen = 0
        self.rows: dict[str, torch.Tensor] = {}
        self.wanted: torch.Tensor | None = None  # which tokens of the batch count, in any shape; None: all
        self._generator = torch.Generator().manual_seed(seed)
        self._plan: tuple[int, torch.Tensor, torch.Tensor] | None = None
        self._taken: set[str] = set()

    def begin(self, wanted: torch.Tensor | None) -> None:
        """A new batch: its plan is drawn when the first FFN says how many tokens it has."""
        self.wanted, self._plan, self._taken = wanted, None, set()

    def take(self, path: str, inputs: torch.Tensor) -> None:
        """`[..., D]`, the inputs of an FFN for the whole batch."""
        rows = inputs.detach().reshape(-1, inputs.shape[-1])
        if self._plan is None:
            self._plan = self._draw(len(rows))
        count, slots, chosen = self._plan
        if path in self._taken or len(rows) != count:
            raise ConversionError(
                f"{path} is called several times for one batch. It must get all of its tokens at once: switch off "
                "chunking (chunk_size_feed_forward = 0 in the model and its layers)."
            )
        self._taken.add(path)
        if path not in self.rows:
            self.rows[path] = rows.new_empty(self.sample, rows.shape[1])
        self.rows[path][slots.to(rows.device)] = rows[chosen.to(rows.device)]

    def _draw(self, count: int) -> tuple[int, torch.Tensor, torch.Tensor]:
        """How many rows to expect, and where which of them go."""
        wanted = torch.arange(count)
        if self.wanted is not None:
            if self.wanted.numel() != count:
                raise ConversionError(
                    f"A batch's attention_mask has {self.wanted.numel()} numbers, but the FFNs get {count} tokens at "
                    "once; the mask must be [B, T] like the tokens, and chunking off (chunk_size_feed_forward = 0)."
                )
            wanted = wanted[self.wanted.flatten().cpu() != 0]
        position = torch.arange(self.seen, self.seen + len(wanted))
        self.seen += len(wanted)
        draws = torch.rand(len(wanted), generator=self._generator, dtype=torch.float64)
        slots = torch.where(position < self.sample, position, (draws * (position + 1)).long())
        kept = slots < self.sample
        # Where a later token of the batch takes an earlier one's slot, only the later is written.
        last = dict(zip(slots[kept].tolist(), wanted[kept].tolist(), strict=True))
        return count, torch.tensor(list(last), dtype=torch.long), torch.tensor(list(last.values()), dtype=torch.long)


def _run(model: Any, batch: Batch, number: int, reservoir: _Reservoir) -> None:
    if not isinstance(batch, Mapping | torch.Tensor):
        raise ConversionError(
            f"Calibration batch {number} is a {type(batch).__name__}; it must be a mapping of the model's inputs, such "
            "as {'input_ids': ..., 'attention_mask': ...}, or a tensor of token numbers [B, T]."
        )
    inputs = batch if isinstance(batch, Mapping) else {"input_ids": batch}
    mask = inputs.get("attention_mask")
    reservoir.begin(mask if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None)
    device = next(model.parameters()).device
    moved = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    # A text alone needs no head, whose logits may cost as much as all FFNs.
    called = getattr(model, "base_model", model) if set(inputs) <= _TEXT else model
    try:
        called(**moved)
    except FastFFNError:
        raise
    except Exception as error:  # whatever a model raises for inputs that are not its own
        shapes = {name: list(v.shape) if isinstance(v, torch.Tensor) else v for name, v in inputs.items()}
        raise ConversionError(
            f"{type(model).__name__} refuses calibration batch {number} ({shapes}): {type(error).__name__}: "
            f"{' '.join(str(error).split())[:300]}"
        ) from error


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every part of the model in evaluation mode, and back in its own afterwards."""
    before = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training


@contextlib.contextmanager
def _listening(model: nn.Module, paths: Sequence[str], reservoir: _Reservoir) -> Iterator[None]:
    def listen(path: str) -> Any:
        def hook(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            reservoir.take(path, arguments[0])

        return model.get_submodule(path).register_forward_pre_hook(hook)

    handles = [listen(path) for path in paths]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
