"""Two processes on one run, as `torchrun` and `accelerate launch` start them; on the CPU they speak over gloo."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

from fastffn.errors import ConfigError, MainProcessError
from fastffn.train import processes
from fastffn.train.arguments import split_batch
from fastffn.train.pretrain import pretrain
from tests.train.test_pretrain import tiny

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
# Not --cpu, with which it starts one process whatever the number; --multi_gpu starts them, and we find no GPU.
ACCELERATE = [
    sys.executable,
    "-m",
    "accelerate.commands.launch",
    "--multi_gpu",
    "--num_processes=2",
    "--num_machines=1",
]
ACCELERATE += ["--mixed_precision=no", "--dynamo_backend=no", "--num_cpu_threads_per_process=1"]


def launch(launcher: list[str], config, output, tmp_path, program=("-m", "fastffn")) -> subprocess.Popen[str]:
    path = tmp_path / "given.yaml"
    path.write_text(yaml.safe_dump(config.to_flat()))
    environment = dict(os.environ) | {"OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "hf")}
    return subprocess.Popen(
        [*launcher, *program, "pretrain", "--config", str(path), "--output", str(output), "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )


def files(directory) -> set[str]:
    return {path.name for path in directory.iterdir()}


@pytest.mark.slow
def test_two_processes_do_what_one_does(text_file, tmp_path) -> None:
    """The same batches in the same order; a killed process ends the run, and the same command goes on with it."""
    config = tiny(text_file, dense_warmup=0.2, steps=100, checkpoint_every=10, evaluate_every=10)
    alone = pretrain(config, tmp_path / "alone")

    together = launch(TORCHRUN, config, tmp_path / "together", tmp_path)
    out, err = together.communicate(timeout=300)
    assert together.returncode == 0, err
    results = json.loads(out.splitlines()[-1])  # gloo writes there too, in some versions
    assert results == json.loads((tmp_path / "together" / "results.json").read_text())
    assert results["processes"] == 2
    # Said once, not by each process.
    assert err.count("Text: ") == err.count("merged: 2 FFNs") == err.count("stage2  step 100/100") == 1
    # Float32 sums in another order: of 100 steps, the losses keep five digits.
    for name in ("dense", "warmup", "stage1", "stage2"):
        ours, theirs = results["stages"][name], alone["stages"][name]
        assert [point["step"] for point in ours["curve"]] == [point["step"] for point in theirs["curve"]]
        assert [p["loss"] for p in ours["curve"]] == pytest.approx([p["loss"] for p in theirs["curve"]], rel=2e-5)
    expected = {
        name: load_file(tmp_path / "together" / name / "model.safetensors") for name in ("dense", "stage1", "stage2")
    }
    # Every process keeps the state of its own random numbers, all else is written once.
    names = files(tmp_path / "alone" / "stage1" / "checkpoint-60") - {"rng_state.pth"}
    assert files(tmp_path / "together" / "stage1" / "checkpoint-60") == names | {"rng_state_0.pth", "rng_state_1.pth"}

    killed = launch(TORCHRUN, config, tmp_path / "killed", tmp_path)
    deadline = time.monotonic() + 200
    while not (tmp_path / "killed" / "stage1" / "checkpoint-40" / "complete.json").exists():
        assert killed.poll() is None and time.monotonic() < deadline, killed.stderr.read()
        time.sleep(0.002)
    second = next(p for p in psutil.Process(killed.pid).children() if p.environ().get("RANK") == "1")
    second.send_signal(signal.SIGKILL)
    _, err = killed.communicate(timeout=200)
    assert killed.returncode != 0
    assert not (tmp_path / "killed" / "results.json").exists()
    resumed = launch(ACCELERATE, config, tmp_path / "killed", tmp_path)
    out, err = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, err
    assert json.loads(out.splitlines()[-1])["processes"] == 2
    assert "stage1: going on from checkpoint-" in err
    for name, tensors in expected.items():
        found = load_file(tmp_path / "killed" / name / "model.safetensors")
        assert all(torch.equal(found[key], value) for key, value in tensors.items()), name


# Gloo's threads get the processor when nothing else wants it: the order of events that ended in an abort, or in waiting
# for ever, in half of the runs or more.
LATE_THREADS = """
import contextlib, os, pathlib, time
from fastffn.cli import main
from fastffn.train import processes

join = processes.join

