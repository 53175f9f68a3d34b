from __future__ import annotations

import datasets
import pytest

from fastffn.data import rows
from fastffn.data.blocks import token_blocks
from fastffn.data.text import find_text, splits_of
from fastffn.errors import DataError

real_builder = datasets.load_dataset_builder


@pytest.fixture(autouse=True)
def _resolve_anew():
    """Names are resolved once in a process, but here they change their meaning."""
    as_a_new_process()
    yield
    as_a_new_process()


def as_a_new_process() -> None:
    for cached in (rows._builder, rows._streams, rows._resolved):
        cached.cache_clear()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Data sets of local Parquet files in the place of the hub's; `asked` tells what was asked for."""

    class Hub(dict):
        def __init__(self) -> None:
            self.asked: list[tuple[str, str | None]] = []

        def put(self, name: str, **splits: list[str | None]) -> None:
            paths = {}
            for split, texts in splits.items():
                path = tmp_path / f"{len(self)}-{split}.parquet"
                datasets.Dataset.from_dict({"text": texts, "number": list(range(len(texts)))}).to_parquet(path)
                paths[split] = str(path)
            self[name] = paths

    found = Hub()

    def load(name, configuration=None):
        found.asked.append((name, configuration))
        if name not in found:
            raise FileNotFoundError(f"no {name}")
        return real_builder("parquet", data_files=found[name])

    monkeypatch.setattr(datasets, "load_dataset_builder", load)
    return found


def texts(data: str, **settings) -> list[str]:
    return [piece.text for piece in find_text(data, **settings).pieces()]


def test_streamed_by_name(hub, tmp_path) -> None:
    hub.put("owner/name", train=["first", None, " ", "second"], validation=["unseen"])
    assert texts("owner/name") == ["first", "second"]
    assert texts("owner/name", split="validation") == ["unseen"]
    assert splits_of(find_text("owner/name")) == ["train", "validation"]
    # Asked once, however often it is read; and nothing of it is stored.
    assert hub.asked == [("owner/name", None)]
    assert not list(datasets.config.HF_DATASETS_CACHE.glob("parquet*"))


@pytest.mark.parametrize(
    ("data", "name", "configuration"),
    [
        ("openwebtext", "Skylion007/openwebtext", None),
        ("wikitext", "Salesforce/wikitext", "wikitext-103-raw-v1"),
        ("wikitext-103", "Salesforce/wikitext", "wikitext-103-raw-v1"),
        ("wikitext-2", "Salesforce/wikitext", "wikitext-2-raw-v1"),
        ("wikitext:wikitext-2-raw-v1", "Salesforce/wikitext", "wikitext-2-raw-v1"),
        ("owner/name:part", "owner/name", "part"),
    ],
)
def test_names(hub, data, name, configuration) -> None:
    hub.put(name, train=["first"])
    assert texts(data) == ["first"]
    assert hub.asked == [(name, configuration)]


def test_the_lines_of_wikitext_are_joined_to_articles(hub) -> None:
    first = ["", " = Robert <unk> = \n", "", " Robert is = an actor . \n", " = = Career = = \n", " He played . \n"]
    second = [" = Du Fu = \n", "", " A poet . \n"]
    hub.put("Salesforce/wikitext", test=first + second)
    assert texts("wikitext-2", split="test") == ["".join(first), "".join(second)]


def test_identity_of_a_stream(hub) -> None:
    hub.put("owner/name", train=["first"], validation=["first"])
    identity = find_text("owner/name").identity
    assert find_text("owner/name", split="validation").identity != identity
    as_a_new_process()
    assert find_text("owner/name").identity == identity
    hub.put("owner/name", train=["changed"], validation=["first"])
    as_a_new_process()
    assert find_text("owner/name").identity != identity


def test_blocks_of_a_stream_are_reused(hub, tokenizer) -> None:
    hub.put("owner/name", train=["the cat sees the river. " * 50] * 4, validation=["no machine forgets. " * 50])
    first = token_blocks("owner/name", tokenizer, 16)
    assert first.held_out == "validation text"
    assert (first.train_documents, first.validation_documents) == (4, 1)
    assert first.seconds > 0
    again = token_blocks("owner/name", tokenizer, 16)
    assert again.seconds == 0.0
    assert again.identity == first.identity
    assert "machine" in tokenizer.decode(again.validation["input_ids"][:].flatten())


def test_blocks_that_are_there_need_no_network(hub, tokenizer, monkeypatch) -> None:
    hub.put("owner/once", train=["the cat sees the river. " * 50] * 4, validation=["no machine forgets. " * 50])
    first = token_blocks("owner/once", tokenizer, 16)
    as_a_new_process()

    def unreachable(name, configuration=None):
        raise ConnectionError(f"cannot reach {name}")

    monkeypatch.setattr(datasets, "load_dataset_builder", unreachable)
    again = token_blocks("owner/once", tokenizer, 16)
    assert (again.seconds, again.identity) == (0.0, first.identity)
    # What is not there does.
    with pytest.raises(DataError, match="ConnectionError: cannot reach owner/once"):
        token_blocks("owner/once", tokenizer, 17)
    with pytest.raises(DataError, match="ConnectionError: cannot reach owner/never"):
        find_text("owner/never")


def refused(data: str, words: str, **settings) -> None:
    with pytest.raises(DataError, match=words):
        texts(data, **settings)


def test_what_is_refused(hub, tmp_path, monkeypatch) -> None:
    hub.put("owner/name", train=["first"], test=["second"])
    refused("owner/name", "no split 'validation'; it has train, test", split="validation")
    refused("owner/name", "no text in a column 'body'; there is text, number", column="body")
    refused("owner/name", "row 1: column 'number' holds no text but int", column="number")
    refused("nobody/nothing", "'nobody/nothing' cannot be loaded as a data set: FileNotFoundError")
    refused("openwebtext", r"'openwebtext' \(Skylion007/openwebtext, .* cannot be loaded")
    # Mistyped ones are never asked for: without a network that takes half a minute.
    asked = list(hub.asked)
    refused("openwebtxt", "Did you mean 'openwebtext'")
    refused("wikitext2:x", "Did you mean 'wikitext-2'")
    refused("python-doc", "Did you mean 'python-docs'")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    refused("folder/tetx", "does not exist")
    assert hub.asked == asked


def test_reading_that_breaks_off(hub, tmp_path) -> None:
    hub.put("owner/name", train=["first"] * 1000)
    source = find_text("owner/name")
    pieces = source.pieces()
    next(pieces)
    path = tmp_path / "0-train.parquet"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match="Reading the data set 'owner/name' broke off"):
        list(source.pieces())


def test_offline_it_fails_at_once_and_says_so() -> None:
    refused("nobody/nothing", "cannot be loaded as a data set: ConnectionError.*")
