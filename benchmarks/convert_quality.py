"""What a converted model is worth beside its original: sentence embeddings, or perplexity."""

from __future__ import annotations

import lzma
import math
import random
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

# The columns with sentences. STS-B is left out, quality is measured on it, and MRPC, whose sentences it borrows from.
SENTENCES = {"SST-2": (0,), "RTE": (1, 2), "CoLA": (3,)}
# Of a task, so that the one with the most does not outweigh the others.
MOST = 12_000


def task_sentences(data: Path, part: str) -> list[str]:
    """The sentences of some GLUE tasks, without labels, in a fixed random order; `part` is `train` or `dev`."""
    texts = []
    for task, columns in SENTENCES.items():
        with lzma.open(data / f"glue/{task}/{part}.tsv.xz", "rt", encoding="utf-8") as file:
            rows = [line.rstrip("\n").split("\t") for line in file]
        rows = rows if task == "CoLA" else rows[1:]  # the others have a header
        texts += [row[column].strip() for row in rows[:MOST] for column in columns if len(row) > max(columns)]
    texts = [text for text in texts if text]
    random.Random(0).shuffle(texts)
    return texts


class Sentences:
    """A part of STS-B: rank correlation with what people say, and closeness to the original's embeddings.

    Args:
        directory: of the original.
        data: the folder that FASTFFN_DATA_DIR names.
        original: the dense model.
        part: `dev`, or `train`, of which the first 1,500 pairs are taken, as many as dev has.
    """

    def __init__(self, directory: Path, data: Path, original: Any, part: str = "dev") -> None:
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        with lzma.open(data / f"glue/STS-B/{part}.tsv.xz", "rt", encoding="utf-8") as file:
            rows = [line.rstrip("\n").split("\t") for line in file][1:1501]
        self.texts = [row[7] for row in rows] + [row[8] for row in rows]
        self.scores = [float(row[9]) for row in rows]
        self.original = self._embeddings(original)

    def __call__(self, model: Any) -> dict[str, float]:
        """`spearman` (times 100, as usual) and `cosine`, the mean over all sentences."""
        from scipy.stats import spearmanr

        found = self._embeddings(model)
        first, second = found.chunk(2)
        return {
            "spearman": 100 * float(spearmanr((first * second).sum(1), self.scores).statistic),
            "cosine": float((found * self.original).sum(1).mean()),
        }

    @torch.no_grad()
    def _embeddings(self, model: Any) -> torch.Tensor:
        """Mean-pooled, of length 1: `[sentences, D]`; sentences of like length go together."""
        order = sorted(range(len(self.texts)), key=lambda number: len(self.texts[number]))
        parts = []
        for start in range(0, len(order), 64):
            texts = [self.texts[number] for number in order[start : start + 64]]
            batch = self.tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=128)
            mask = batch["attention_mask"].unsqueeze(2)
            hidden = model(**batch).last_hidden_state.float()
            parts.append(F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1))
        return torch.cat(parts)[torch.tensor(order).argsort()]


class Perplexity:
    """Perplexity of the first tokens of WikiText-2's test set and of a corpus held out.

    Args:
        directory: of the original, for its tokenizer.
        data: the folder that FASTFFN_DATA_DIR names.
        tokens: of each text, in blocks of `block` that see nothing of each other.
        block: tokens in a block.
    """

    TEXTS = (("wikitext2", "wikitext-2/test.txt.xz"), ("corpus", "corpus/valid.txt.xz"))

    def __init__(self, directory: Path, data: Path, tokens: int = 4096, block: int = 512) -> None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(directory)
        self.blocks = {}
        for name, file in self.TEXTS:
            with lzma.open(data / file, "rt", encoding="utf-8") as lines:
                text = lines.read(8 * tokens)
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            self.blocks[name] = torch.tensor(ids[:tokens]).view(-1, block)

    def __call__(self, model: Any) -> dict[str, float]:
        """Of both texts."""
        return {name: self.of(model, blocks) for name, blocks in self.blocks.items()}

    @torch.no_grad()
    def of(self, model: Any, blocks: torch.Tensor) -> float:
        """Perplexity of `blocks [n, T]`."""
        total = 0.0
        for part in blocks.split(4):
            logits = model(input_ids=part, use_cache=False).logits[:, :-1]
            total += float(F.cross_entropy(logits.flatten(0, 1).float(), part[:, 1:].flatten(), reduction="sum"))
        return math.exp(total / blocks[:, 1:].numel())
