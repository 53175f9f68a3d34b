from __future__ import annotations

import sys

import datasets
import pytest

from fastffn.data import progress
from fastffn.data.blocks import token_blocks


@pytest.fixture
def text(tmp_path) -> str:
    (tmp_path / "a.txt").write_text("the cat sees the river.\n" * 2000)
    return str(tmp_path / "a.txt")


def test_a_line_once_a_minute(text, tokenizer, monkeypatch, capfd) -> None:
    token_blocks(text, tokenizer, 16)
    assert capfd.readouterr() == ("", "")
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.0)
    token_blocks(text, tokenizer, 17)
    out, err = capfd.readouterr()
    assert out.startswith(f"Tokenising {text}: 0 of 0 MB read, 1 documents, ")
    assert out.count("\n") == 1
    assert err == ""
    token_blocks(text, tokenizer, 17)
    assert capfd.readouterr() == ("", "")


def test_a_bar_on_a_terminal(text, tokenizer, monkeypatch, capfd) -> None:
    bars = sys.modules["datasets.utils.tqdm"]
    monkeypatch.setattr(bars, "HF_DATASETS_DISABLE_PROGRESS_BARS", None)
    monkeypatch.setattr(bars, "_hf_datasets_progress_bars_disabled", False)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    token_blocks(text, tokenizer, 18)
    out, err = capfd.readouterr()
    assert out == ""
    assert f"tokenising {text}: 100%" in err
    assert "48.0k/48.0k" in err
    assert "a second" in err
    # That of `datasets` is off only as long as it would disturb.
    assert "Generating" not in err
    assert not datasets.are_progress_bars_disabled()


def test_documents_where_no_bytes_are_known(monkeypatch, capfd) -> None:
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.0)
    shown = progress.Progress("owner/name", None)
    shown.update(0, 1234, 5678)
    shown.close()
    assert capfd.readouterr().out.startswith("Tokenising owner/name: 1,234 documents, 5,678 tokens, ")
