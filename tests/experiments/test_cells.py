from __future__ import annotations

import json

import pytest

from fastffn.errors import CheckpointError, OutputError
from fastffn.experiments.cells import opened, together


def test_a_finished_cell_is_not_made_again(tmp_path) -> None:
    output = tmp_path / "new" / "runs"
    with opened(output, {"width": 8}) as cells:
        assert cells.get("a", lambda: {"loss": 1.5}) == {"loss": 1.5}
    with opened(output, {"width": 8}) as cells:
        assert cells.get("a", lambda: pytest.fail("made again")) == {"loss": 1.5}
        assert cells.get("b", lambda: {"loss": 2.5}) == {"loss": 2.5}
    assert json.loads((output / "cells" / "b.json").read_text()) == {"loss": 2.5}


def test_a_cell_that_fails_leaves_nothing(tmp_path) -> None:
    def fails() -> dict:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError), opened(tmp_path, {}) as cells:
        cells.get("a", fails)
    assert not list(tmp_path.glob("cells/*"))


def test_other_settings_are_refused(tmp_path) -> None:
    with opened(tmp_path, {"width": 8, "epochs": None}):
        pass
    with pytest.raises(OutputError, match="width was 8, now 16"), opened(tmp_path, {"width": 16, "epochs": None}):
        pass


def test_something_else_is_left_alone(tmp_path) -> None:
    (tmp_path / "letters.txt").write_text("dear")
    with pytest.raises(OutputError, match=r"holds no such experiment \(letters.txt\)"), opened(tmp_path, {}):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["letters.txt"]


def test_one_at_a_time(tmp_path) -> None:
    with opened(tmp_path, {}), pytest.raises(OutputError, match="Another process"), opened(tmp_path, {}):
        pass


def test_a_corrupt_cell_is_named(tmp_path) -> None:
    with opened(tmp_path, {}) as cells:
        cells.get("a", lambda: {"loss": 1.5})
        (tmp_path / "cells" / "a.json").write_text("{")
        with pytest.raises(CheckpointError, match=r"a\.json is unreadable"):
            cells.get("a", dict)


def test_what_compares_other_things_is_another_cell() -> None:
    assert together("seconds", ["a", "b"]) == together("seconds", ("a", "b"))
    assert len({together("seconds", parts) for parts in (["a"], ["a", "b"], ["b", "a"])}) == 3
