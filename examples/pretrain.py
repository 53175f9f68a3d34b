"""Two-stage pre-training from Python, on a text of your own; here a minute-long toy."""

import dataclasses
import tempfile
from pathlib import Path

from fastffn.train.config import PretrainConfig
from fastffn.train.pretrain import pretrain

config = PretrainConfig(
    tokenizer="train:512",
    layers=2,
    d_model=64,
    heads=4,
    sequence=32,
    ffn_options={"rank": 16},
    steps=60,
    warmup_steps=10,
    rewarm_steps=5,
    evaluate_every=10,
    checkpoint_every=30,
)

with tempfile.TemporaryDirectory() as folder:
    text = Path(folder) / "text.txt"
    text.write_text("".join(f"{n} times {m} is {n * m}.\n" for n in range(100) for m in range(40)), encoding="utf-8")
    results = pretrain(dataclasses.replace(config, data=str(text)), Path(folder) / "run")
    print({name: round(r["validation_loss"], 3) for name, r in results["stages"].items() if "validation_loss" in r})
