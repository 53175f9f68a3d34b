"""Trees with int8 weights beside float32 and bfloat16 ones: outputs, then time, one layer and a stack of twelve.

    python benchmarks/int8.py [--threads 2]

1x11, D = 768, random weights, batches of random tokens that take turns, fresh outputs, medians of alternating calls in
one process. "float32" is the baseline of every ratio; `fastffn bench layer` compares that one with dense FFNs.
"""

from __future__ import annotations

import argparse

import torch

import fastffn
from fastffn.measure.machine import describe_machine
from fastffn.measure.timer import alternate
from fastffn.nn import Int8NeuronTree

WIDTH, LAYERS = 768, 12


def main() -> None:
    """Times one layer, then a stack, and prints a line for each number of tokens."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    torch.set_num_threads(parser.parse_args().threads)
    torch.manual_seed(0)
    trees = [fastffn.build("neuron_tree", d_model=WIDTH).eval() for _ in range(LAYERS)]
    stacks = {
        "float32": (trees, torch.float32),
        "bfloat16": ([fastffn.build("neuron_tree", d_model=WIDTH).bfloat16().eval() for _ in trees], torch.bfloat16),
        "int8": ([Int8NeuronTree.from_float(tree) for tree in trees], torch.float32),
    }
    print(describe_machine(), f"{torch.get_num_threads()} threads", sep="\n")
    x = torch.randn(2000, WIDTH)
    with torch.no_grad():
        exact, rounded = trees[0](x), stacks["int8"][0][0](x)
        away = ((exact - rounded).norm(dim=1) / exact.norm(dim=1)).median()
    print(f"int8 output, relative distance from float32's, median token: {away:.4f}")
    for layers in (1, LAYERS):
        for tokens in (1, 8, 64, 512, 4096, 16384):
            if layers > 1 and tokens > 512:
                continue
            batches = [torch.randn(tokens, WIDTH) for _ in range(max(2, min(64, 512 // tokens)))]
            calls = {name: _call(stack[:layers], batches, dtype) for name, (stack, dtype) in stacks.items()}
            with torch.no_grad():
                found = alternate(calls, rounds=60 if tokens < 4096 else 15, block=max(1, 12 // layers))
            seconds = {name: found[name].median for name in stacks}
            print(
                f"{layers:2} layers {tokens:6,} tokens: "
                + ", ".join(f"{n} {s * 1e6:,.1f} us ({seconds['float32'] / s:.2f})" for n, s in seconds.items()),
                flush=True,
            )


def _call(layers, batches, dtype):
    given, turn = [batch.to(dtype) for batch in batches], [0]

    def call():
        turn[0] += 1
        x = given[turn[0] % len(given)]
        return [layer(x) for layer in layers]

    return call


if __name__ == "__main__":
    main()
