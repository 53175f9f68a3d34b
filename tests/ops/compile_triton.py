# ruff: noqa: E402
"""Compiles the Triton kernels of an operation for given GPUs, where there is none: Triton's compiler needs no driver.

    python tests/ops/compile_triton.py cuda:90 hip:gfx942

runs every operation's Triton implementation with launches replaced by compilation, and prints a JSON line for each
kernel: its name, target, and bytes of shared memory. The interpreter says whether kernels compute the right thing;
this says whether a GPU's compiler takes them.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from typing import Any

assert os.environ.get("TRITON_INTERPRET", "0") == "0", "the interpreter's kernels cannot be compiled"

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from fastffn.ops.grouped_mlp.triton import IMPL as GROUPED_MLP
from fastffn.ops.neuron_tree.triton import IMPL as NEURON_TREE

TYPES = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")


def compiling(targets: list[GPUTarget], say: Any) -> Any:
    """What launches are replaced by."""
    seen = set()

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
        given = dict(zip(self.arg_names, args, strict=False)) | kwargs
        assert set(given) == set(self.arg_names), (self.fn.__name__, set(given) ^ set(self.arg_names))
        signature, constants, attributes = {}, {}, {}
        for number, parameter in enumerate(self.params):
            value = given[parameter.name]
            if parameter.is_constexpr:
                signature[parameter.name], constants[(number,)] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[parameter.name] = TYPES[value.dtype]
                attributes[(number,)] = [["tt.divisibility", 16]]
            elif value == 1:  # Triton makes a constant of it
                signature[parameter.name], constants[(number,)] = "constexpr", value
            else:
                signature[parameter.name] = "i32"
                if value % 16 == 0:
                    attributes[(number,)] = [["tt.divisibility", 16]]
        for target in targets:
            key = (self.fn.__qualname__, self.fn.__module__, str(target), str(signature), str(constants), str(options))
            if key in seen:
                continue
            seen.add(key)
            source = ASTSource(self, signature, constexprs=constants, attrs=attributes)
            kernel = triton.compile(source, target=target, options=options)
            say(self, target, kernel, constants)

    return run


def run_neuron_tree(tokens: int, depth: int, trees: int, d: int, o: int, dtype: torch.dtype, act: str) -> None:
    """Forward and backward."""
    nodes = 2 ** (depth + 1) - 1
    x, w_in, w_out = (torch.zeros(s, dtype=dtype) for s in ((tokens, d), (trees, nodes, d), (trees, nodes, o)))
    case = (x, w_in, w_in[:, :, 0].contiguous(), w_out, act, act == "gelu")
    y, *saved = NEURON_TREE.forward(*case, keep=True, out=None)
    NEURON_TREE.forward(*case, keep=False, out=None)
    NEURON_TREE.backward(y, *case, *saved, needs=(True,) * 4)


def run_grouped_mlp(tokens: int, mlps: int, width: int, d: int, dtype: torch.dtype, gated: bool) -> None:
    """Forward and backward."""
    x, up, down = (torch.zeros(s, dtype=dtype) for s in ((tokens, d), (mlps, width, d), (mlps, d, width)))
    bias, index = up[:, :, 0].contiguous(), torch.zeros(tokens, dtype=torch.int64)
    gate, gate_bias = (up, bias) if gated else (None, None)
    case = (x, index, up, bias, down, down[:, :, 0].contiguous(), gate, gate_bias, "silu" if gated else "gelu")
    y, *saved = GROUPED_MLP.forward(*case, keep=True, out=None)
    GROUPED_MLP.backward(y, *case, *saved, needs=tuple(isinstance(t, torch.Tensor) for t in case[:8]))


def main() -> None:
    """Compile, print."""
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "AnnAssign.__init__ missing", DeprecationWarning)  # Triton's own, Python 3.13
    targets = []
    for name in sys.argv[1:]:
        kind, arch = name.split(":")
        targets.append(GPUTarget(kind, int(arch), 32) if arch.isdigit() else GPUTarget(kind, arch, 64))

    def say(function: Any, target: GPUTarget, kernel: Any, constants: Any) -> None:
        line = {
            "kernel": f"{function.fn.__module__}.{function.fn.__name__}",
            "target": f"{target.backend}:{target.arch}",
            "shared": kernel.metadata.shared,
        }
        if "-v" in os.environ.get("COMPILE_TRITON", ""):
            line["constants"] = {function.arg_names[k[0]]: v for k, v in constants.items()}
            line["resources"] = resources(kernel.asm["cubin"]) if "cubin" in kernel.asm else ""
        print(json.dumps(line), flush=True)

    JITFunction.run = compiling(targets, say)
    few = bool(os.environ.get("COMPILE_FEW"))
    for dtype in (torch.bfloat16, torch.float32)[: 2 - few]:
        for tokens in (1, 512, 16384)[::2] if few else (1, 512, 16384):
            run_neuron_tree(tokens, 11, 1, 768, 768, dtype, "gelu")
        run_grouped_mlp(4096, 16, 256, 768, dtype, gated=True)
    if not few:
        run_neuron_tree(1500, 13, 1, 768, 768, torch.bfloat16, "gelu_new")  # 128 columns
        run_neuron_tree(2000, 15, 1, 768, 768, torch.bfloat16, "gelu")  # too deep to be cut
        run_neuron_tree(16384, 11, 1, 4096, 4096, torch.bfloat16, "gelu")
        run_neuron_tree(1, 11, 1, 4096, 4096, torch.bfloat16, "gelu")
        run_neuron_tree(4096, 10, 2, 100, 36, torch.float16, "silu")
        run_grouped_mlp(512, 128, 8, 100, torch.float16, gated=False)


def resources(cubin: bytes) -> str:
    import subprocess
    import tempfile
    from pathlib import Path

    tool = next(Path(triton.__file__).parent.rglob("bin/cuobjdump"))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    return done.stdout.strip().splitlines()[-1].strip()


if __name__ == "__main__":
    main()
