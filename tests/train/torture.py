"""Kills a run again and again, at random, until it comes to its end; a program of its own, called by the tests.

    python -m tests.train.torture --text FILE --work DIRECTORY --kills 5 --seed 1

The run is a child forked after all imports, so that a kill strikes the run and not the loading of libraries. Half of
the kills come at a random moment, the other half at a random one of the file operations (opening for writing,
renaming, deleting, making directories) that the run does, where the most delicate moments are. The final weights of
every stage must be those of the same run undisturbed, bit by bit.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import datasets
import torch
import transformers  # noqa: F401
from safetensors.torch import load_file

import fastffn.hf  # noqa: F401
from fastffn.train import rundir
from fastffn.train.pretrain import pretrain
from tests.train.test_pretrain import tiny

_WRITES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree"}
FINAL = ("dense", "warmup", "stage1", "merged", "stage2")


def configuration(text: Path) -> Any:
    """The run: every sort of stage, checkpoints often, random numbers in each step, several passes over the text."""
    return tiny(text, dense_warmup=0.2, checkpoint_every=2, evaluate_every=5, steps=20, dropout=0.1)


def _writes(event: str, arguments: tuple[Any, ...]) -> bool:
    if event == "open":
        mode, flags = arguments[1], arguments[2]
        return bool(isinstance(mode, str) and set(mode) & set("wax+")) or bool(
            isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        )
    return event in _WRITES


def _child(work: Path, text: Path, at_write: int | None, count: Path) -> int:
    """Runs in a fork, which is killed at its n-th file operation if asked; writes how many there were."""
    process = os.fork()
    if process:
        return process
    seen = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if _writes(event, arguments):
            seen += 1
            if seen == at_write:
                os.kill(os.getpid(), signal.SIGKILL)

    code = 1
    try:
        log = os.open(work / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        datasets.config.HF_DATASETS_CACHE = work / "cache"
        torch.set_num_threads(1)
        sys.addaudithook(hook)
        pretrain(configuration(text), work / "run")
        count.write_text(str(seen))
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def _wait(process: int, seconds: float) -> int | None:
    """The exit status, None if it still runs after `seconds`."""
    end = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return status
        if time.monotonic() >= end:
            return None
        time.sleep(0.002)


def main() -> None:
    """See the file's head; the exit status is not 0 if a run did not go on, or ended otherwise."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--kills", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    given = parser.parse_args()
    print(f"torture: seed {given.seed}, {given.kills} kills", flush=True)
    draw = random.Random(given.seed)
    given.work.mkdir(parents=True, exist_ok=True)

    # Ten steps or so a pass.
    text = given.work / "text.txt"
    text.write_text(given.text.read_text(encoding="utf-8")[:1500], encoding="utf-8")
    undisturbed = given.work / "undisturbed"
    undisturbed.mkdir()
    begun = time.monotonic()
    status = _wait(_child(undisturbed, text, None, undisturbed / "count"), 300)
    if status != 0:
        sys.exit(f"the undisturbed run failed: {status}\n{(undisturbed / 'log.txt').read_text()}")
    duration = time.monotonic() - begun
    writes = int((undisturbed / "count").read_text())
    expected = {name: load_file(undisturbed / "run" / name / "model.safetensors") for name in FINAL}
    print(f"undisturbed: {duration:.1f} s, {writes} file operations", flush=True)

    kills, rounds = 0, 0
    while kills < given.kills:
        # A run until its end, killed on its way; when it ends, another one.
        rounds += 1
        work = given.work / f"round-{rounds}"
        work.mkdir()
        before = kills
        while True:
            at_write = draw.randrange(1, writes) if kills < given.kills and draw.random() < 0.5 else None
            delay = draw.uniform(0, duration) if kills < given.kills and at_write is None else 300
            process = _child(work, text, at_write, work / "count")
            status = _wait(process, delay)
            if status is None:
                os.kill(process, signal.SIGKILL)
                status = os.waitpid(process, 0)[1]
            if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
                kills += 1
                what = f"file operation {at_write}" if at_write else f"{delay:.3f} s"
                there = sorted(path.name for path in (work / "run").glob("*")) if (work / "run").exists() else []
                print(f"kill {kills}: at {what}; there: {' '.join(there)}", flush=True)
                continue
            if status != 0:
                sys.exit(f"after {kills - before} kills the run failed: {status}\n{(work / 'log.txt').read_text()}")
            break
        for name, tensors in expected.items():
            found = load_file(work / "run" / name / "model.safetensors")
            wrong = [key for key, value in tensors.items() if not torch.equal(found[key], value)]
            if wrong or set(found) != set(tensors):
                sys.exit(f"round {rounds}: {name} differs in {wrong}\n{(work / 'log.txt').read_text()}")
        left = [path.name for path in (work / "run").rglob(".*") if path.name != rundir.LOCK]
        if left:
            sys.exit(f"round {rounds}: left behind: {left}")
        print(f"round {rounds}: {kills - before} kills, the same weights", flush=True)
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
