"""Fixtures shared by all tests. Nothing here or in any test reaches a network."""

from __future__ import annotations

import os

# Before any test imports a library that reads them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["MPLBACKEND"] = "Agg"
# Triton asks when a kernel's file is imported. Kernels are tested on a CPU; `benchmarks/gpu.py` checks them on a GPU.
os.environ["TRITON_INTERPRET"] = "1"

from pathlib import Path

import pytest
import torch

from fastffn import settings


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Token blocks go into a cache of this test run only."""
    import datasets

    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets-cache")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def data_dir() -> Path:
    """The folder of real texts; the test is skipped where there is none."""
    found = settings.data_dir()
    if found is None:
        pytest.skip("FASTFFN_DATA_DIR names no folder: no real texts and tokenizers here")
    return found


def tiny_gpt2_config(**changes):
    from transformers import GPT2Config

    values = {
        "vocab_size": 97,
        "n_positions": 32,
        "n_embd": 24,
        "n_layer": 2,
        "n_head": 4,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return GPT2Config(**(values | changes))


@pytest.fixture
def gpt2():
    """A small GPT-2 with random weights and biases, in evaluation mode."""
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel(tiny_gpt2_config()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, 97, (2, 16))


def make_text(sentences: int = 3000) -> str:
    """English-looking text, the same every time: enough to learn something from, small enough for seconds."""
    subjects = ["the cat", "a dog", "my neighbour", "the old clock", "every child", "no machine"]
    verbs = ["sees", "follows", "forgets", "repairs", "measures", "believes"]
    objects = ["the river", "a small house", "its own shadow", "the second door", "a warm stone", "the long road"]
    lines = []
    state = 12345
    for _ in range(sentences):
        picks = []
        for words in (subjects, verbs, objects):
            state = (1103515245 * state + 12345) % 2**31
            picks.append(words[(state >> 16) % len(words)])
        lines.append(" ".join(picks) + ".")
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "sentences.txt"
    path.write_text(make_text(), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tokenizer(text_file: Path):
    from fastffn.data.text import find_text
    from fastffn.data.tokenizer import train_tokenizer

    return train_tokenizer(find_text(str(text_file)), 300)
