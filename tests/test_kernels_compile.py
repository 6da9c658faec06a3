"""Every CUDA source compiles with NVRTC for the oldest, a middle and a new GPU, without a GPU."""

from __future__ import annotations

import pytest

from layersweep.kernels.kernels import LAYOUTS, SCALARS
from layersweep.kernels.nvrtc import KernelError, compile_cubin, load_nvrtc, read_source

try:
    load_nvrtc()
except KernelError as error:
    pytest.skip(str(error), allow_module_level=True)


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (9, 0)], ids=str)
@pytest.mark.parametrize("scalar", SCALARS.values())
@pytest.mark.parametrize("name", LAYOUTS)
def test_source_compiles(name: str, scalar: int, capability: tuple[int, int]) -> None:
    cubin = compile_cubin(read_source(name), capability, {"SCALAR": scalar})
    assert cubin.startswith(b"\x7fELF")
    for kernel in LAYOUTS[name]:
        assert kernel.encode() + b"\0" in cubin


@pytest.mark.parametrize(
    ("name", "dim"),
    [*(("lloyd", dim) for dim in (8, 80, 248, 256)), ("trellis", 64), ("trellis", 256)],
)
def test_codecs_compile_for_other_head_sizes(name: str, dim: int) -> None:
    """For 256, the 48 KB of shared memory that every card has must be enough."""
    cubin = compile_cubin(read_source(name), (7, 5), {"SCALAR": 0, "DIM": dim})
    assert cubin.startswith(b"\x7fELF")


def test_a_refused_source_carries_the_compilers_log() -> None:
    with pytest.raises(KernelError, match=r"sm_75(.|\n)*identifier \"nonsense\" is undefined"):
        compile_cubin("__global__ void f() { nonsense(); }", (7, 5), {})
