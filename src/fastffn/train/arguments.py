"""The Trainer's settings: those of every run, and those of one stage of pre-training."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch

from fastffn.errors import ConfigError
from fastffn.train import processes
from fastffn.train.config import PretrainConfig
from fastffn.train.plan import Stage


def training_arguments(config: PretrainConfig, directory: Path, stage: Stage | None = None) -> Any:
    """`transformers.TrainingArguments` for a stage; without one, to learn device and precision.

    Raises:
        ConfigError: the batch does not divide among processes and micro batches; transformers lacks the optimizer.
    """
    micro, accumulation = split_batch(config, processes.count())
    steps = stage.total if stage else 1
    warmup = min(config.warmup_steps, steps // 2)
    if config.schedule == "wsd":
        schedule = "warmup_stable_decay"
        decay = max(1, round(config.decay * steps))
        warmup = min(warmup, max(0, steps - decay))
        options = {
            "num_decay_steps": decay,
            "min_lr_ratio": config.min_lr_ratio,
            "decay_type": "linear",
        }
    else:
        schedule, options = "cosine_with_min_lr", {"min_lr_rate": config.min_lr_ratio}
    return run_arguments(
        directory,
        precision=config.precision,
        micro_batch=micro,
        max_steps=steps,
        gradient_accumulation_steps=accumulation,
        learning_rate=stage.learning_rate if stage else config.learning_rate,
        lr_scheduler_type=schedule,
        lr_scheduler_kwargs=options,
        warmup_steps=warmup,
        weight_decay=config.weight_decay,
        adam_beta1=config.beta1,
        adam_beta2=config.beta2,
        max_grad_norm=config.clip,
        optim=config.optimizer,
        torch_compile=config.compile,
        seed=config.seed,
        data_seed=stage.data_seed if stage else config.seed,
        eval_steps=config.evaluate_every or max(20, steps // 20),
        save_steps=config.checkpoint_every,
        logging_steps=config.log_every,
        ddp_find_unused_parameters=False,  # none is ever unused, and looking for them takes time in each step
        **_recomputation(config.gradient_checkpointing),
    )


def run_arguments(directory: Path, *, precision: str, micro_batch: int, **settings: Any) -> Any:
    """`transformers.TrainingArguments` of a run of ours; `settings` are what runs differ in.

    Args:
        directory: for checkpoints.
        precision: `fp32`, `bf16`, `fp16`, or `auto`: bf16 on an accelerator that has it.
        micro_batch: rows at once on a device.
        settings: further arguments.
    """
    from transformers import TrainingArguments
    from transformers.training_args import OptimizerNames

    known = [optimizer.value for optimizer in OptimizerNames]
    if settings.get("optim", known[0]) not in known:
        adams = [name for name in known if name.startswith("adamw_")]
        raise ConfigError(f"optimizer is '{settings['optim']}'; transformers has {', '.join(adams)}.")
    if precision == "auto":
        precision = "bf16" if _accelerator_has_bf16() else "fp32"
    arguments = TrainingArguments(
        output_dir=str(directory),
        per_device_train_batch_size=micro_batch,
        per_device_eval_batch_size=micro_batch,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        eval_strategy="steps",
        eval_on_start=False,
        save_strategy="steps",
        save_total_limit=None,  # ours: the Trainer goes by the directories' times, and counts unfinished ones
        logging_strategy="steps",
        logging_nan_inf_filter=False,
        prediction_loss_only=True,
        dataloader_drop_last=True,
        dataloader_pin_memory=torch.accelerator.is_available(),
        use_cpu=not torch.accelerator.is_available(),  # without it bf16 is refused on a CPU
        report_to=["tensorboard"],
        disable_tqdm=True,
        **settings,
    )
    # A launcher's environment may name another precision than the run's.
    arguments.mixed_precision = "no" if precision == "fp32" else precision
    # One process uses one device; transformers would split its batches over all it sees, and count them once.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


def _recomputation(wanted: bool) -> dict[str, Any]:
    if not wanted:
        return {}
    from transformers import TrainingArguments

    # Newer versions of transformers have another name for it, and warn at the old one.
    new = "activation_checkpointing"
    name = new if new in TrainingArguments.__dataclass_fields__ else "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}}


class Batches(Protocol):
    """What a run says of its batches."""

    @property
    def batch(self) -> int:
        """Rows in an optimizer step, over all devices."""
        ...

    @property
    def micro_batch(self) -> int | None:
        """Rows on a device at once; None: all of the batch."""
        ...


def split_batch(config: Batches, count: int) -> tuple[int, int]:
    """Sequences at once on a device, and how often before an optimizer step, with `count` processes.

    Raises:
        ConfigError: the batch does not divide.
    """
    if config.micro_batch is None and config.batch % count == 0:
        return config.batch // count, 1
    micro = config.micro_batch or 1
    if config.batch % (micro * count):
        raise ConfigError(
            f"batch is {config.batch}; {count} processes of micro_batch {micro} do not divide it. A batch is what all "
            f"processes see in a step; the next that fits is {-(-config.batch // (micro * count)) * micro * count}."
        )
    return micro, config.batch // (micro * count)


def _accelerator_has_bf16() -> bool:
    from transformers.utils.import_utils import is_torch_bf16_gpu_available

    return bool(torch.accelerator.is_available() and is_torch_bf16_gpu_available())
