"""FastFFN: cheap feed-forward networks for Transformers, in training and in inference, with honest prices."""

from fastffn import ops
from fastffn.convert.api import convert, merge
from fastffn.convert.budget import Budget, convert_within
from fastffn.errors import FastFFNError
from fastffn.nn import (
    BlockConfig,
    BlockFFN,
    DenseConfig,
    DenseFFN,
    Int8Config,
    Int8FFN,
    LeafTreeConfig,
    LeafTreeFFN,
    LowRankConfig,
    LowRankFFN,
    MoEConfig,
    MoEFFN,
    NarrowConfig,
    NarrowFFN,
    NeuronTreeConfig,
    NeuronTreeFFN,
    auxiliary_loss,
    build,
)
from fastffn.ops.dispatch import use_backend

__version__ = "0.1.0"

__all__ = [
    "BlockConfig",
    "BlockFFN",
    "Budget",
    "DenseConfig",
    "DenseFFN",
    "FastFFNError",
    "Int8Config",
    "Int8FFN",
    "LeafTreeConfig",
    "LeafTreeFFN",
    "LowRankConfig",
    "LowRankFFN",
    "MoEConfig",
    "MoEFFN",
    "NarrowConfig",
    "NarrowFFN",
    "NeuronTreeConfig",
    "NeuronTreeFFN",
    "auxiliary_loss",
    "build",
    "convert",
    "convert_within",
    "merge",
    "ops",
    "use_backend",
]
