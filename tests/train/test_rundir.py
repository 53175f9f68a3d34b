from __future__ import annotations

import pytest

from fastffn.errors import CheckpointError, ConfigError, OutputError
from fastffn.train import rundir
from fastffn.train.config import PretrainConfig

CONFIG = PretrainConfig()


def test_a_new_directory(tmp_path) -> None:
    assert rundir.check_run(tmp_path / "a" / "b", CONFIG, overwrite=False) is False
    assert not (tmp_path / "a").exists()
    rundir.claim_run(tmp_path / "a" / "b", CONFIG)
    assert PretrainConfig.from_flat(rundir.read_config(tmp_path / "a" / "b" / "config.yaml")) == CONFIG


def test_a_run_that_never_trained_may_be_taken_over(tmp_path) -> None:
    rundir.claim_run(tmp_path, CONFIG)
    (tmp_path / "tokenizer").mkdir()
    assert rundir.check_run(tmp_path, PretrainConfig(seed=5), overwrite=False) is False


def test_the_same_run_goes_on(tmp_path) -> None:
    rundir.claim_run(tmp_path, CONFIG)
    (tmp_path / "dense").mkdir()
    assert rundir.check_run(tmp_path, CONFIG, overwrite=False) is True


def test_another_run_is_refused_and_named(tmp_path) -> None:
    rundir.claim_run(tmp_path, CONFIG)
    (tmp_path / "dense").mkdir()
    other = PretrainConfig(seed=5, ffn_options={"rank": 3})
    with pytest.raises(OutputError, match=r"rank: None there, 3 here") as caught:
        rundir.check_run(tmp_path, other, overwrite=False)
    assert "seed: 0 there, 5 here" in str(caught.value)
    assert "batch" not in str(caught.value)
    assert (tmp_path / "dense").is_dir()
    assert rundir.check_run(tmp_path, other, overwrite=True) is False
    assert (tmp_path / "dense").is_dir()  # until the new run is sure to start
    rundir.claim_run(tmp_path, other)
    assert not (tmp_path / "dense").exists()


def test_files_of_others_are_never_deleted(tmp_path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(OutputError):
            rundir.check_run(tmp_path, CONFIG, overwrite=overwrite)
    assert (tmp_path / "thesis.tex").read_text() == "precious"
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="is a file"), rundir.locked(tmp_path / "file"):
        pass


def test_the_lock_keeps_others_out_and_leaves_nothing(tmp_path) -> None:
    (tmp_path / "run").mkdir()
    for name in ("run", "new/one"):
        with rundir.locked(tmp_path / name):
            assert {path.name for path in (tmp_path / name).iterdir()} == {rundir.LOCK}
            with (
                pytest.raises(OutputError, match=r"Another process trains in .*Wait for it"),
                rundir.locked(tmp_path / name),
            ):
                pass
            # The one that was refused did not take the lock away.
            assert (tmp_path / name / rundir.LOCK).exists()
            assert rundir.check_run(tmp_path / name, CONFIG, overwrite=False) is False
    assert list((tmp_path / "run").iterdir()) == []
    assert not (tmp_path / "new" / "one").exists()
    with rundir.locked(tmp_path / "run"):
        rundir.claim_run(tmp_path / "run", CONFIG)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {rundir.CONFIG, rundir.LOCK}


def test_half_written_files_of_ours_go_and_no_others(tmp_path) -> None:
    rundir.claim_run(tmp_path, CONFIG)
    (tmp_path / "stage1" / "checkpoint-5").mkdir(parents=True)
    ours = [
        ".report.md.partial-1",
        ".merged.partial-x",
        ".loss_vs_time.png.partial.png",
        "stage1/.stage.json.partial-7",
    ]
    others = [".film.mp4.partial", ".merged", "notes.partial-1", "stage1/model.safetensors"]
    for name in ours + others:
        (tmp_path / name).touch()
    rundir.clear_partials(tmp_path)
    assert not any((tmp_path / name).exists() for name in ours)
    assert all((tmp_path / name).exists() for name in others)


def test_overwriting_goes_on_with_the_same_unfinished_run_and_begins_a_finished_one_anew(tmp_path) -> None:
    """So that a job that is started again by its own command line does not begin at zero each time."""
    rundir.claim_run(tmp_path, CONFIG)
    (tmp_path / "dense").mkdir()
    assert rundir.check_run(tmp_path, CONFIG, overwrite=True) is True
    (tmp_path / "results.json").touch()
    assert rundir.check_run(tmp_path, CONFIG, overwrite=False) is True
    assert rundir.check_run(tmp_path, CONFIG, overwrite=True) is False


def test_a_run_of_another_version_is_called_that(tmp_path) -> None:
    rundir.claim_run(tmp_path, CONFIG)
    (tmp_path / "dense").mkdir()
    path = tmp_path / rundir.CONFIG
    path.write_text("\n".join(line for line in path.read_text().splitlines() if "validation_blocks" not in line))
    with pytest.raises(OutputError, match="another version of FastFFN, which did not know validation_blocks"):
        rundir.check_run(tmp_path, CONFIG, overwrite=False)


def test_options_of_kinds_that_came_later_are_no_difference(tmp_path) -> None:
    rundir.claim_run(tmp_path, CONFIG)
    (tmp_path / "dense").mkdir()
    path = tmp_path / rundir.CONFIG
    lines = path.read_text().splitlines()
    assert "leaf_width: null" in lines
    path.write_text("\n".join(line for line in lines if line != "leaf_width: null"))
    assert rundir.check_run(tmp_path, CONFIG, overwrite=False) is True


def test_notes_written_meanwhile_are_kept(tmp_path) -> None:
    rundir.claim_run(tmp_path, CONFIG)
    (tmp_path / "dense").mkdir()
    (tmp_path / "log.txt").write_text("precious")
    rundir.claim_run(tmp_path, PretrainConfig(seed=5))
    assert not (tmp_path / "dense").exists()
    assert (tmp_path / "log.txt").read_text() == "precious"


def test_a_deletion_that_was_stopped_leaves_no_run(tmp_path, monkeypatch) -> None:
    rundir.claim_run(tmp_path, CONFIG)
    for name in ("dense", "stage1"):
        (tmp_path / name).mkdir()
    (tmp_path / "dense" / "stage.json").touch()

    def stopped(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(rundir.shutil, "rmtree", stopped)
        with pytest.raises(KeyboardInterrupt):
            rundir.claim_run(tmp_path, PretrainConfig(seed=5))
    with pytest.raises(OutputError, match="holds no FastFFN run"):
        rundir.check_run(tmp_path, CONFIG, overwrite=False)
    assert rundir.check_run(tmp_path, PretrainConfig(seed=5), overwrite=True) is False


def test_damaged_files_are_named(tmp_path) -> None:
    (tmp_path / "config.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        rundir.read_config(tmp_path / "config.yaml")
    (tmp_path / "config.yaml").write_text("just words")
    with pytest.raises(ConfigError, match="holds no fields"):
        rundir.read_config(tmp_path / "config.yaml")
    (tmp_path / "stage.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"stage\.json"):
        rundir.finished_stage(tmp_path)
