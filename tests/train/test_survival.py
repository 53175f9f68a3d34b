"""A run is killed, the disk is full, two runs meet: nothing that was complete is lost."""

from __future__ import annotations

import os
import random
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastffn.errors import OutputError, WriteError
from fastffn.train import checkpoints, rundir
from fastffn.train.disk import full_disk_is_named
from fastffn.train.pretrain import pretrain
from tests.train.test_pretrain import tiny

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_killed_at_random_it_ends_the_same(text_file, tmp_path) -> None:
    """Five kills; `make torture` does fifty. TORTURE_SEED repeats what failed."""
    seed = os.environ.get("TORTURE_SEED") or str(random.SystemRandom().randrange(10**6))
    kills = os.environ.get("TORTURE_KILLS") or "5"
    command = [sys.executable, "-m", "tests.train.torture", "--text", str(text_file), "--work", str(tmp_path / "work")]
    command += ["--kills", kills, "--seed", seed]
    print(f"seed {seed}")
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600, cwd=ROOT)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"kill {kills}:" in done.stdout
    assert "the same weights" in done.stdout


LIMITED = """
import resource, signal, sys
from pathlib import Path
from tests.train.test_survival import limited
limited(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
"""


def limited(text: Path, output: Path, most: int) -> None:
    """Trains in a process whose files may have at most `most` bytes from the eighth step on, as on a full disk."""
    from fastffn.train.trainer import StageTrainer

    step = StageTrainer.training_step

    def fill_disk(self, *args, **kwargs):
        if self.stage.name == "dense" and self.state.global_step == 8:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        return step(self, *args, **kwargs)

    StageTrainer.training_step = fill_disk
    try:
        pretrain(tiny(text), output)
    except WriteError as error:
        print(f"WriteError: {error}")
        sys.exit(error.exit_code)


@pytest.fixture(scope="module")
def undisturbed(text_file, tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    return output, pretrain(tiny(text_file), output)


# Bytes that are too few for the weights, for the optimizer's state, for the marks.
@pytest.mark.parametrize("most", [20_000, 60_000, 100])
def test_a_full_disk_loses_nothing(text_file, tmp_path, undisturbed, most) -> None:
    output = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(text_file), str(output), str(most)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert "WriteError: The disk is full" in done.stdout
    assert f"complete in {output} is kept. Make room" in done.stdout
    newest, ignored = checkpoints.newest_complete(output / "dense")
    assert newest is not None and newest.name == "checkpoint-8"
    assert ignored == []
    assert [path.name for path in output.rglob(".*")] == [rundir.LOCK]
    results = pretrain(tiny(text_file), output)
    for name in ("dense", "stage1", "stage2"):
        there, here = (load_file(path / name / "model.safetensors") for path in (undisturbed[0], output))
        assert all(torch.equal(there[key], here[key]) for key in there)
        assert results["stages"][name]["validation_loss"] == undisturbed[1]["stages"][name]["validation_loss"]


def test_errors_of_a_full_disk_are_told_from_others(tmp_path) -> None:
    with pytest.raises(WriteError, match="Make room"), full_disk_is_named(tmp_path):
        raise OSError(28, "No space left on device")
    cause = RuntimeError("I/O error: No space left on device (os error 28)")
    with pytest.raises(WriteError, match="wrapped"), full_disk_is_named(tmp_path):
        raise ValueError("wrapped") from cause
    with pytest.raises(PermissionError), full_disk_is_named(tmp_path):
        raise PermissionError(13, "Permission denied")
    with pytest.raises(OutputError), full_disk_is_named(tmp_path):
        raise OutputError("no space left for another run in this directory")


def test_a_second_run_on_one_directory_is_refused(text_file, tmp_path) -> None:
    """By another process, while the first one trains; and not after that one was killed."""
    output = tmp_path / "run"
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom fastffn.train import rundir\n"
        "with rundir.locked(Path(sys.argv[1])):\n    print('locked', flush=True)\n    time.sleep(300)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(output)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(OutputError, match="Another process trains in"):
            pretrain(tiny(text_file, baseline=False), output)
        other.kill()
    deadline = time.monotonic() + 10
    while True:
        try:
            with rundir.locked(output):
                break
        except OutputError:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert pretrain(tiny(text_file, baseline=False), output)["stages"]["stage2"]["steps"] == 8
