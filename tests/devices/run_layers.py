"""Layers, training steps and merges on the simulated device, beside the same on the CPU. Run in a process of its own:
a second device cannot be taken back.

    python tests/devices/run_layers.py simulated.so

Prints a JSON object: what ran, and which of torch's operators the device was asked for.
"""

from __future__ import annotations

import copy
import json
import sys
import types

import pytest
import torch

torch.ops.load_library(sys.argv[1])
torch.ops.fastffn_simulated.begin()
torch.utils.rename_privateuse1_backend("simulated")
module = types.ModuleType("torch.simulated")
module.is_available = lambda: True
module.device_count = lambda: 1
module.current_device = lambda: 0
module._is_in_bad_fork = lambda: False
module.manual_seed_all = lambda seed: None
module.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
torch._register_device_module("simulated", module)

import fastffn  # noqa: E402
from fastffn.measure.timer import accelerator, synchronize  # noqa: E402
from fastffn.ops import OPS  # noqa: E402
from fastffn.registry import get_kind  # noqa: E402

DEVICE = torch.device("simulated", 0)
LAYERS = {
    "dense": ("dense", {"d_hidden": 48}),
    "dense, gated": ("dense", {"d_hidden": 48, "gated": True, "activation": "silu"}),
    "low_rank": ("low_rank", {"d_hidden": 48, "rank": 4}),
    "block": ("block", {"d_hidden": 48, "blocks": 4, "rank": 2}),
    "narrow": ("narrow", {"d_hidden": 48}),
    "leaf_tree": ("leaf_tree", {"depth": 3, "leaf_width": 8}),
    "neuron_tree": ("neuron_tree", {"depth": 5, "trees": 2, "shared": 8}),
    "neuron_tree, straight": ("neuron_tree", {"depth": 4, "straight_through": True}),
    "int8": ("int8", {"d_hidden": 48}),
    "int8, gated": ("int8", {"d_hidden": 48, "gated": True, "activation": "silu"}),
    "moe": ("moe", {"experts": 4, "expert_width": 8, "active": 2}),
    "moe, gated": ("moe", {"experts": 4, "expert_width": 8, "active": 1, "gated": True}),
}


def steps(ffn: torch.nn.Module, x: torch.Tensor, merges: bool) -> list[torch.Tensor]:
    """Three training steps with AdamW, then inference, then the merge where there is one."""
    found = []
    if not ffn.config.TRAINS:
        own = x.clone().requires_grad_()
        found += torch.autograd.grad(ffn(own).square().mean(), own)
    else:
        optimizer = torch.optim.AdamW(ffn.parameters(), lr=1e-2)
    for _ in range(3 * ffn.config.TRAINS):
        optimizer.zero_grad()
        loss = ffn(x).square().mean() + fastffn.auxiliary_loss(ffn)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(ffn.parameters(), 1.0)
        optimizer.step()
        found.append(loss.detach())
    ffn.eval()
    with torch.no_grad():
        found.append(ffn(x))
        if merges:
            model = torch.nn.Sequential(ffn)
            fastffn.merge(model)
            found.append(model(x))
    return found


def main() -> None:
    """Run everything on both devices; raise where results differ."""
    assert accelerator() is not None and accelerator().type == "simulated"
    synchronize()
    with pytest.raises(RuntimeError, match="expected all tensors to be on the simulated device"):
        torch.mm(torch.ones(3, 3, device=DEVICE), torch.ones(3, 3))
    with pytest.raises(RuntimeError, match="no float64"):
        torch.ones(3, dtype=torch.float64, device=DEVICE)
    ran = []
    for name, (kind, fields) in LAYERS.items():
        recipe = get_kind(kind).module.merged_tensors(fastffn.build(kind, d_model=16, **fields).config)
        merges = recipe is not None and kind != "dense"
        # Without a name, the one that such a device gets.
        backends = {"moe": [None, "torch_grouped"], "neuron_tree": [None, "torch_grouped", "dense", "reference"]}
        for backend in backends.get(kind, [None]):
            torch.manual_seed(0)
            ffn = fastffn.build(kind, d_model=16, **fields)
            x = torch.randn(40, 16)
            other = copy.deepcopy(ffn).to(DEVICE)
            assert {tensor.device.type for tensor in other.state_dict().values()} == {"simulated"}
            expected = steps(ffn, x, merges)
            if backend is None:
                found = steps(other, x.to(DEVICE), merges)
            else:
                with fastffn.use_backend(backend):
                    found = steps(other, x.to(DEVICE), merges)
            for ours, theirs in zip(found, expected, strict=True):
                assert ours.device.type == "simulated"
                torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-4, atol=1e-5)
            ran.append(f"{name} by {backend}" if backend else name)
    verdicts = {name: [impl.refuses(op.example._replace(device="simulated")) for impl in op.impls if impl.name == "cpu"]
                for name, op in OPS.items()}  # fmt: skip
    torch.testing.assert_close(torch.full((3,), 2.0, device=DEVICE).cpu(), torch.full((3,), 2.0))
    print(json.dumps({
        "ran": ran, "refusals": verdicts, "operators": torch.ops.fastffn_simulated.operators().split(),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
