"""A whole model of GPT-2-small shape, with neuron trees and with dense FFNs: greedy decoding, and reading a prompt.

    python benchmarks/decode.py epyc-2cores

One sequence, random weights, float32, alternating in one process. Writes `benchmarks/results/decode/<NAME>.json`.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastffn.convert.files import write_json
from fastffn.convert.fresh import ModelShape, fresh_model
from fastffn.measure.machine import describe_machine
from fastffn.measure.timer import alternate
from fastffn.nn import NeuronTreeConfig

RESULTS = Path(__file__).parent / "results" / "decode"


def decode(model: Any, prompt: torch.Tensor, tokens: int) -> torch.Tensor:
    """`tokens` tokens, the likeliest each time, after the prompt `[1, S]`."""
    with torch.no_grad():
        output = model(input_ids=prompt, use_cache=True)
        found = [output.logits[:, -1:].argmax(-1)]
        while len(found) < tokens:
            output = model(input_ids=found[-1], past_key_values=output.past_key_values, use_cache=True)
            found.append(output.logits[:, -1:].argmax(-1))
    return torch.cat(found, 1)


def main() -> None:
    """Time both models, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", default="here", help="which machine it was")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--context", type=int, default=64, help="length of the prompt before decoding")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.manual_seed(0)
    shape = ModelShape(layers=12, d_model=768, heads=12, sequence=1024, vocabulary=50257)
    models = {
        "dense": fresh_model(shape).eval(),
        "neuron_tree 1x11": fresh_model(shape, NeuronTreeConfig(d_model=768, depth=11)).eval(),
    }
    prompt, long = (torch.randint(shape.vocabulary, (1, length)) for length in (args.context, 1024))
    parts: dict[str, Any] = {
        f"decode {args.tokens} tokens": lambda model: decode(model, prompt, args.tokens),
        "prompt of 1024 tokens": lambda model: decode(model, long, 1),
    }
    result: dict[str, Any] = {"shape": asdict(shape), "arguments": vars(args), "machine": describe_machine()}
    # What is left if FFNs cost nothing: the same model without them.
    bare = fresh_model(shape).eval()
    for block in bare.transformer.h:
        block.mlp = torch.nn.Identity()
    for part, run in parts.items():
        calls = {name: partial(run, model) for name, model in {**models, "no FFN": bare}.items()}
        timings = alternate(calls, rounds=args.rounds)
        dense = timings["dense"].median
        result[part] = {
            "seconds": {name: asdict(timing) for name, timing in timings.items()},
            "ratio": dense / timings["neuron_tree 1x11"].median,
            "free_ffn_bound": dense / timings["no FFN"].median,
        }
        print(part, {name: f"{timing.median:.4f} s" for name, timing in timings.items()}, end="; ")
        print(
            f"{result[part]['ratio']:.2f} times as fast, an FFN that cost nothing {result[part]['free_ffn_bound']:.2f}"
        )
    write_json(RESULTS / f"{args.name}.json", result)


if __name__ == "__main__":
    main()
