"""Tokenizers: from a directory, from a hub, or a byte-level BPE trained on the spot."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from fastffn.data.text import TextSource
from fastffn.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
MASK = "<|mask|>"
# All bytes and the end of a text.
SMALLEST = 257
# More text changes a vocabulary hardly at all, and costs minutes.
TRAINING_CHARACTERS = 50_000_000
# Vocabularies are padded up to a multiple of this for speed; more than that is another vocabulary.
PADDING = 128


def training_size(spec: str) -> int | None:
    """N if `spec` is `train:N`, None if it names a tokenizer.

    Raises:
        ConfigError: N is not a whole number of at least 257 (all bytes and the end of text; a mask token is one more).
    """
    if not spec.startswith("train:"):
        return None
    number = spec.removeprefix("train:")
    if not number.isdecimal() or int(number) < SMALLEST:
        raise ConfigError(
            f"tokenizer is '{spec}'; train:N wants a whole number N of at least {SMALLEST} (256 bytes and "
            f"{END_OF_TEXT})."
        )
    return int(number)


def fits_vocabulary(tokens: int, size: int) -> bool:
    """Whether a tokenizer of so many tokens can be that of a model whose embedding has `size` rows."""
    return size - PADDING < tokens <= size


def load_tokenizer(spec: str, *, end_of_text: bool = True) -> PreTrainedTokenizerFast:
    """The tokenizer in a directory or on a hub.

    Args:
        spec: the directory or name.
        end_of_text: whether it must have a token for the end of a text; those of BERT have none.

    Raises:
        DataError: there is none, it has no fast version, or no token for the end of a text.
    """
    from transformers import AutoTokenizer, GPT2Tokenizer, PreTrainedTokenizerFast

    path = Path(spec).expanduser()
    bare_bpe = (path / "vocab.json").is_file() and (path / "merges.txt").is_file()
    described = any((path / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
    if path.is_dir() and not (bare_bpe or described):
        raise DataError(
            f"No tokenizer could be loaded from the folder '{spec}': it has neither tokenizer.json nor "
            "tokenizer_config.json nor vocab.json with merges.txt."
        )
    try:
        if bare_bpe and not described:
            # OpenAI's two files, as GPT-2 was published.
            tokenizer = GPT2Tokenizer.from_pretrained(str(path))
        else:
            tokenizer = AutoTokenizer.from_pretrained(str(path) if path.is_dir() else spec)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise DataError(
            f"No tokenizer could be loaded from '{spec}' ({type(error).__name__}: {reason}). Name a directory"
            f"{'' if path.is_dir() else ' (there is none of that name)'}, a hub name, or train:N."
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise DataError(f"The tokenizer '{spec}' has no fast version (tokenizer.json); FastFFN needs one.")
    if end_of_text and tokenizer.eos_token_id is None:
        raise DataError(f"The tokenizer '{spec}' has no end-of-text token (eos_token); documents must be separated.")
    return tokenizer


def train_tokenizer(
    source: TextSource, size: int, *, mask: bool = False, progress: bool = False
) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `size` tokens, trained on the first fifty million characters of `source`.

    With `mask` one of them is the mask token of models that predict masked tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END_OF_TEXT, *([MASK] if mask else [])],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=progress,
    )
    tokenizer.train_from_iterator(_limited(source), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        mask_token=MASK if mask else None,
    )


def _limited(source: TextSource) -> Iterator[str]:
    characters = 0
    for piece in source.pieces():
        yield piece.text
        characters += len(piece.text)
        if characters >= TRAINING_CHARACTERS:
            return
