"""What is measured: the FFN, how many of it, on what; checked before anything runs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

import fastffn
from fastffn.errors import BackendError, ConfigError, did_you_mean
from fastffn.measure.timer import accelerator
from fastffn.nn import FFN, FFNConfig
from fastffn.ops import OPS

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PASSES = ("forward", "forward + backward")


@dataclass(frozen=True, kw_only=True)
class LayerCase:
    """A measurement.

    Args:
        config: of the FFN, `d_model` among its fields.
        tokens: sizes of the batch; each is measured.
        passes: `forward`, or `both` for forward and for forward with backward.
        layers: 1 for one layer again and again; more for a stack of so many, each with weights of its own.
        cold: whether all caches are emptied before each call.
        dtype: fp32, bf16 or fp16, of weights and tokens.
        device: where; such as "cpu".
        threads: of the processor; None for as many as torch uses.
        backends: each is measured; empty for the one that would run.
        out: whether to measure the forward pass into memory that is given, too.
        compiled: whether the dense FFNs are compiled, too.
        rounds: at least so many are timed of each, time allowing.
        max_seconds: for the timing of one row: one size of the batch, one pass.

    Raises:
        ConfigError: a field is out of range, the device is not there, or the weights do not fit its memory.
        BackendError: a backend is unknown.
    """

    config: FFNConfig
    tokens: Sequence[int] = (1, 8, 64, 512, 4096, 16384)
    passes: str = "both"
    layers: int = 1
    cold: bool = False
    dtype: str = "fp32"
    device: str = "cpu"
    threads: int | None = None
    backends: Sequence[str] = field(default=())
    out: bool = False
    compiled: bool = True
    rounds: int = 15
    max_seconds: float = 20.0

    def __post_init__(self) -> None:
        """Checks what can be checked without running anything."""
        if not self.tokens or any(not isinstance(n, int) or n < 1 for n in self.tokens):
            given = ",".join(map(str, self.tokens))
            raise ConfigError(f"tokens is '{given}'; it must be whole numbers of at least 1, such as 1,64,4096.")
        if self.passes not in ("forward", "both"):
            raise ConfigError(f"passes is '{self.passes}'; it must be forward or both.")
        if self.dtype not in DTYPES:
            raise ConfigError(
                f"dtype is '{self.dtype}'; it must be one of {', '.join(DTYPES)}.{did_you_mean(self.dtype, DTYPES)}"
            )
        for name in ("layers", "rounds", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1.")
        if not self.max_seconds > 0:
            raise ConfigError(f"max_seconds is {self.max_seconds}; it must be above 0.")
        known = sorted({impl.name for op in OPS.values() for impl in op.impls})
        for name in self.backends:
            if name not in known:
                raise BackendError(
                    f"There is no backend '{name}'; there are {', '.join(known)}.{did_you_mean(name, known)}"
                )
        self._check_device()
        self._check_memory()

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype that `dtype` names."""
        return DTYPES[self.dtype]

    @property
    def accelerated(self) -> bool:
        """Whether the device is an accelerator."""
        return torch.device(self.device).type != "cpu"

    def build(self) -> list[FFN]:
        """The layers, with weights of their own."""
        with torch.device(self.device):
            return [fastffn.build(self.config).to(self.torch_dtype) for _ in range(self.layers)]

    def check_backends(self) -> None:
        """Whether each backend that is asked for runs this FFN, and whether it has backends at all.

        Raises:
            BackendError: one cannot run it.
            ConfigError: there are none.
        """
        if not self.backends:
            return
        with torch.device(self.device):
            ffn = fastffn.build(self.config).to(self.torch_dtype).eval()
            x = torch.zeros(1, ffn.config.d_model, dtype=self.torch_dtype)
        for name in self.backends:
            for training in (False, True)[: 1 + (self.passes == "both")]:
                with torch.no_grad(), fastffn.use_backend(name):
                    ffn.train(training)(x)
        try:
            # None is called so: whoever asks for it by name learns that an operation was called.
            with torch.no_grad(), fastffn.use_backend("?"):
                ffn(x)
        except BackendError:
            return
        raise ConfigError(
            f"backend is {', '.join(self.backends)}, but {type(ffn).__name__} runs no operation that has backends; "
            "leave it away."
        )

    def _check_device(self) -> None:
        found = accelerator()
        there = ["cpu"] + ([str(found)] if found is not None else [])
        try:
            device = torch.device(self.device)
            if device.type == "meta":
                raise RuntimeError("it has no memory")
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            reason = str(error).splitlines()[0].rstrip(".")
            raise ConfigError(
                f"device is '{self.device}', which cannot be used here ({reason}); there is {', '.join(there)}."
            ) from error

    def _check_memory(self) -> None:
        with torch.device("meta"):
            parameters = sum(tensor.numel() for tensor in fastffn.build(self.config).state_dict().values())
        # The FFN, a dense one of as many neurons, and the gradients of both.
        wanted = 4 * parameters * self.layers * self.torch_dtype.itemsize
        there = memory(torch.device(self.device))
        if there is not None and wanted > there:
            raise ConfigError(
                f"{self.layers} layers of {parameters:,} parameters, dense ones beside them, and gradients need "
                f"{wanted / 1e9:,.0f} GB; '{self.device}' has {there / 1e9:,.0f} GB. Choose a smaller FFN or fewer "
                "layers."
            )


def memory(device: torch.device) -> int | None:
    """Bytes of memory that a device has; None if it does not say."""
    if device.type == "cpu":
        try:
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        except (ValueError, OSError, AttributeError):
            return None
    try:
        return int(torch.accelerator.get_memory_info(device)[1])
    except (AttributeError, RuntimeError, NotImplementedError):
        return None
