"""The run directory: which run it holds, and what of it is done."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import yaml

from fastffn.convert.files import flush, make_directory, read_json, write_json, write_text
from fastffn.errors import ConfigError, OutputError
from fastffn.registry import kinds

CONFIG = "config.yaml"
STAGE = "stage.json"
TEXT = "text.json"
LOCK = ".fastffn.lock"
# Everything a run of any command puts into its directory; `--overwrite` removes these and nothing else.
CONTENTS = (
    "dense",
    "dense_equal_tokens",
    "warmup",
    "factorised",
    "stage1",
    "merged",
    "stage2",
    "layers",
    "student",
    "tokenizer",
    TEXT,
    "gain.json",
    "before.json",
    "results.json",
    "report.md",
    "loss_vs_time.png",
    CONFIG,
)


# What there is before the first stage begins.
BEFORE_TRAINING = {CONFIG, "tokenizer", TEXT, "gain.json", "before.json"}
# Fields by which a command's `config.yaml` is known.
COMMANDS = {"pretrain": {"data", "ffn", "layers"}, "distill": {"data", "student", "teacher"}}


class RunConfig(Protocol):
    """What a run directory has to know of its run: all fields on one level, plain values."""

    def to_flat(self) -> dict[str, Any]:
        """The fields."""
        ...


def command_of(values: dict[str, Any]) -> str | None:
    """The command whose fields these are, None if they are no run's."""
    return next((name for name, fields in COMMANDS.items() if fields <= set(values)), None)


@contextlib.contextmanager
def locked(output: Path) -> Iterator[None]:
    """Keeps every other run out of `output`.

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
        yield
    finally:
        if not (output / CONFIG).exists():
            # It has not become a run's: leave it as it was.
            (output / LOCK).unlink(missing_ok=True)
            if new and not any(output.iterdir()):
                output.rmdir()
        lock.release()


def is_ours(name: str) -> bool:
    """Whether a run puts something of that name into its directory; stages of other kinds bear the kind's name."""
    return name in CONTENTS or name in kinds()


def check_run(output: Path, config: RunConfig, *, overwrite: bool) -> bool:
    """Checks that `output` is free for the run that `config` describes; changes nothing.

    Returns:
        Whether it holds an earlier attempt at the very same run, which goes on. With `overwrite` only an unfinished one
        does.

    Raises:
        OutputError: it holds another run, or something that is not a run.
    """
    found = output.iterdir() if output.exists() else ()
    there = sorted(path.name for path in found if path.name != LOCK and not _is_partial(path))
    if not there:
        return False
    before = read_config(output / CONFIG) if CONFIG in there else {}
    after = config.to_flat()
    # What an older version did not know and this run leaves unset is no difference: each new kind brings options.
    different = [name for name in after if before.get(name) != after[name]]
    if set(there) <= BEFORE_TRAINING and command_of(before) is not None:
        return False  # nothing to go on with, and nothing to lose
    if not different and not (overwrite and (output / "results.json").is_file()):
        return True
    if overwrite:
        foreign = [name for name in there if not is_ours(name)]
        if foreign:
            raise OutputError(
                f"{output} holds files that are not a FastFFN run's ({', '.join(foreign[:5])}); nothing was deleted. "
                "Name another directory."
            )
        return False
    if not before:
        raise OutputError(f"{output} is not empty and holds no FastFFN run; name another directory.")
    other = command_of(before)
    if other != command_of(after):
        raise OutputError(
            f"{output} holds a run of fastffn {other or '(an unknown command)'}. Name another directory, or pass "
            "--overwrite to delete that run and start anew."
        )
    unknown = [name for name in different if name not in before]
    if unknown:
        raise OutputError(
            f"{output} holds a run of another version of FastFFN, which did not know {', '.join(unknown)}; this one "
            "cannot go on with it. Name another directory, or pass --overwrite to delete that run and start anew."
        )
    differences = "; ".join(f"{name}: {before[name]} there, {after[name]} here" for name in different)
    raise OutputError(
        f"{output} holds another run, which differs in {differences}. Name another directory, or pass "
        "--overwrite to delete that run and start anew."
    )


def claim_run(output: Path, config: RunConfig) -> None:
    """Makes `output` this run's, after `check_run`: deletes what another run left there and writes `config.yaml`."""
    make_directory(output)
    names = [*CONTENTS, *(name for name in kinds() if name not in CONTENTS)]
    if not any((output / name).exists() for name in names if name not in BEFORE_TRAINING):
        # Nothing was trained: the directory stays recognisable to the end.
        names.remove(CONFIG)
    # Otherwise the configuration goes first: what is left without it, should this be stopped, is no run any more.
    for name in sorted(names, key=lambda name: name != CONFIG):
        _remove(output / name)
    clear_partials(output)
    write_text(output / CONFIG, dump_config(config))


def clear_partials(output: Path) -> None:
    """Deletes what a run that was killed left half-written, in its directory and those of its stages."""
    ours = [path for path in output.iterdir() if path.is_dir() and is_ours(path.name)]
    for path in [*output.iterdir(), *(path for stage in ours for path in stage.iterdir())]:
        if _is_partial(path):
            _remove(path)


def _is_partial(path: Path) -> bool:
    """Whether it is a temporary name (see `fastffn.convert.files`) of something that a run writes."""
    name, _, rest = path.name.lstrip(".").partition(".partial")
    return bool(path.name.startswith(".") and rest and (is_ours(name) or is_ours(path.parent.name)))


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def dump_config(config: RunConfig) -> str:
    """All fields as YAML; `fastffn pretrain --config` reads its own."""
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
    """Marks a stage as finished, once its model has reached the disk."""
    for path in directory.iterdir():
        if path.is_file():
            flush(path)
    write_json(directory / STAGE, record)


def same_text(output: Path, identity: str) -> bool:
    """Whether a run's token blocks and start are still those that it was begun with."""
    path = output / TEXT
    return not path.is_file() or read_json(path).get("identity") == identity


def keep_text(output: Path, identity: str) -> None:
    """Keeps the identity of the run's token blocks and start."""
    write_json(output / TEXT, {"identity": identity})
