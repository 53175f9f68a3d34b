from __future__ import annotations

import pytest

from fastffn.data.text import find_text
from fastffn.data.tokenizer import load_tokenizer, train_tokenizer, training_size
from fastffn.errors import ConfigError, DataError


def test_trained_on_the_spot(tokenizer, tmp_path) -> None:
    assert len(tokenizer) == 300
    for text in ("the cat sees a small house.\n", "häßlich 漢字 🙂 \x00", ""):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(str(tmp_path))
    assert again("the river")["input_ids"] == tokenizer("the river")["input_ids"]
    assert again.eos_token_id == tokenizer.eos_token_id == 0


def test_the_same_text_gives_the_same_tokenizer(text_file, tokenizer) -> None:
    other = train_tokenizer(find_text(str(text_file)), 300)
    assert other.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_train_n() -> None:
    assert training_size("train:4096") == 4096
    assert training_size("gpt2") is None
    for spec in ("train:", "train:x", "train:256", "train:-5", "train:1e4"):
        with pytest.raises(ConfigError, match="at least 257"):
            training_size(spec)


def test_nothing_there(tmp_path) -> None:
    with pytest.raises(DataError, match="No tokenizer could be loaded"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(DataError, match="No tokenizer could be loaded"):
        load_tokenizer("nobody/nothing")


def test_without_an_end_of_text(tokenizer, tmp_path) -> None:
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer).save_pretrained(tmp_path)
    with pytest.raises(DataError, match="end-of-text"):
        load_tokenizer(str(tmp_path))


def test_openai_files(data_dir) -> None:
    tokenizer = load_tokenizer(str(data_dir / "gpt2-tokenizer"))
    assert len(tokenizer) == 50257
    assert tokenizer.eos_token_id == 50256
    assert tokenizer("Hello world")["input_ids"] == [15496, 995]
