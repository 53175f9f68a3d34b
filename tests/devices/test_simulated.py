"""No device is assumed: layers train, infer and merge on a device that is neither a CPU nor a GPU.

The device is torch's PrivateUse1 with memory of the host (`simulated.cpp`), as Ascend's torch_npu is one; it is built
here with the C++ compiler there is.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastffn.registry import kinds
from tests.devices.build import build

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        sys.platform != "linux" or shutil.which("c++") is None,
        reason="needs Linux and a C++ compiler to build a device",
    ),
]


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict:
    library = build(tmp_path_factory.mktemp("device"))
    # Triton's interpreter would offer itself for a CPU's tensors only.
    command = [sys.executable, "-W", "error", Path(__file__).with_name("run_layers.py"), library]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def test_every_kind_trains_infers_and_merges(result: dict) -> None:
    assert {name.split(",")[0].split(" by ")[0] for name in result["ran"]} == set(kinds())
    for backend in ("torch_grouped", "dense", "reference"):
        assert f"neuron_tree by {backend}" in result["ran"]
    assert {"neuron_tree", "moe", "moe by torch_grouped"} <= set(result["ran"])


def test_it_was_the_device_that_was_asked(result: dict) -> None:
    asked = {name.partition(".")[0] for name in result["operators"]}
    # Products, the sort by subtree, activations with their derivatives, AdamW: none of it ran elsewhere.
    assert {"aten::mm", "aten::sort", "aten::gelu", "aten::gelu_backward", "aten::addcdiv", "aten::lerp"} <= asked
    assert result["refusals"]["neuron_tree"] == ["runs on a CPU, not on simulated"]
