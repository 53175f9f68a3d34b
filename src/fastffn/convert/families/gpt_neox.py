"""GPT-NeoX and Pythia: `mlp` holds `dense_h_to_4h` and `dense_4h_to_h`."""

from __future__ import annotations

from fastffn.convert.match import Family, ModelTensor


class GPTNeoXFamily(Family):
    """See `Family`."""

    ffn_classes = {"gpt_neox": "GPTNeoXMLP"}  # noqa: RUF012  (declared in the base class)
    tensors = {  # noqa: RUF012
        "up.weight": ModelTensor("dense_h_to_4h.weight"),
        "up.bias": ModelTensor("dense_h_to_4h.bias"),
        "down.weight": ModelTensor("dense_4h_to_h.weight"),
        "down.bias": ModelTensor("dense_4h_to_h.bias"),
    }


FAMILY = GPTNeoXFamily()
