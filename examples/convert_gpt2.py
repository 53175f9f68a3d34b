"""A GPT-2: factorise its FFNs, save it, load it again, and make it dense.

The model here is small and random, so that the example needs no download; a pretrained one goes the same way.
"""

import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import fastffn
import fastffn.hf  # so that from_pretrained knows FastFFN's kinds
from fastffn import LowRankConfig

torch.manual_seed(0)
model = GPT2LMHeadModel(
    GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=500, bos_token_id=0, eos_token_id=0)
).eval()
tokens = torch.randint(0, 500, (1, 20))
dense = model(tokens).logits

print(fastffn.convert(model, LowRankConfig(rank=16)))
factorised = model(tokens).logits
print(f"logits changed by up to {(factorised - dense).abs().max():.3f}")

with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(Path(folder) / "factorised")
    loaded = AutoModelForCausalLM.from_pretrained(Path(folder) / "factorised")
    assert torch.equal(loaded(tokens).logits, factorised)

    fastffn.merge(loaded)
    loaded.save_pretrained(Path(folder) / "dense")  # an ordinary GPT-2 from here on
    again = AutoModelForCausalLM.from_pretrained(Path(folder) / "dense")
    print(f"after merging the logits differ by {(again(tokens).logits - factorised).abs().max():.1e}")
    assert torch.allclose(again(tokens).logits, factorised, atol=1e-4)
