"""Every field of a pre-training run, its meaning, its default, and the presets."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_type_hints

from fastffn.convert.architectures import DEFAULT, get_architecture
from fastffn.convert.fresh import ModelShape
from fastffn.convert.match import family_named
from fastffn.data.tokenizer import SMALLEST, training_size
from fastffn.errors import ConfigError, KindError, did_you_mean
from fastffn.nn import DenseConfig, FFNConfig
from fastffn.ops.activations import get_activation
from fastffn.registry import get_kind, kinds

if TYPE_CHECKING:
    from typing_extensions import Self


def _field(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """A pre-training run: a language model in stages, and a dense one beside it.

    The defaults are a small model's on a text that every machine has, all parts at one learning rate; presets differ in
    what they name. Options of the FFN kind (`rank`, `start`, ...) are in `ffn_options`; flags and YAML files give them
    like any other field.
    """

    # Text
    data: str = _field("python-docs", "file, folder, glob, data set name or directory, or python-docs")
    validation: str | None = _field(None, "text to validate on; default: held out from the data")
    validation_fraction: float = _field(0.05, "part of the data that is held out where there is no validation text")
    validation_blocks: int = _field(256, "sequences to validate on at most, spread over the validation text")
    text_column: str = _field("text", "column or key that holds the text, where there are such")
    document_separator: str | None = _field(
        "<|endoftext|>", "line that ends a document in text files; 'blank': blank lines; empty: a file is a document"
    )
    tokenizer: str = _field("train:4096", "directory or hub name, or train:N for a byte-level BPE of N tokens")
    vocabulary: int | None = _field(None, "number of tokens that the tokenizer must have; default: as many as it has")
    # Model
    architecture: str | None = _field(
        None, "gpt2, which predicts the next token, or bert, which predicts masked ones; default: gpt2"
    )
    init_from: str | None = _field(None, "dense checkpoint to start from instead of random weights; fixes the shape")
    layers: int = _field(4, "Transformer blocks")
    d_model: int = _field(256, "width of the model")
    heads: int = _field(4, "attention heads")
    d_hidden: int | None = _field(None, "width inside the FFN; default: 4 d_model")
    sequence: int = _field(256, "tokens in a sequence")
    activation: str = _field("gelu_pytorch_tanh", "activation of the FFN (GPT-2's GELU, computed by one kernel)")
    dropout: float = _field(0.0, "dropout on embeddings, attention and residuals")
    initializer_range: float | None = _field(
        None,
        "standard deviation of the initial weights; default: transformers' own, 0.02, small for a narrow GPT-2",
    )
    # Stages
    ffn: str = _field("low_rank", "kind of FFN; one that merges makes two stages, any other, or dense, one")
    ffn_options: dict[str, Any] = field(default_factory=dict, metadata={"help": "fields of that kind"})
    steps: int | None = _field(360, "optimizer steps of a run (of each stage with --restart)")
    epochs: float | None = _field(None, "length in passes over the data instead of steps")
    switch: float = _field(0.6, "fraction of the steps after which the factors are merged and training goes on dense")
    dense_warmup: float = _field(0.0, "fraction of the steps trained dense before the factors")
    dense_layers: int | None = _field(None, "FFNs, from the first layer on, that are never factorised; default: none")
    rewarm_steps: int = _field(20, "steps over which the merged tensors' learning rate rises again")
    restart: bool = _field(False, "each stage has a schedule and an optimizer of its own, as FastFFN published it")
    baseline: bool = _field(True, "train a dense model beside it, for comparison")
    # Optimisation
    batch: int = _field(4, "sequences in an optimizer step, over all devices")
    micro_batch: int | None = _field(None, "sequences on a device at once; default: all of the batch")
    learning_rate: float = _field(1e-3, "peak learning rate of the two-stage run")
    dense_learning_rate: float | None = _field(None, "peak learning rate of the dense run; default: the same")
    factor_learning_rate: float | None = _field(None, "peak learning rate of the factors; default: the same")
    ffn_learning_rate: float | None = _field(
        None, "peak learning rate of dense FFNs' matrices after dense_layers, merged ones too; default: the same"
    )
    schedule: Literal["wsd", "cosine"] = _field("wsd", "wsd (warm-up, stable, decay) or, with --restart, cosine")
    warmup_steps: int = _field(30, "steps of linear warm-up")
    decay: float = _field(0.3, "fraction of the steps in which the rate falls (wsd); all of it in the dense stage")
    min_lr_ratio: float = _field(0.0, "final learning rate over peak learning rate")
    weight_decay: float = _field(0.1, "AdamW's weight decay, of matrices only")
    frobenius_decay: bool = _field(True, "factors: decay their product, not each for itself")
    beta1: float = _field(0.9, "Adam's first beta")
    beta2: float = _field(0.95, "Adam's second beta")
    clip: float = _field(1.0, "largest norm of the gradient; 0: no clipping")
    optimizer: str = _field("adamw_torch_fused", "name of an AdamW among transformers' optimizers")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = _field("auto", "auto: bf16 on an accelerator that has it")
    compile: bool = _field(False, "torch.compile the model")
    gradient_checkpointing: bool = _field(False, "recompute activations in the backward: less memory, more time")
    seed: int = _field(0, "seed of weights and data order")
    # Rhythm
    evaluate_every: int | None = _field(None, "steps between validations; default: a twentieth of the run, 20 at least")
    checkpoint_every: int = _field(120, "steps between checkpoints")
    log_every: int = _field(20, "steps between log lines")

    def __post_init__(self) -> None:
        """Checks what can be checked before any text is read."""
        for name in ("layers", "d_model", "heads", "batch", "checkpoint_every", "validation_blocks"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        _require(self.sequence >= 2, "sequence", self.sequence, "must be at least 2: tokens are predicted from others")
        for name in ("d_hidden", "micro_batch", "steps", "vocabulary", "evaluate_every", "log_every"):
            value = getattr(self, name)
            _require(value is None or value >= 1, name, value, "must be at least 1")
        for name in (*RATES, "epochs", "initializer_range"):
            value = getattr(self, name)
            _require(value is None or 0 < value < float("inf"), name, value, "must be above 0")
        for name in ("dropout", "beta1", "beta2"):
            value = getattr(self, name)
            _require(0 <= value < 1, name, value, "must be at least 0 and below 1")
        for name in ("weight_decay", "clip", "warmup_steps", "rewarm_steps"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "must not be negative")
        _require(0 <= self.min_lr_ratio <= 1, "min_lr_ratio", self.min_lr_ratio, "must be from 0 to 1")
        _require(
            0 < self.validation_fraction <= 0.5,
            "validation_fraction",
            self.validation_fraction,
            "must be above 0, at most 0.5",
        )
        _require(0 < self.decay <= 1, "decay", self.decay, "must be above 0 and at most 1")
        _require(
            self.dense_layers is None or 0 <= self.dense_layers < self.layers,
            "dense_layers",
            self.dense_layers,
            f"must be at least 0 and below layers ({self.layers})",
        )
        _require(0 < self.switch < 1, "switch", self.switch, "must be above 0 and below 1")
        _require(
            0 <= self.dense_warmup < self.switch,
            "dense_warmup",
            self.dense_warmup,
            f"must be at least 0 and below switch ({self.switch})",
        )
        if (self.steps is None) == (self.epochs is None):
            raise ConfigError(f"steps is {self.steps} and epochs is {self.epochs}; give one of the two, and only one.")
        if self.d_model % self.heads:
            divisors = [n for n in range(1, self.d_model + 1) if self.d_model % n == 0]
            nearest = min(divisors, key=lambda n: abs(n - self.heads))
            raise ConfigError(
                f"heads is {self.heads}, which does not divide d_model {self.d_model}; the nearest that does is "
                f"{nearest}."
            )
        micro = self.micro_batch or self.batch
        if self.batch % micro:
            raise ConfigError(f"batch is {self.batch}, which micro_batch {micro} does not divide.")
        if self.schedule not in ("wsd", "cosine"):
            raise ConfigError(f"schedule is '{self.schedule}'; it must be wsd or cosine.")
        if self.precision not in ("auto", "fp32", "bf16", "fp16"):
            raise ConfigError(f"precision is '{self.precision}'; it must be auto, fp32, bf16 or fp16.")
        if not self.restart and self.two_stage:
            if self.schedule != "wsd":
                raise ConfigError(
                    "schedule 'cosine' decays from the beginning, but one schedule spans both stages and must decay in "
                    "the dense one only. Use wsd, or restart, which gives each stage a schedule of its own."
                )
            _require(
                self.decay <= 1 - self.switch + 1e-9,
                "decay",
                self.decay,
                f"must be at most 1 - switch = {1 - self.switch:.3g}: the rate falls in the dense stage only",
            )
        elif self.dense_warmup and self.two_stage:
            raise ConfigError("dense_warmup and restart exclude each other: a restarted stage knows nothing of it.")
        if not self.optimizer.startswith("adamw_"):
            raise ConfigError(
                f"optimizer is '{self.optimizer}'; the switch of stages carries the state of an AdamW "
                "(adamw_torch, adamw_torch_fused, adamw_torch_npu_fused, ...)."
            )
        size = training_size(self.tokenizer)
        if self.masked and size == SMALLEST:
            raise ConfigError(f"tokenizer is '{self.tokenizer}'; with a mask token it has {SMALLEST + 1} at least.")
        get_activation(self.activation)
        if self.init_from is not None and self.initializer_range is not None:
            raise ConfigError(
                f"initializer_range is {self.initializer_range}, but the run starts from the weights of "
                f"{self.init_from}; leave one of the two out."
            )
        if self.ffn == "dense" and self.factor_learning_rate is not None:
            raise ConfigError(
                f"factor_learning_rate is {self.factor_learning_rate}, but ffn is dense and there are no factors; "
                "ffn_learning_rate is the rate of dense FFNs."
            )
        self.ffn_config()
        if self.init_from is not None and self.ffn != "dense" and not self.two_stage:
            raise ConfigError(
                f"ffn is {self.ffn}, which starts from trained weights only by way of text, and init_from is "
                f"{self.init_from}. Convert it first, fastffn convert {self.init_from} OUT --ffn {self.ffn} "
                f"--calibration TEXT, and then recover it, fastffn distill OUT {self.init_from} --data TEXT."
            )

    @property
    def two_stage(self) -> bool:
        """Whether the kind merges into the dense one: a factorised stage comes first, then a dense one."""
        return self.ffn in mergeable_kinds()

    @property
    def model_type(self) -> str:
        """The architecture; runs begun by versions that had but one did not name it."""
        return self.architecture or DEFAULT

    @property
    def masked(self) -> bool:
        """Whether the model predicts masked tokens; if not, the next one."""
        return get_architecture(self.architecture).masked

    def shape(self, vocabulary: int) -> ModelShape:
        """Architecture and widths of the model."""
        return ModelShape(
            architecture=self.model_type,
            layers=self.layers,
            d_model=self.d_model,
            heads=self.heads,
            d_hidden=self.d_hidden,
            sequence=self.sequence,
            vocabulary=vocabulary,
            activation=self.activation,
            dropout=self.dropout,
            initializer_range=self.initializer_range,
        )

    def ffn_config(self) -> FFNConfig:
        """The configuration of the FFN of stage 1, or of the only stage, all widths known.

        Raises:
            KindError: the kind is unknown.
            ConfigError: an option is unknown or does not fit.
        """
        kind = get_kind(self.ffn)
        if not kind.config.TRAINS:
            raise KindError(
                f"The kind '{kind.name}' cannot be trained: it is for inference. Pre-train another one and convert the "
                f"result: fastffn convert MODEL OUT --ffn {kind.name}."
            )
        options = {name: value for name, value in self.ffn_options.items() if value is not None}
        known = kind.config.own_fields()
        for name in options:
            if name not in known:
                _, owners = ffn_option_types().get(name, (None, None))
                raise ConfigError(
                    f"The kind '{kind.name}' has no option '{name}'; it has {', '.join(sorted(known)) or 'none'}."
                    + (f" Kinds that have it: {owners}." if owners else did_you_mean(name, known))
                )
        # BERT's dropout after the FFN belongs to the module around it.
        inside = family_named(self.model_type).dropout is not None
        widths = {"d_model": self.d_model, "activation": self.activation, "dropout": self.dropout if inside else 0.0}
        if self.d_hidden is not None:
            widths["d_hidden"] = self.d_hidden
        fields = {field.name for field in dataclasses.fields(kind.config)}
        config = kind.config.from_dict(options | {n: v for n, v in widths.items() if n in fields}).resolved()
        config.check_pretraining()
        return config

    def to_flat(self) -> dict[str, Any]:
        """All fields on one level, the FFN kind's options among them, as YAML files and flags give them.

        A path with a slash at its end is the same path, and the same run.
        """
        values = dataclasses.asdict(self)
        for name in _PATHS:
            if values[name] and len(values[name]) > 1:
                values[name] = values[name].rstrip("/")
        options = values.pop("ffn_options")
        return values | {name: options.get(name) for name in ffn_option_types()}

    @classmethod
    def from_flat(cls, values: Mapping[str, Any]) -> Self:
        """The configuration that `to_flat` describes; fields left out keep their defaults.

        Raises:
            ConfigError: a field is unknown or out of range.
        """
        own = {f.name for f in dataclasses.fields(cls)} - {"ffn_options"}
        options = ffn_option_types()
        for name in values:
            if name not in own and name not in options:
                raise ConfigError(f"Unknown field '{name}'.{did_you_mean(name, own | set(options))}")
        chosen = {name: value for name, value in values.items() if name in options and value is not None}
        return cls(**{name: value for name, value in values.items() if name in own}, ffn_options=chosen)


_PATHS = ("data", "validation", "tokenizer", "init_from")

RATES = ("learning_rate", "dense_learning_rate", "factor_learning_rate", "ffn_learning_rate")


def mergeable_kinds() -> list[str]:
    """Kinds that can be a first stage: they merge into the dense kind, and are not it."""
    names = []
    for kind in kinds().values():
        config = kind.config(d_model=4).resolved()
        merges = kind.config is not DenseConfig and kind.module.merged_tensors(config) is not None
        if merges and kind.config.TRAINS:
            names.append(kind.name)
    return names


def ffn_option_types() -> dict[str, tuple[type, str]]:
    """Options of all kinds: name -> (type, which kinds have it)."""
    options: dict[str, tuple[type, str]] = {}
    for name in kinds():
        kind = get_kind(name)
        hints = get_type_hints(kind.config)
        for option in kind.config.own_fields():
            owners = f"{options[option][1]}, {name}" if option in options else name
            options[option] = (plain_type(hints[option]), owners)
    return options


def plain_type(hint: Any) -> type:
    """`int` for `int | None`, and so on; `str` for a Literal."""
    arguments = [a for a in getattr(hint, "__args__", ()) if a is not type(None)]
    found = arguments[0] if arguments else hint
    return found if isinstance(found, type) else str


def _require(condition: bool, name: str, value: Any, rule: str) -> None:
    if not condition:
        raise ConfigError(f"{name} is {value}; it {rule}.")


def start_fields(directory: str) -> dict[str, Any]:
    """Fields of a run that starts from the checkpoint in `directory`: its shape, and its tokenizer if it has one.

    Raises:
        CheckpointError: it is no checkpoint that training can start from.
    """
    shape = ModelShape.of_checkpoint(Path(directory))
    fields: dict[str, Any] = {name: getattr(shape, name) for name in SHAPE_FIELDS}
    # A preset's, for random weights.
    fields["initializer_range"] = None
    if shape.architecture == DEFAULT:
        del fields["architecture"]
    if any((Path(directory) / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        fields["tokenizer"] = directory
    return fields


SHAPE_FIELDS = ("architecture", "layers", "d_model", "heads", "d_hidden", "activation")


# Fields that differ from the defaults above.
PRESETS: dict[str, dict[str, Any]] = {
    # Minutes on two cores, on a text that every machine has; rates are those of a run as short as this.
    "demo": {
        # The first FFN stays whole: what low rank costs, it costs there (docs/two-stage-record.md).
        "rank": 16,
        "dense_layers": 1,
        "switch": 0.7,
        "learning_rate": 1.4e-3,
        "dense_learning_rate": 1e-3,
        "factor_learning_rate": 3.5e-4,
        "ffn_learning_rate": 1.25e-4,
    },
    # A minute or so a model on one core, for tables of many models (fastffn experiment tree-ladder).
    "small": {
        "tokenizer": "train:2048",
        "ffn": "dense",
        "layers": 2,
        "d_model": 128,
        "sequence": 128,
        "batch": 8,
        "steps": 500,
        "learning_rate": 2e-3,
        "evaluate_every": 100,
        "checkpoint_every": 500,
        "validation_blocks": 512,
    },
    # GPT-2 small as it is trained today; some 2.6 thousand million tokens.
    "gpt2-small": {
        "data": "",
        "tokenizer": "gpt2",
        "vocabulary": 50257,
        "layers": 12,
        "d_model": 768,
        "heads": 12,
        "sequence": 1024,
        "steps": 5000,
        "batch": 512,
        "micro_batch": 16,
        # What gained where low rank lost, at the widths that were tried (docs/two-stage.md); not tried at this one.
        "ffn": "narrow",
        "switch": 0.7,
        "learning_rate": 6e-4,
        "warmup_steps": 250,
        "decay": 0.25,
        "rewarm_steps": 100,
        "evaluate_every": 250,
        "checkpoint_every": 500,
        "log_every": 25,
    },
    # FastFFN as published (MindSpore, 2022). It does not state the form of the decay nor the dropout: cosine and
    # GPT-2's 0.1 are ours. Adam without weight decay is AdamW with weight decay 0.
    "seed": {
        "data": "",
        "tokenizer": "gpt2",
        "vocabulary": 50257,
        "layers": 6,
        "d_model": 768,
        "heads": 12,
        "sequence": 1024,
        "dropout": 0.1,
        "rank": 8,
        "start": "normal",
        "steps": None,
        "epochs": 1.0,
        "restart": True,
        "rewarm_steps": 0,
        "batch": 16,
        "learning_rate": 5e-6,
        "schedule": "cosine",
        "warmup_steps": 2000,
        "min_lr_ratio": 0.02,
        "weight_decay": 0.0,
        "beta2": 0.999,
        "clip": 0.0,
        "evaluate_every": 500,
        "checkpoint_every": 1000,
        "log_every": 50,
    },
}


def get_preset(name: str | None) -> dict[str, Any]:
    """All fields of a preset, flat; None: the defaults.

    Raises:
        ConfigError: no preset has that name.
    """
    if name is not None and name not in PRESETS:
        raise ConfigError(f"Unknown preset '{name}'; there are {', '.join(PRESETS)}.{did_you_mean(name, PRESETS)}")
    defaults = {f.name: f.default for f in dataclasses.fields(PretrainConfig) if f.default is not dataclasses.MISSING}
    return defaults | (PRESETS[name] if name is not None else {})