def join_with_late_threads():
    join()
    time.sleep(0.2)  # a thread has its name only once it runs
    mine = sorted(os.sched_getaffinity(0))
    for task in pathlib.Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread that has ended since
            os.sched_setaffinity(int(task.name), {mine[int(os.environ["RANK"]) % len(mine)]})
            if task.joinpath("comm").read_text() == "pt_gloo_runloop\\n":
                os.sched_setscheduler(int(task.name), os.SCHED_IDLE, os.sched_param(0))
                print("late in", os.environ["RANK"], flush=True)

processes.join = join_with_late_threads
main()
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="sets when threads run as Linux does")
def test_no_thread_aborts_the_command_at_its_end(text_file, tmp_path) -> None:
    (tmp_path / "late.py").write_text(LATE_THREADS)
    # Few steps: beside other work such threads hardly ever get to run.
    config = tiny(text_file, steps=4, warmup_steps=1, rewarm_steps=1, baseline=False)
    done = launch(TORCHRUN, config, tmp_path / "run", tmp_path, program=[str(tmp_path / "late.py")])
    out, err = done.communicate(timeout=300)
    assert done.returncode == 0, err
    assert "late in 0" in err and "late in 1" in err, err
    assert json.loads(out.splitlines()[-1])["processes"] == 2


@pytest.mark.parametrize(
    ("arguments", "code", "stream", "expected"),
    [
        (["nosuch"], 2, "stderr", "no command 'nosuch'"),
        (["--help"], 0, "stdout", "versions, devices, kinds of FFN"),
        (["pretrain", "--preset", "demo"], 2, "stderr", "--output is missing"),
    ],
)
def test_beside_others_a_command_ends_with_its_code_and_all_it_said(arguments, code, stream, expected) -> None:
    environment = dict(os.environ) | {"RANK": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "fastffn", *arguments], capture_output=True, text=True, env=environment
    )
    assert done.returncode == code
    assert expected in getattr(done, stream)


def test_beside_others_an_error_of_ours_is_not_lost(monkeypatch, capsys) -> None:
    """An exception nobody expected: its traceback and a code, then the end that this process may take."""
    from fastffn.cli import commands

    def fail(**options: object) -> None:
        raise RuntimeError("connection closed by peer")

    codes: list[int] = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(commands, "cli", fail)
    monkeypatch.setattr(processes, "leave", codes.append)
    commands.run()
    assert codes == [1]
    assert "RuntimeError: connection closed by peer" in capsys.readouterr().err


@pytest.mark.slow
def test_an_error_is_said_once_and_ends_all(text_file, tmp_path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("precious")
    done = launch(TORCHRUN, tiny(text_file), tmp_path / "run", tmp_path)
    _, err = done.communicate(timeout=200)
    assert done.returncode != 0
    # Lines are broken at 100 columns.
    assert " ".join(err.split()).count("is not empty and holds no FastFFN run") == 1
    assert 'Traceback (most recent call last):\n  File "' + str(tmp_path) not in err
    assert files(tmp_path / "run") == {"thesis.tex"}


@pytest.mark.parametrize(
    ("changes", "count", "expected"),
    [
        ({"batch": 12}, 1, (12, 1)),
        ({"batch": 12}, 4, (3, 1)),
        ({"batch": 12, "micro_batch": 3}, 2, (3, 2)),
        ({"batch": 12, "micro_batch": 1}, 4, (1, 3)),
    ],
)
def test_a_batch_is_what_all_processes_see(text_file, changes, count, expected) -> None:
    assert split_batch(tiny(text_file, **changes), count) == expected


def test_a_batch_that_does_not_divide(text_file) -> None:
    with pytest.raises(ConfigError, match=r"batch is 12; 5 processes .* the next that fits is 15"):
        split_batch(tiny(text_file, batch=12), 5)
    with pytest.raises(ConfigError, match=r"3 processes of micro_batch 4 .* the next that fits is 24"):
        split_batch(tiny(text_file, batch=20, micro_batch=4), 3)


@pytest.mark.parametrize("engine", ["FSDP", "DEEPSPEED"])
def test_engines_that_shard_are_refused(monkeypatch, engine) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    with pytest.raises(ConfigError, match="trains data-parallel"):
        processes.join()


def test_an_error_of_the_main_process_reaches_the_others(monkeypatch) -> None:
    """What process 1 sees when process 0 sends its exit code."""
    monkeypatch.setattr(processes, "count", lambda: 2)
    monkeypatch.setattr(processes, "is_main", lambda: False)

    def send(outcome):
        outcome[:] = [None, 2]

    monkeypatch.setattr("accelerate.utils.broadcast_object_list", send)
    with pytest.raises(MainProcessError) as caught:
        processes.on_main(lambda: pytest.fail("not the main process"))
    assert caught.value.exit_code == 2
