"""One FFN, or a stack of them, against dense FFNs and published code: gate, time, bound."""

from fastffn.bench.layer.case import LayerCase
from fastffn.bench.layer.run import bench_layer

__all__ = ["LayerCase", "bench_layer"]
