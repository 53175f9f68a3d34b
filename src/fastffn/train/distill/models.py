"""Student and teacher: loaded, checked against each other, and made ready for a phase."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from fastffn.convert import match
from fastffn.convert.io import QUANT_METHOD, described_in, undescribe
from fastffn.convert.loading import is_causal, load_model, model_class_of, read_config
from fastffn.convert.select import enumerated
from fastffn.errors import CheckpointError, ConversionError, KindError
from fastffn.nn import FFNConfig
from fastffn.registry import kind_of

Task = Literal["causal", "masked", "states"]
# What student and teacher must agree in, under transformers' common names.
_SAME = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")


@dataclass(frozen=True)
class Pair:
    """What is known of two checkpoints before their weights are read.

    Attributes:
        student, teacher: their directories.
        architecture: the class of both in transformers.
        task: `causal` and `masked` language models are compared by logits, others by their last hidden states.
        config: the student's configuration.
    """

    student: Path
    teacher: Path
    architecture: Any
    task: Task
    config: Any

    def load_student(self, directory: Path | None = None) -> Any:
        """The student, or what has become of it in another directory; in float32, so that small steps count.

        Raises:
            CheckpointError: weights are missing or corrupt.
        """
        model = load_model(self.architecture, directory or self.student, dtype=torch.float32)
        model.config.use_cache = False
        return model

    def load_teacher(self) -> Any:
        """The teacher, frozen."""
        model = load_model(self.architecture, self.teacher, dtype=torch.float32)
        model.config.use_cache = False
        return model.eval().requires_grad_(False)


def find_pair(student: Path, teacher: Path) -> Pair:
    """Reads and compares two checkpoints' configurations.

    Raises:
        CheckpointError: one is missing, or they do not belong together.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    values = {path: read_config(path) for path in (student, teacher)}
    kinds = {path: (given.get("quantization_config") or {}).get("quant_method") for path, given in values.items()}
    if kinds[student] != QUANT_METHOD:
        raise CheckpointError(
            f"The student {student} holds no FastFFN kinds (its config.json has no quantization_config of method "
            f"'{QUANT_METHOD}'): there is nothing to recover. Convert a model first, and save it."
        )
    described = described_in(values[student], str(student))
    found = [undescribe(value) for value in (described.ffn, *described.layers.values()) if value is not None]
    if not any(config.TRAINS for config in found):
        raise _nothing_learns(found)
    if kinds[teacher] is not None:
        raise CheckpointError(
            f"The teacher {teacher} is not dense (its config.json has a quantization_config of method "
            f"'{kinds[teacher]}'). Name the dense checkpoint that the student was converted from."
        )
    names = {path: (given.get("architectures") or [None])[0] for path, given in values.items()}
    if names[student] != names[teacher]:
        raise CheckpointError(
            f"The student {student} is a {names[student]}, the teacher {teacher} a {names[teacher]}; they must be of "
            "one architecture."
        )
    architecture = model_class_of(values[student], student)
    config, other = (architecture.config_class.from_pretrained(path) for path in (student, teacher))
    for field in _SAME:
        here, there = getattr(config, field, None), getattr(other, field, None)
        if here != there:
            raise CheckpointError(
                f"{field} is {here} in the student {student} and {there} in the teacher {teacher}; name the dense "
                "checkpoint that the student was converted from."
            )
    task: Task = "states"
    if is_causal(architecture.__name__):
        task = "causal"
    elif architecture.__name__ in MODEL_FOR_MASKED_LM_MAPPING_NAMES.values():
        task = "masked"
    return Pair(student, teacher, architecture, task, config)


def dense_ffns(teacher: Any, paths: list[str]) -> dict[str, nn.Module]:
    """The teacher's FFN at each path as a function `[N, D] -> [N, O]`, frozen.

    Raises:
        CheckpointError: the teacher has no FFN at a path.
    """
    family = match.family_of(teacher.config)
    found: dict[str, nn.Module] = {}
    for path in paths:
        try:
            dense = family.to_dense(teacher, path)
        except (AttributeError, ConversionError) as error:
            raise CheckpointError(f"The teacher has no FFN at {path}, where the student has one ({error}).") from error
        found[path] = dense.eval().requires_grad_(False)
    return found


class InputsOf:
    """Records what the modules at some paths of a model are given, while it is a context.

    with InputsOf(teacher, paths) as inputs:
        teacher(ids)
    inputs["transformer.h.0.mlp"]  # [B, T, D]
    """

    def __init__(self, model: nn.Module, paths: list[str]) -> None:
        self._model = model
        self._paths = paths
        self._handles: list[Any] = []

    def __enter__(self) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        for path in self._paths:

            def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], path: str = path) -> None:
                found[path] = args[0] if args else next(iter(kwargs.values()))

            module = self._model.get_submodule(path)
            self._handles.append(module.register_forward_pre_hook(keep, with_kwargs=True))
        return found

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()


def lm_head(model: Any) -> nn.Linear:
    """The last layer of a language model, which makes logits of features.

    Raises:
        CheckpointError: the model has none that is a linear layer.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise CheckpointError(
            f"{type(model).__name__} has no linear layer at its end ({type(head).__name__}): it cannot be distilled by "
            "its logits. Save its encoder alone, such as BertModel."
        )
    return head


def lm_features(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """What a language model's last layer is given, `[B, T, D]`: the logits are left for `chunked_loss` to make."""
    head: Any = lm_head(model)
    head.forward = lambda features: features
    try:
        features: torch.Tensor = model(**inputs).logits
    finally:
        del head.forward
    return features


def ffn_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Parameters of all FastFFN modules."""
    for _, module in match.fastffn_modules(model):
        yield from module.parameters()


def _nothing_learns(configs: Sequence[FFNConfig]) -> KindError:
    kinds = sorted({kind_of(config).name for config in configs})
    return KindError(
        f"The student's FFNs are of kind {enumerated(kinds)}, whose weights do not learn: there is nothing to recover. "
        "Distill a student of another kind; what comes out can be merged, and converted to this one last."
    )


def choose_trainable(model: nn.Module, trainable: str) -> None:
    """Lets gradients reach all of a model, or only its FastFFN modules (`ffn`)."""
    own = list(ffn_parameters(model))
    if not own:
        raise _nothing_learns([module.config for _, module in match.fastffn_modules(model)])
    model.requires_grad_(trainable == "all")
    for parameter in own:
        parameter.requires_grad_(True)


def make_ready(student: nn.Module) -> None:
    """Training mode for the FastFFN modules, whose soft or noisy forms learn; no dropout anywhere.

    The teacher's outputs are without: dropout in the student would only be noise in the difference.
    """
    student.eval()
    for _, ffn in match.fastffn_modules(student):
        ffn.train()
        for module in ffn.modules():
            if isinstance(module, nn.Dropout):
                module.eval()
