"""Token blocks in the memory-mapped cache of `datasets`: written once, found again by fingerprint.

`datasets` writes into a folder `....incomplete` under a lock, and renames it when all is there: of several processes
one does the work, and what a killed one leaves is never read.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import datasets

from fastffn.data.text import TextSource
from fastffn.data.tokenise import block_tables
from fastffn.errors import DataError

if TYPE_CHECKING:
    import pyarrow

# Changes when the same text and tokenizer would give other blocks: part of the fingerprint.
LAYOUT_VERSION = 3


@dataclass
class _Config(datasets.BuilderConfig):
    """All that the blocks depend on, in plain values: `datasets` makes the folder's name of them."""

    text: dict[str, str | None] | None = None
    tokenizer_json: str = ""
    end_of_text: int = 0
    block: int = 0
    every: int | None = None
    layout: int = 0


class TokenBlocksBuilder(datasets.ArrowBasedBuilder):
    """Writes the blocks as whole tables: row by row took eighty times as long (docs/log.md)."""

    BUILDER_CONFIG_CLASS = _Config
    source: TextSource
    seconds = 0.0

    def _info(self) -> Any:
        features = {
            "input_ids": datasets.Sequence(datasets.Value("int32"), length=self.config.block),
            "note": datasets.Value("string"),
        }
        return datasets.DatasetInfo(features=datasets.Features(features))

    def _split_generators(self, dl_manager: Any) -> list[Any]:
        return [datasets.SplitGenerator(name=datasets.Split.TRAIN)]

    def _generate_tables(self) -> Iterator[tuple[int, pyarrow.Table]]:
        begun = time.perf_counter()
        config = self.config
        # The numbers are the tables' keys; `datasets` before 5 has no type for them.
        yield from enumerate(
            block_tables(self.source, config.tokenizer_json, config.end_of_text, config.block, config.every)
        )
        self.seconds = time.perf_counter() - begun


def cached_rows(
    source: TextSource, tokenizer_json: str, end_of_text: int, block: int, every: int | None
) -> tuple[Any, float]:
    """The rows of `block_tables`, and the seconds that writing them took: 0.0 if they were there.

    Raises:
        DataError: the text cannot be read.
    """
    # There is a bar of ours, which knows what is being done.
    shown = not datasets.are_progress_bars_disabled()
    if shown:
        datasets.disable_progress_bars()
    try:
        # Only what is given here is part of the fingerprint; the defaults above are not.
        builder = TokenBlocksBuilder(
            # Not where it lies: text that was moved or fetched again is the same text.
            text={name: getattr(source, name) for name in ("identity", "kind", "split", "column", "separator")},
            tokenizer_json=tokenizer_json,
            end_of_text=end_of_text,
            block=block,
            every=every,
            layout=LAYOUT_VERSION,
        )
        builder.source = source
        builder.download_and_prepare()
    except (OSError, datasets.exceptions.DatasetGenerationError) as error:
        # datasets wraps what was raised while the blocks were made; the user wants the cause.
        cause = error if isinstance(error, OSError) else error.__cause__
        if isinstance(cause, DataError):
            raise cause from None
        if isinstance(cause, OSError):
            raise DataError(
                f"The token blocks cannot be written into {datasets.config.HF_DATASETS_CACHE} ({cause}). Another "
                "folder is named by HF_DATASETS_CACHE, and by TMPDIR for validation blocks until all are made."
            ) from error
        raise
    finally:
        if shown:
            datasets.enable_progress_bars()
    return builder.as_dataset(split=datasets.Split.TRAIN), builder.seconds
