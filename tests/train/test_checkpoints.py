"""A checkpoint is gone on from only if all of it is there."""

from __future__ import annotations

import os

import pytest

from fastffn.train import checkpoints


def make(stage, number, *, whole=True):
    directory = stage / f"checkpoint-{number}"
    directory.mkdir(parents=True)
    (directory / "model.safetensors").write_bytes(b"12345")
    (directory / "optimizer.pt").write_bytes(b"123")
    if whole:
        checkpoints.mark_complete(directory)
    return directory


def test_what_has_no_mark_is_ignored_and_said_so(tmp_path) -> None:
    assert checkpoints.newest_complete(tmp_path / "nothing") == (None, [])
    make(tmp_path, 9, whole=False)
    found, ignored = checkpoints.newest_complete(tmp_path)
    assert found is None
    assert ignored == [f"{tmp_path / 'checkpoint-9'} is ignored: it was not written to its end."]
    whole = make(tmp_path, 5)
    make(tmp_path, 100, whole=False)
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-7").touch()
    found, ignored = checkpoints.newest_complete(tmp_path)
    assert found == whole
    assert [line.split(" is ")[0] for line in ignored] == [str(tmp_path / f"checkpoint-{n}") for n in (100, 9)]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda d: (d / "optimizer.pt").write_bytes(b"12"), "optimizer.pt has 2 bytes instead of 3"),
        (lambda d: (d / "optimizer.pt").unlink(), "optimizer.pt is missing"),
        (lambda d: (d / checkpoints.MARK).write_text("{"), "is unreadable or corrupt"),
    ],
    ids=["cut", "gone", "mark"],
)
def test_the_one_before_a_damaged_one_is_taken(tmp_path, damage, reason) -> None:
    before, damaged = make(tmp_path, 10), make(tmp_path, 20)
    assert checkpoints.newest_complete(tmp_path) == (damaged, [])
    damage(damaged)
    found, ignored = checkpoints.newest_complete(tmp_path)
    assert found == before
    assert len(ignored) == 1 and reason in ignored[0]


def test_two_whole_ones_are_kept_whatever_else_is_there(tmp_path) -> None:
    for number in (1, 2, 3, 4):
        make(tmp_path, number)
    make(tmp_path, 5, whole=False)
    # An old one touched last: the Trainer's own rotation would take it for the newest.
    os.utime(tmp_path / "checkpoint-1")
    checkpoints.remove_old(tmp_path)
    assert [path.name for path in checkpoints.checkpoints(tmp_path)] == ["checkpoint-5", "checkpoint-4", "checkpoint-3"]


def test_a_half_deleted_one_is_not_whole(tmp_path, monkeypatch) -> None:
    directory = make(tmp_path, 1)

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.remove(directory)
    assert checkpoints.why_incomplete(directory) == "it was not written to its end"
