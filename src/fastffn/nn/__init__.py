"""FFN kinds, one file each. Importing a file registers its kind."""

from fastffn.nn.auxiliary import auxiliary_loss
from fastffn.nn.base import FFN, FFNConfig, MergedTensor
from fastffn.nn.block import BlockConfig, BlockFFN
from fastffn.nn.build import build
from fastffn.nn.dense import DenseConfig, DenseFFN
from fastffn.nn.int8 import Int8Config, Int8FFN
from fastffn.nn.int8_neuron_tree import Int8NeuronTree
from fastffn.nn.leaf_tree import LeafTreeConfig, LeafTreeFFN
from fastffn.nn.leaf_updates import LeafUpdates
from fastffn.nn.low_rank import LowRankConfig, LowRankFFN
from fastffn.nn.moe import MoEConfig, MoEFFN
from fastffn.nn.narrow import NarrowConfig, NarrowFFN
from fastffn.nn.neuron_tree import NeuronTreeConfig, NeuronTreeFFN

__all__ = [
    "FFN",
    "BlockConfig",
    "BlockFFN",
    "DenseConfig",
    "DenseFFN",
    "FFNConfig",
    "Int8Config",
    "Int8FFN",
    "Int8NeuronTree",
    "LeafTreeConfig",
    "LeafTreeFFN",
    "LeafUpdates",
    "LowRankConfig",
    "LowRankFFN",
    "MergedTensor",
    "MoEConfig",
    "MoEFFN",
    "NarrowConfig",
    "NarrowFFN",
    "NeuronTreeConfig",
    "NeuronTreeFFN",
    "auxiliary_loss",
    "build",
]
