"""What a run reads: its tokenizer, its token blocks, and the checkpoint it starts from."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastffn.convert.fresh import ModelShape
from fastffn.data.blocks import TokenBlocks, token_blocks
from fastffn.data.digest import file_digest
from fastffn.data.masking import Masking
from fastffn.data.text import find_text
from fastffn.data.tokenizer import fits_vocabulary, load_tokenizer, train_tokenizer, training_size
from fastffn.errors import ConfigError, DataError
from fastffn.train import processes
from fastffn.train.config import SHAPE_FIELDS, PretrainConfig
from fastffn.train.processes import on_main, say

# What validates, in words.
HELD_OUT = {
    "documents": "whole documents held out",
    "stretches": "stretches held out of few documents: their neighbours are trained on",
    "validation text": "a text of its own",
}


@dataclass(frozen=True)
class RunText:
    """The text of a run.

    Attributes:
        config: the run.
        tokenizer: its tokenizer.
        blocks: all that the text gave.
        validation: the blocks that are validated on.
        tokenised_per_second: tokens; None where the blocks were there already.
    """

    config: PretrainConfig
    tokenizer: Any
    blocks: TokenBlocks
    validation: Any
    tokenised_per_second: float | None

    @property
    def train(self) -> Any:
        """The blocks to train on."""
        return self.blocks.train

    @property
    def masking(self) -> Masking | None:
        """How blocks are masked, for a model that predicts masked tokens."""
        return Masking.of(self.tokenizer) if self.config.masked else None

    @property
    def identity(self) -> str:
        """Text that differs whenever the text or the start of the run do."""
        start = weights_identity(Path(self.config.init_from)) if self.config.init_from is not None else []
        return " ".join([self.blocks.identity, *start])

    def facts(self) -> dict[str, Any]:
        """What a report says of it."""
        return {
            "characters": self.blocks.train_characters + self.blocks.validation_characters,
            "documents": self.blocks.train_documents + self.blocks.validation_documents,
            "held_out": self.blocks.held_out,
            "tokenised_per_second": self.tokenised_per_second,
            "train_tokens": len(self.train) * self.config.sequence,
            "validation_tokens": len(self.validation) * self.config.sequence,
            "vocabulary": len(self.tokenizer),
        }


def read_text(config: PretrainConfig, saved: Path | None) -> RunText:
    """Reads a run's text, in all processes at once.

    Args:
        config: the run.
        saved: directory of the tokenizer that an earlier attempt has left, if it has; None for a new run.

    Raises:
        DataError: no text, too little, or a tokenizer that does not fit.
    """
    tokenizer = on_main(lambda: _tokenizer(config, saved))
    # What is wrong with the text's name is said once.
    on_main(lambda: find_text(config.data, column=config.text_column, separator=config.document_separator) and None)
    # Every process asks; the cache's lock lets one of each machine do the work, however long it takes.
    blocks = token_blocks(
        config.data,
        tokenizer,
        config.sequence,
        validation=config.validation,
        validation_fraction=config.validation_fraction,
        column=config.text_column,
        separator=config.document_separator,
    )
    processes.check_same("The text", blocks.identity)
    validation = spread(blocks.validation, config.validation_blocks)
    there, used = len(blocks.validation), len(validation)
    say(
        f"Text: {config.data}, {blocks.train_characters + blocks.validation_characters:,} characters in "
        f"{blocks.train_documents + blocks.validation_documents:,} documents; "
        f"{len(blocks.train) * config.sequence:,} tokens to train on, "
        f"{used * config.sequence:,} to validate on ({HELD_OUT[blocks.held_out]}"
        f"{f'; evenly out of {there * config.sequence:,}' if used < there else ''}); vocabulary "
        f"{len(tokenizer):,}."
    )
    # One process of each machine has done the work, not always the main one.
    worked = [(s, speed) for s, speed in processes.gather((blocks.seconds, blocks.tokens_per_second)) if speed]
    if worked:
        say(f"Tokenised in {worked[0][0]:.1f} s, {worked[0][1]:,.0f} tokens/s.")
    if len(blocks.train) < config.batch:
        raise DataError(
            f"The text makes {len(blocks.train)} blocks of {config.sequence} tokens, fewer than one batch of "
            f"{config.batch}. Give more text, or a smaller --batch."
        )
    return RunText(config, tokenizer, blocks, validation, worked[0][1] if worked else None)


def _tokenizer(config: PretrainConfig, saved: Path | None) -> Any:
    if saved is not None and saved.is_dir():
        tokenizer = load_tokenizer(str(saved), end_of_text=not config.masked)
    else:
        size = training_size(config.tokenizer)
        if size is None:
            tokenizer = load_tokenizer(config.tokenizer, end_of_text=not config.masked)
        else:
            source = find_text(config.data, column=config.text_column, separator=config.document_separator)
            tokenizer = train_tokenizer(source, size, mask=config.masked, progress=sys.stderr.isatty())
    if config.masked:
        Masking.of(tokenizer)
        if tokenizer.eos_token_id is None:
            # What separates documents in the blocks; BERT's own tokenizers end a text so.
            tokenizer.eos_token = tokenizer.sep_token
        if tokenizer.eos_token_id is None:
            raise DataError(
                f"The tokenizer '{config.tokenizer}' has neither eos_token nor sep_token; documents must be separated."
            )
    if config.vocabulary is not None and len(tokenizer) != config.vocabulary:
        raise DataError(
            f"The tokenizer '{config.tokenizer}' has {len(tokenizer)} tokens, but vocabulary is "
            f"{config.vocabulary}. Choose the tokenizer that fits, or another vocabulary."
        )
    if config.init_from is not None:
        known = ModelShape.of_checkpoint(Path(config.init_from)).vocabulary
        if training_size(config.tokenizer) is not None or not fits_vocabulary(len(tokenizer), known):
            raise DataError(
                f"The tokenizer '{config.tokenizer}' has {len(tokenizer)} tokens, the checkpoint "
                f"{config.init_from} {known}: they do not belong together. Name the tokenizer that it was trained "
                "with by --tokenizer."
            )
    return tokenizer


def spread(rows: Any, most: int) -> Any:
    """At most so many rows of a data set, evenly spread over it."""
    count = len(rows)
    return rows if count <= most else rows.select([number * count // most for number in range(most)])


def check_start(config: PretrainConfig, output: Path) -> None:
    """Raises ConfigError if the run's shape is not that of the checkpoint it starts from, or would be deleted."""
    check_outside(output, {"init_from": config.init_from, "tokenizer": config.tokenizer})
    if config.init_from is None:
        return
    there = ModelShape.of_checkpoint(Path(config.init_from))
    for name in SHAPE_FIELDS:
        here, known = getattr(config, name), getattr(there, name)
        if name == "architecture":
            here = config.model_type
        if name == "d_hidden":
            here, known = here or 4 * config.d_model, known or 4 * there.d_model
        if here != known:
            raise ConfigError(f"{name} is {here}, but the checkpoint {config.init_from} has {known}; leave it out.")
    if config.sequence > there.sequence:
        raise ConfigError(
            f"sequence is {config.sequence}, but the checkpoint {config.init_from} takes {there.sequence} at most."
        )


def check_outside(output: Path, given: dict[str, str | None]) -> None:
    """Raises ConfigError if something that a run reads lies in its own directory; `given`: fields and their paths."""
    for name, value in given.items():
        if (
            value
            and Path(value).exists()
            and output.resolve() in (Path(value).resolve(), *Path(value).resolve().parents)
        ):
            raise ConfigError(
                f"{name} is {value}, inside the run's own directory {output}, which a run may delete. Copy it "
                "elsewhere, or name another output."
            )


def weights_identity(directory: Path) -> list[str]:
    """Name and digest of each file of weights of a checkpoint."""
    return [f"{file.name} {file_digest(file)}" for file in sorted(directory.glob("*.safetensors"))]
