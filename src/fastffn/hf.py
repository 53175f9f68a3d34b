"""`import fastffn.hf`: from here on `AutoModel...from_pretrained` loads checkpoints with FastFFN kinds.

    import fastffn.hf
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained("runs/demo/stage1")

A dense checkpoint is converted while it loads with
`from_pretrained(..., quantization_config=fastffn.hf.FastFFNConfig(LowRankConfig(rank=192)))`.
"""

from __future__ import annotations

from fastffn.errors import MissingDependencyError

try:
    from fastffn.convert.io import FastFFNConfig
except ModuleNotFoundError as error:
    raise MissingDependencyError(
        f"fastffn.hf needs the package '{error.name}': pip install 'fastffn[train]'."
    ) from error

__all__ = ["FastFFNConfig"]
