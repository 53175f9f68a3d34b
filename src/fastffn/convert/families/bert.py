"""BERT and its kin: `intermediate` holds the first linear map and the activation, `output` beside it the second.

The FastFFN module takes the place of `intermediate` and computes both; `output` keeps its dropout, the residual and
the LayerNorm.
"""

from __future__ import annotations

from fastffn.convert.match import Family, ModelTensor


class BertFamily(Family):
    """See `Family`."""

    ffn_classes = {  # noqa: RUF012  (declared in the base class)
        "bert": "BertIntermediate",
        "roberta": "RobertaIntermediate",
        "xlm-roberta": "XLMRobertaIntermediate",
        "camembert": "CamembertIntermediate",
        "electra": "ElectraIntermediate",
    }
    tensors = {  # noqa: RUF012
        "up.weight": ModelTensor("dense.weight"),
        "up.bias": ModelTensor("dense.bias"),
        "down.weight": ModelTensor("output.dense.weight", beside=True),
        "down.bias": ModelTensor("output.dense.bias", beside=True),
    }


FAMILY = BertFamily()
