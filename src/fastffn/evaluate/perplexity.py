"""Perplexity of a causal language model on a text, with context and stride stated.

The text is read as one stream (documents joined by the end-of-text token). Windows of `context` tokens advance by
`stride`; in each only the tokens are scored that no window before it has scored. Every token but the first of the
stream is scored once, with at least `context - stride` tokens of context where there are so many before it.

Per token: `exp(nll / tokens)`. Per word (stretches between white space, as in WikiText): `exp(nll / words)`; it does
not depend on the tokenizer. Bits per byte: `nll / (ln 2 * UTF-8 bytes)`; neither does it. The end-of-text tokens
between documents are scored like any other.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fastffn.convert.loading import is_causal, read_config
from fastffn.data.text import DOCUMENT_SEPARATOR, find_text
from fastffn.data.tokenise import encoded_pieces
from fastffn.data.tokenizer import fits_vocabulary, load_tokenizer
from fastffn.errors import CheckpointError, ConfigError, DataError
from fastffn.evaluate.load import load_language_model
from fastffn.measure.machine import describe_machine

# At a time: their logits, one for each token of the vocabulary, are gigabytes where windows are long.
_TOKENS = 8192


def evaluate_perplexity(
    model: str | Path,
    data: str,
    *,
    split: str | None = None,
    column: str = "text",
    separator: str | None = DOCUMENT_SEPARATOR,
    tokenizer: str | None = None,
    context: int | None = None,
    stride: int | None = None,
    batch: int | None = None,
) -> dict[str, Any]:
    """Perplexity of the model in a directory.

    Args:
        model: directory of a causal language model, dense or with FastFFN kinds.
        data, split, column, separator: see `find_text`.
        tokenizer: directory or hub name; None: the model's own.
        context: tokens in a window; None: as many as the model can take.
        stride: tokens between windows; None: half the context.
        batch: windows at a time; None: 8, or as many as make 8,192 tokens where that is less.

    Returns:
        `token_perplexity`, `word_perplexity` (None for text without white space), `bits_per_byte`, `nll` (nats in
        all), the counts, and what was used.

    Raises:
        CheckpointError: the model is missing or corrupt.
        DataError: there is no text, or the tokenizer is not the model's.
        ConfigError: context or stride are out of range.
    """
    import transformers

    directory = Path(model)
    config_json = read_config(directory)
    names = config_json.get("architectures") or []
    if names and not is_causal(names[0]):
        raise CheckpointError(
            f"{directory} is a {names[0]}, no causal language model: perplexity is theirs. How far a converted encoder "
            "is from its original, `fastffn distill` reports."
        )
    source = find_text(data, split=split, column=column, separator=separator)
    words = load_tokenizer(tokenizer or str(directory))
    size = config_json.get("vocab_size")
    if isinstance(size, int) and not fits_vocabulary(len(words), size):
        raise DataError(
            f"The tokenizer {tokenizer or directory} has {len(words)} tokens, the model {directory} {size}: they do "
            "not belong together. Name the model's tokenizer with --tokenizer."
        )
    progress = sys.stderr.isatty()
    if not progress:
        transformers.utils.logging.disable_progress_bar()
    net = load_language_model(directory)
    limit = getattr(net.config, "max_position_embeddings", None)
    context = context if context is not None else limit or 1024
    stride = stride if stride is not None else max(1, context // 2)
    if context < 2 or (limit and context > limit):
        raise ConfigError(f"context is {context}; it must be from 2 to {limit or 'any number'}, what the model takes.")
    if not 1 <= stride < context:
        raise ConfigError(f"stride is {stride}; it must be from 1 to context - 1 = {context - 1}.")
    if batch is None:
        batch = max(1, min(8, _TOKENS // context))
    if batch < 1:
        raise ConfigError(f"batch is {batch}; it must be at least 1.")

    tokens: list[int] = []
    n_words = n_bytes = 0
    for piece, ids in encoded_pieces(words, source.pieces()):
        tokens += ids
        n_words += len(piece.text.split())
        n_bytes += len(piece.text.encode("utf-8"))
        if piece.ends_document:
            tokens.append(words.eos_token_id)
    if len(tokens) < 2:
        raise DataError(f"{data} has {len(tokens)} tokens; perplexity needs at least two.")
    nll = _nll(net, torch.tensor(tokens), context, stride, batch, progress)
    scored = len(tokens) - 1
    return {
        "token_perplexity": math.exp(nll / scored),
        # Chinese has no white space between words: what there is then is no number of words.
        "word_perplexity": math.exp(nll / n_words) if nll < 700 * n_words else None,
        "bits_per_byte": nll / (math.log(2) * n_bytes),
        "nll": nll,
        "tokens": scored,
        "words": n_words,
        "bytes": n_bytes,
        "context": context,
        "stride": stride,
        "model": str(directory),
        "data": data,
        "machine": describe_machine(),
    }


def windows(length: int, context: int, stride: int) -> list[tuple[int, int, int]]:
    """`(begin, end, first)` of each window over `length` tokens; it scores the tokens from `first` to `end`."""
    found = []
    scored = 1
    for begin in range(0, length, stride):
        end = min(begin + context, length)
        if end > scored:
            found.append((begin, end, scored))
            scored = end
        if end == length:
            break
    return found


@torch.no_grad()
def _nll(net: Any, tokens: torch.Tensor, context: int, stride: int, batch: int, progress: bool) -> float:
    """Negative log-likelihood in nats of all tokens but the first."""
    total = 0.0
    todo = windows(len(tokens), context, stride)
    device = next(net.parameters()).device
    bar = tqdm(total=len(tokens) - 1, unit="token", desc="perplexity", disable=not progress)
    while todo:
        # Windows of one length go together; only the last can be shorter.
        group = [w for w in todo[:batch] if w[1] - w[0] == todo[0][1] - todo[0][0]]
        todo = todo[len(group) :]
        ids = torch.stack([tokens[begin:end] for begin, end, _ in group]).to(device)
        logits = net(input_ids=ids, use_cache=False).logits
        for row, (begin, end, first) in enumerate(group):
            targets = ids[row, first - begin :]
            scores = logits[row, first - begin - 1 : end - begin - 1].float()
            total += float(torch.nn.functional.cross_entropy(scores, targets, reduction="sum").double())
            bar.update(end - first)
    bar.close()
    return total
