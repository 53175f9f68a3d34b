"""Builds `simulated.cpp` with the compiler there is."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths


def build(folder: Path) -> Path:
    """The library, built into `folder`."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    assert compiler is not None
    library = folder / "simulated.so"
    lib = Path(torch.__file__).parent / "lib"
    command = [compiler, "-shared", "-fPIC", "-std=c++20", "-O0", "-w"]
    command += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    command += [f"-I{path}" for path in include_paths()]
    command += [str(Path(__file__).with_name("simulated.cpp")), f"-L{lib}", "-ltorch_cpu", "-lc10", "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return library
