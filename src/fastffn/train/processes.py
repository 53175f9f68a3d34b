"""Several processes on one run: they start by `torchrun` or `accelerate launch`; the main one decides and writes."""

from __future__ import annotations

import atexit
import datetime
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import torch

from fastffn.errors import ConfigError, DataError, MainProcessError

T = TypeVar("T")

# How long processes wait for each other: while one tokenises, merges or writes, the others have nothing to do. A
# launcher notices by itself, and at once, when a process dies.
PATIENCE = datetime.timedelta(days=2)


def join() -> None:
    """Joins the other processes, if this one was started beside others.

    Raises:
        ConfigError: the launcher asks for an engine that cuts models into shards.
    """
    for variable, engine in (("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")):
        if os.environ.get(variable, "false").lower() == "true":
            raise ConfigError(
                f"The launcher asks for {engine}. fastffn pretrain trains data-parallel (DDP): at the switch of stages "
                f"the optimizer's state passes from factors to merged matrices, which it cannot do for {engine}'s "
                "shards. Launch without it; docs/scale.md says how far DDP reaches."
            )
    state()


def state() -> Any:
    """Who we are among the processes; accelerate's `PartialState`."""
    from accelerate import PartialState

    return PartialState(cpu=not torch.accelerator.is_available(), timeout=PATIENCE)


def leave(code: int) -> NoReturn:
    """Ends this process with exit code `code`, without the interpreter's own end.

    A thread of gloo frees the tensors of the last collective once it gets to run, and needs the interpreter for it. If
    that is going down already, the thread aborts the process; and if the group is freed while it waits, both wait for
    ever (torch 2.13). Here the interpreter lives to the last moment, and the group is left to the system.
    """
    try:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        # Other backends have no such threads and want their communicators closed; not after an error, when the other
        # processes may still be waiting for this one.
        if code == 0 and torch.distributed.is_initialized() and torch.distributed.get_backend() != "gloo":
            torch.distributed.destroy_process_group()
    finally:
        os._exit(code)


def count() -> int:
    """Number of processes."""
    processes: int = state().num_processes
    return processes


def is_main() -> bool:
    """Whether this is the process that decides, writes and speaks."""
    main: bool = state().is_main_process
    return main


def on_main(function: Callable[[], T]) -> T:
    """Calls `function` in the main process; each process returns its value.

    Raises:
        MainProcessError: in the other processes, whatever `function` raised in the main one.
    """
    if count() == 1:
        return function()
    from accelerate.utils import broadcast_object_list

    outcome: list[Any] = [None, None]
    caught: Exception | None = None
    if is_main():
        try:
            outcome[0] = function()
        except Exception as error:
            caught = error
            outcome[1] = getattr(error, "exit_code", 1)
    broadcast_object_list(outcome)
    if caught is not None:
        raise caught
    if outcome[1] is not None:
        raise MainProcessError("The main process stopped; it says why.", exit_code=outcome[1])
    value: T = outcome[0]
    return value


def gather(value: T) -> list[T]:
    """The values of all processes, in their order."""
    if count() == 1:
        return [value]
    from accelerate.utils import gather_object

    values: list[T] = gather_object([value])
    return values


def check_same(what: str, value: str) -> None:
    """Raises DataError unless `value` is the same in every process."""
    values = gather(value)
    others = [number for number, other in enumerate(values) if other != values[0]]
    if others:
        raise DataError(
            f"{what} differs between the processes: {', '.join(map(str, others))} do not have what process 0 has. All "
            "must read the same files, under the same path and with the same times."
        )


def say(text: str) -> None:
    """One line on the screen, from the main process."""
    if is_main():
        print(text, flush=True)
