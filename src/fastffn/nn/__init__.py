"""FFN kinds, one file each. Importing a file registers its kind."""

from fastffn.nn.base import FFN, FFNConfig, MergedTensor
from fastffn.nn.block import BlockConfig, BlockFFN
from fastffn.nn.build import build
from fastffn.nn.dense import DenseConfig, DenseFFN
from fastffn.nn.low_rank import LowRankConfig, LowRankFFN
from fastffn.nn.neuron_tree import NeuronTreeConfig, NeuronTreeFFN

__all__ = [
    "FFN",
    "BlockConfig",
    "BlockFFN",
    "DenseConfig",
    "DenseFFN",
    "FFNConfig",
    "LowRankConfig",
    "LowRankFFN",
    "MergedTensor",
    "NeuronTreeConfig",
    "NeuronTreeFFN",
    "build",
]
