"""Small teachers and their converted students on disk, and runs between them."""

from __future__ import annotations

from pathlib import Path

import torch

import fastffn
from fastffn import LowRankConfig
from fastffn.train.distill.config import DistillConfig
from tests.conftest import tiny_gpt2_config

SMALL = {
    "sequence": 16,
    "batch": 4,
    "layer_steps": 8,
    "steps": 8,
    "warmup_steps": 2,
    "layer_learning_rate": 1e-2,
    "learning_rate": 1e-2,
    "validation_blocks": 16,
    "evaluate_every": 4,
    "checkpoint_every": 3,
    "log_every": 2,
}


def save_gpt2_pair(where: Path, tokenizer, ffn=None) -> tuple[Path, Path]:
    """A random GPT-2 with dropout, `where / "teacher"`, and what a conversion makes of it, `where / "student"`."""
    from transformers import GPT2LMHeadModel

    torch.manual_seed(1)
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.1)
    model = GPT2LMHeadModel(tiny_gpt2_config(vocab_size=300, initializer_range=0.2, **dropout))
    model.save_pretrained(where / "teacher")
    fastffn.convert(model, ffn or LowRankConfig(rank=4))
    model.save_pretrained(where / "student")
    tokenizer.save_pretrained(where / "student")
    return where / "student", where / "teacher"


def tiny(pair: tuple[Path, Path], text: Path, **changes) -> DistillConfig:
    return DistillConfig(student=str(pair[0]), teacher=str(pair[1]), data=str(text), **(SMALL | changes))
