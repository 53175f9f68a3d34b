"""What all Triton kernels share: the sort, who may run them, and that a GPU's compiler takes them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastffn.ops import triton

ROOT = Path(__file__).parents[2]
there = pytest.mark.skipif(triton.found().device is None, reason=str(triton.found().reason))


@there
@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(1, 700),
    groups=st.sampled_from([1, 2, 5, 64, 130]),
    sorts=st.integers(1, 2),
    few=st.booleans(),
    tile=st.sampled_from([16, 64]),
    by_torch=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_sort_is_stable_and_finds_its_groups(tokens, groups, sorts, few, tile, by_torch, seed) -> None:
    from fastffn.ops import triton_sort

    random = torch.Generator().manual_seed(seed)
    keys = torch.randint(max(1, groups // 4) if few else groups, (sorts, tokens), generator=random, dtype=torch.int32)
    found = (triton_sort._by_torch if by_torch else triton_sort.sort_by_group)(keys, groups, tile)
    for sort in range(sorts):
        assert torch.equal(found.order[sort].long(), torch.sort(keys[sort], stable=True).indices)
        number = torch.bincount(keys[sort], minlength=groups)
        assert torch.equal(found.ends[sort].long(), number.cumsum(0))
        assert torch.equal(found.starts[sort].long(), number.cumsum(0) - number)
        assert torch.equal(found.tile_ends[sort].long(), (-(-number // tile)).cumsum(0))
        assert int(found.tile_ends[sort, -1]) <= triton_sort.tiles_at_most(tokens, groups, tile)


@there
def test_more_blocks_and_groups_than_the_scan_takes_at_a_time(monkeypatch) -> None:
    from fastffn.ops import triton_sort

    monkeypatch.setattr(triton_sort, "SCAN_BLOCKS", 2)
    monkeypatch.setattr(triton_sort, "SCAN_GROUPS", 4)
    keys = torch.randint(11, (1, 900), dtype=torch.int32)
    found = triton_sort.sort_by_group(keys, 11, 16)
    assert torch.equal(found.order[0].long(), torch.sort(keys[0], stable=True).indices)


def test_reasons(monkeypatch) -> None:
    assert triton.refuses("cpu", torch.float64) == "takes float32, bfloat16 and float16, not float64"
    monkeypatch.setattr(triton, "interpreted", lambda: False)
    assert "runs on an accelerator, not on cpu" in triton.refuses("cpu", torch.float32)
    assert triton.yields() is None
    monkeypatch.setattr(triton, "found", lambda: triton.Found(None, "Triton cannot be imported (gone)"))
    assert triton.refuses("xpu", torch.float32) == "Triton cannot be imported (gone)"
    monkeypatch.setattr(triton, "found", lambda: triton.Found("xpu", None))
    assert triton.refuses("xpu", torch.bfloat16) is None
    assert triton.refuses("mps", torch.bfloat16) == "runs on xpu, not on mps"


def test_an_old_triton_is_refused(monkeypatch) -> None:
    import types

    monkeypatch.setattr(triton.importlib, "import_module", lambda name: types.SimpleNamespace(__version__="3.5.0"))
    triton.found.cache_clear()
    try:
        assert triton.found() == triton.Found(None, "Triton is 3.5.0; these kernels want 3.7 or later")
        monkeypatch.setattr(triton, "interpreted", lambda: False)
        triton.found.cache_clear()
        assert triton.found() == triton.Found(None, "Triton is 3.5.0; these kernels want 3.6 or later")
    finally:
        triton.found.cache_clear()


def test_without_triton_everything_else_runs_and_info_says_why() -> None:
    code = (
        "import sys\n"
        "sys.modules['triton'] = None\n"
        "import torch, fastffn\n"
        "from fastffn.ops import OPS\n"
        "ffn = fastffn.build('neuron_tree', d_model=8, depth=2)\n"
        "assert ffn(torch.randn(3, 8)).shape == (3, 8)\n"
        "print(OPS['neuron_tree'].verdicts()['triton'])\n"
        "try:\n"
        "    with fastffn.use_backend('triton'): ffn(torch.randn(3, 8))\n"
        "except fastffn.errors.BackendError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Triton cannot be imported") == 2
    assert "pip install triton" in done.stdout


@there
@pytest.mark.slow
def test_a_gpus_compiler_takes_the_kernels(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "COMPILE_FEW": "1"}
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "ops" / "compile_triton.py", "cuda:90"],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    kernels = {line["kernel"].rpartition("fastffn.ops.")[2] for line in lines}
    files = {"triton_sort": 3, "neuron_tree.triton_path": 2, "neuron_tree.triton_levels": 3}
    files |= {"neuron_tree.triton_weights": 2, "grouped_mlp.triton_products": 5}
    for file, number in files.items():
        assert len([name for name in kernels if name.startswith(file + ".")]) == number, (file, kernels)
    # What a block may have on the smallest GPUs that have these instructions.
    assert max(line["shared"] for line in lines) <= 99 * 1024


def test_float32_is_multiplied_as_torch_may() -> None:
    """Both of torch's settings count; the older cannot be read once the newer was used."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        assert triton.precision() == "tf32"
        matmul.fp32_precision = "ieee"
        assert triton.precision() == "ieee"
        torch.set_float32_matmul_precision("high")
        assert triton.precision() == "tf32"
        torch.set_float32_matmul_precision("highest")
        assert triton.precision() == "ieee"
    finally:
        matmul.fp32_precision = before
