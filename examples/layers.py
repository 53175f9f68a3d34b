"""A factorised FFN in a model of your own: train it, merge it, and nothing of FastFFN is left."""

import torch
from torch import nn

import fastffn
from fastffn import LowRankConfig

torch.manual_seed(0)
model = nn.Sequential(nn.LayerNorm(64), fastffn.build(LowRankConfig(d_model=64, rank=16)), nn.Linear(64, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

x = torch.randn(512, 64)
target = x[:, :1].sin()
for _step in range(100):
    loss = (model(x) - target).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
print(f"mean squared error {loss.item():.4f}, of predicting the mean {target.var().item():.4f}")
assert loss < 0.5 * target.var()

before = model(x)
fastffn.merge(model)
print("after merging:", [type(module).__name__ for module in model], f"{(model(x) - before).abs().max().item():.1e}")
assert torch.allclose(model(x), before, atol=1e-4)
