"""layersweep.kernels without a GPU: the .cu files as C++, one thread block after another.

`Emulated` stands in for kernels.runtime.Module, with the same packed parameters.
"""

from __future__ import annotations

import ctypes
import shutil
import struct
import subprocess
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from layersweep.kernels import kernels
from layersweep.kernels.nvrtc import FOLDER

HERE = Path(__file__).parent
SHARED_POOL = 256 << 10  # bytes that a launch can ask for, see emulator.h
COMPILER = shutil.which("g++")
# Contraction off: a * b + c must round twice, as with NVRTC's -fmad=false.
FLAGS = ("-std=c++20", "-O1", "-ffp-contract=off", "-fPIC", "-shared", "-DLAYERSWEEP_ON_CPU")


def build(folder: Path, name: str, scalar: int, dim: int) -> Path:
    """A shared library with `emulate_KERNEL` for each kernel of a source."""
    entries = (
        f'extern "C" size_t emulate_{kernel}(const unsigned* grid, unsigned threads, '
        f"const char* args) {{ return emulator::launch({kernel}, grid, threads, args); }}\n"
        for kernel in kernels.LAYOUTS[name]
    )
    stem = folder / f"{name}_{scalar}_{dim}"
    unit = f'#include "{HERE / "emulator.h"}"\n#include "{FOLDER / f"{name}.cu"}"\n'
    stem.with_suffix(".cpp").write_text(unit + "".join(entries), "utf-8")
    defines = [f"-DSCALAR={scalar}", *([f"-DDIM={dim}"] if dim else [])]
    library = stem.with_suffix(".so")
    command = [str(COMPILER), *FLAGS, *defines, "-o", str(library), str(stem.with_suffix(".cpp"))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return library


class Emulated:
    """One source, compiled; launches run to their end at once."""

    def __init__(self, library: Path, layouts: dict[str, str]) -> None:
        self._library = ctypes.CDLL(str(library))
        self._layouts = layouts

    def launch(
        self,
        name: str,
        grid: tuple[int, int, int],
        block: int,
        args: Sequence[kernels.Argument],
        shared: int = 0,
    ) -> None:
        assert shared <= SHARED_POOL
        entry = getattr(self._library, f"emulate_{name}")
        entry.restype = ctypes.c_size_t
        layout = struct.Struct("@" + self._layouts[name])
        values = [one.data_ptr() if isinstance(one, Tensor) else one or 0 for one in args]
        packed = layout.pack(*values)
        taken = entry((ctypes.c_uint * 3)(*grid), ctypes.c_uint(block), packed)
        assert taken == len(packed), f"{name} takes {taken} bytes, its layout {len(packed)}"


class Workshop:
    """Compiles sources on two threads, each once; `kernels(dtype)` are ready to use."""

    def __init__(self, folder: Path, dims: Sequence[tuple[torch.dtype, int]]) -> None:
        self._pool = ThreadPoolExecutor(2)
        self._folder = folder
        self._built: dict[tuple[str, int, int], Future[Path]] = {}
        for scalar in kernels.SCALARS.values():
            for name in ("nf4", "rows", "rope", "score", "sums", "sinks"):
                self._start(name, scalar, 0)
        for dtype, dim in dims:
            self._start("lloyd", kernels.SCALARS[dtype], dim)

    def kernels(self, dtype: torch.dtype) -> kernels.Kernels:
        scalar = kernels.SCALARS[dtype]

        def module(name: str, dim: int = 0) -> Emulated:
            library = self._start(name, scalar, dim).result()
            return Emulated(library, kernels.LAYOUTS[name])

        return kernels.Kernels(dtype, module)

    def _start(self, name: str, scalar: int, dim: int) -> Future[Path]:
        key = (name, scalar, dim)
        if key not in self._built:
            self._built[key] = self._pool.submit(build, self._folder, *key)
        return self._built[key]
