"""UltraFastBERT's tree of neurons on a CPU: 12 of 4,095 neurons a token, beside a dense FFN that computes them all.

The dense one is torch's own, eager; `fastffn bench layer` compares with the fastest that there is.
"""

import tempfile
import time
from pathlib import Path

import torch

import fastffn
from fastffn import DenseConfig, NeuronTreeConfig

torch.manual_seed(0)
tree = fastffn.build(NeuronTreeConfig(d_model=768, depth=11)).eval()
dense = fastffn.build(DenseConfig(d_model=768, d_hidden=4095)).eval()

# Saved and loaded like any module of torch; the configuration is plain values.
with tempfile.TemporaryDirectory() as folder:
    torch.save({"config": tree.config.to_dict(), "weights": tree.state_dict()}, Path(folder) / "tree.pt")
    saved = torch.load(Path(folder) / "tree.pt")
loaded = fastffn.build(NeuronTreeConfig.from_dict(saved["config"])).eval()
loaded.load_state_dict(saved["weights"])


def median_seconds(ffn, x):
    times = []
    for _ in range(9):
        begun = time.perf_counter()
        ffn(x)
        times.append(time.perf_counter() - begun)
    return sorted(times)[4]


with torch.no_grad():
    for tokens in (1, 64, 1024):
        x = torch.randn(tokens, 768)
        assert torch.equal(loaded(x), tree(x))
        fast, slow = median_seconds(tree, x), median_seconds(dense, x)
        print(
            f"{tokens:5,} tokens: dense {slow * 1e3:.2f} ms, tree {fast * 1e3:.2f} ms, {slow / fast:.0f} times as fast"
        )

# The definition, which every backend is tested against.
with torch.no_grad(), fastffn.use_backend("reference"):
    reference = tree(x)
print(f"largest difference to the reference {(reference - tree(x)).abs().max():.1e}")
