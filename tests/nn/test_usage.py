from __future__ import annotations

import pytest
import torch

import fastffn
from fastffn.nn.usage import counts_of


@pytest.mark.parametrize(("kind", "name", "each"), [("leaf_tree", "leaf_usage", 1), ("moe", "expert_usage", 2)])
def test_what_a_loader_leaves_in_the_buffer_is_not_counted(kind, name, each) -> None:
    """Modules made without memory: transformers gives such buffers memory, and does not clear it."""
    full = fastffn.build(kind, d_model=6)
    with torch.device("meta"):
        ffn = fastffn.build(kind, d_model=6)
    ffn.load_state_dict(full.state_dict(), assign=True)
    setattr(ffn, name, torch.full_like(full.get_buffer(name), 123456))
    if kind == "leaf_tree":
        assert ffn.usage_report() == "16 leaves, no tokens counted yet"
    ffn(torch.randn(20, 6))
    ffn(torch.randn(20, 6))
    assert int(counts_of(ffn, name).sum()) == 40 * each
