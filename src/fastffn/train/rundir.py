"""The run directory: which run it holds, and what of it is done."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from fastffn.convert.files import make_directory, read_json, write_json, write_text
from fastffn.errors import ConfigError, OutputError
from fastffn.train.config import PretrainConfig

CONFIG = "config.yaml"
STAGE = "stage.json"
LOCK = ".lock"
# Everything a run puts into its directory; `--overwrite` removes these and nothing else.
CONTENTS = (
    "dense",
    "dense_equal_tokens",
    "warmup",
    "factorised",
    "stage1",
    "merged",
    "stage2",
    "tokenizer",
    "text.json",
    "gain.json",
    "results.json",
    "report.md",
    "loss_vs_time.png",
    CONFIG,
)


@contextlib.contextmanager
def locked(output: Path) -> Iterator[None]:
    """Keeps every other run out of `output`; what an earlier one left half-written there is cleared away.

    The lock is the operating system's: it ends with the process, however that ends.

    Raises:
        OutputError: another run has it, or it is a file.
    """
    from filelock import FileLock, Timeout

    if output.exists() and not output.is_dir():
        raise OutputError(f"{output} is a file; name a directory for the run.")
    new = not output.exists()
    make_directory(output)
    lock = FileLock(output / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise OutputError(
            f"Another process trains in {output} at this moment. Wait for it, stop it, or name another directory."
        ) from None
    try:
        for path in output.glob(".*.partial*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        yield
    finally:
        (output / LOCK).unlink(missing_ok=True)
        lock.release()
        # A directory that nothing came into was made for nothing.
        if new and not any(output.iterdir()):
            output.rmdir()


def check_run(output: Path, config: PretrainConfig, *, overwrite: bool) -> bool:
    """Checks that `output` is free for the run that `config` describes; changes nothing.

    Returns:
        Whether it holds an earlier, unfinished or finished attempt at the very same run, which goes on.

    Raises:
        OutputError: it holds another run, or something that is not a run.
    """
    there = sorted(path.name for path in output.iterdir() if path.name != LOCK) if output.exists() else []
    # Nothing trained yet: nothing to go on with, and nothing to lose.
    if set(there) <= {CONFIG, "tokenizer", "text.json", "gain.json"} and CONFIG in there:
        return False
    if there and overwrite:
        foreign = [name for name in there if name not in CONTENTS]
        if foreign:
            raise OutputError(
                f"{output} holds files that are not a FastFFN run's ({', '.join(foreign[:5])}); nothing was deleted. "
                "Name another directory."
            )
    elif there:
        if CONFIG not in there:
            raise OutputError(f"{output} is not empty and holds no FastFFN run; name another directory.")
        before = read_config(output / CONFIG)
        after = config.to_flat()
        names = [name for name in after if before.get(name) != after[name]]
        if names:
            differences = "; ".join(f"{name}: {before.get(name)} there, {after[name]} here" for name in names)
            raise OutputError(
                f"{output} holds another run, which differs in {differences}. Name another directory, or pass "
                "--overwrite to delete that run and start anew."
            )
        return True
    return False


def claim_run(output: Path, config: PretrainConfig) -> None:
    """Makes `output` this run's, after `check_run`: deletes another run in it and writes `config.yaml`."""
    make_directory(output)
    for path in sorted(output.iterdir()):
        if path.name != LOCK:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    write_text(output / CONFIG, dump_config(config))


def dump_config(config: PretrainConfig) -> str:
    """All fields as YAML; `fastffn pretrain --config` reads it."""
    return yaml.safe_dump(config.to_flat(), sort_keys=False, allow_unicode=True)


def read_config(path: Path) -> dict[str, Any]:
    """The fields in a YAML file.

    Raises:
        ConfigError: it is no YAML, or not a mapping.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds no fields; it should be lines such as 'rank: 64'.")
    return values


def finished_stage(directory: Path) -> dict[str, Any] | None:
    """What a finished stage recorded, None if it is not finished. It is written last of all."""
    path = directory / STAGE
    return read_json(path) if path.is_file() else None


def finish_stage(directory: Path, record: dict[str, Any]) -> None:
    """Marks a stage as finished."""
    write_json(directory / STAGE, record)


def check_text(output: Path, identity: str, *, resumed: bool) -> None:
    """Keeps the identity of the run's token blocks, or compares with it.

    Raises:
        OutputError: the run was begun on other text.
    """
    path = output / "text.json"
    if resumed and path.is_file() and read_json(path).get("identity") != identity:
        raise OutputError(
            f"The text has changed since the run in {output} was begun; its stages would not be comparable. "
            "Restore the text, name another directory, or pass --overwrite to start anew."
        )
    write_json(path, {"identity": identity})
