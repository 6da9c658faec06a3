"""Every CUDA source compiles with NVRTC for the oldest, a middle and a new GPU, without a GPU."""

from __future__ import annotations

import itertools

import pytest

from layersweep.kernels.kernels import LAYOUTS, SCALARS
from layersweep.kernels.nvrtc import KernelError, compile_cubin, load_nvrtc, read_source

try:
    load_nvrtc()
except KernelError as error:
    pytest.skip(str(error), allow_module_level=True)


CAPABILITIES = [(7, 5), (8, 0), (9, 0)]
# What only the GPU's compiler sees is in common.cuh: packing for 16 bits, before and from sm_80 on.
CORNERS = [(0, (7, 5)), (1, (7, 5)), (1, (8, 0)), (2, (9, 0))]
PAIRS = [
    pair if pair in CORNERS else pytest.param(*pair, marks=pytest.mark.slow)
    for pair in itertools.product(SCALARS.values(), CAPABILITIES)
]
# One of trellis.cu takes 4 s, nearly all of it the search, which knows no SCALAR.
SLOW = ("trellis", "capped", "router", "ggml", "int4", "packed")
BY_DIM = [
    ("trellis", 0, (7, 5), 256),  # the 48 KB of shared memory that every card has must be enough
    ("trellis", 1, (8, 0), 64),
    pytest.param("trellis", 0, (7, 5), 128, marks=pytest.mark.slow),
    pytest.param("trellis", 2, (9, 0), 128, marks=pytest.mark.slow),
    ("capped", 0, (7, 5), 256),
    ("capped", 2, (9, 0), 80),
    ("router", 0, (7, 5), 512),
    ("router", 1, (9, 0), 60),
    ("ggml", 0, (7, 5), 0),  # 13 kernels: 2 s
    pytest.param("ggml", 2, (9, 0), 0, marks=pytest.mark.slow),
    ("int4", 1, (8, 0), 0),
    pytest.param("int4", 0, (7, 5), 0, marks=pytest.mark.slow),
    # 10 s each; products in tensor cores, which sm_75 does not have
    pytest.param("packed", 0, (8, 0), 128, marks=pytest.mark.slow),
    pytest.param("packed", 1, (9, 0), 256, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("scalar", "capability"), PAIRS, ids=str)
@pytest.mark.parametrize("name", [name for name in LAYOUTS if name not in SLOW])
def test_source_compiles(name: str, scalar: int, capability: tuple[int, int]) -> None:
    holds_kernels(name, compile_cubin(read_source(name), capability, {"SCALAR": scalar}))


@pytest.mark.parametrize(("name", "scalar", "capability", "dim"), BY_DIM, ids=str)
def test_slow_source_compiles(
    name: str, scalar: int, capability: tuple[int, int], dim: int
) -> None:
    macros = {"SCALAR": scalar, "DIM": dim}
    holds_kernels(name, compile_cubin(read_source(name), capability, macros))


def holds_kernels(name: str, cubin: bytes) -> None:
    assert cubin.startswith(b"\x7fELF")
    for kernel in LAYOUTS[name]:
        assert kernel.encode() + b"\0" in cubin


@pytest.mark.parametrize(
    "dim", [8, 248, *(pytest.param(dim, marks=pytest.mark.slow) for dim in (80, 256))]
)
def test_lloyd_compiles_for_other_head_sizes(dim: int) -> None:
    cubin = compile_cubin(read_source("lloyd"), (7, 5), {"SCALAR": 0, "DIM": dim})
    assert cubin.startswith(b"\x7fELF")


def test_a_refused_source_carries_the_compilers_log() -> None:
    with pytest.raises(KernelError, match=r"sm_75(.|\n)*identifier \"nonsense\" is undefined"):
        compile_cubin("__global__ void f() { nonsense(); }", (7, 5), {})
