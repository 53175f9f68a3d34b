"""The dense FFN that others are measured against: torch's own way, and oneDNN with packed weights (inference only).

    python benchmarks/dense.py epyc-2cores

On processors that are not Intel's, MKL may not use the widest vectors; oneDNN does. Writes
`benchmarks/results/dense/<NAME>.json`.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from fastffn.convert.files import write_json
from fastffn.measure.machine import describe_machine
from fastffn.measure.timer import alternate

RESULTS = Path(__file__).parent / "results" / "dense"
WIDTH, NEURONS = 768, 4095


@torch.no_grad()
def main() -> None:
    """Both ways at several sizes of the batch, with one thread and with two."""
    torch.manual_seed(0)
    up, down = torch.randn(NEURONS, WIDTH) / 28, torch.randn(WIDTH, NEURONS) / 64
    up_bias, down_bias = torch.zeros(NEURONS), torch.zeros(WIDTH)
    mkldnn: Any = torch.ops.mkldnn
    rows = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for tokens in (1, 8, 64, 512, 4096):
            x = torch.randn(tokens, WIDTH)
            packed = [mkldnn._reorder_linear_weight(weight, tokens) for weight in (up, down)]

            def eager(x: torch.Tensor = x) -> torch.Tensor:
                return F.linear(F.gelu(F.linear(x, up, up_bias)), down, down_bias)

            def onednn(x: torch.Tensor = x, packed: Any = packed) -> Any:
                hidden = mkldnn._linear_pointwise(x, packed[0], up_bias, "gelu", [], "none")
                return mkldnn._linear_pointwise(hidden, packed[1], down_bias, "none", [], "")

            torch.testing.assert_close(onednn(), eager(), rtol=1e-4, atol=1e-4)
            timings = alternate({"eager": eager, "onednn": onednn}, rounds=7, block=3)
            rows.append({"threads": threads, "tokens": tokens} | {name: asdict(t) for name, t in timings.items()})
            ratio = timings["eager"].median / timings["onednn"].median
            print(f"{threads} threads, {tokens} tokens: oneDNN is {ratio:.2f} times as fast")
    name = sys.argv[1] if len(sys.argv) > 1 else "here"
    write_json(RESULTS / f"{name}.json", {"rows": rows, "machine": describe_machine()})


if __name__ == "__main__":
    main()
