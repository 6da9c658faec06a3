"""Compile CUDA C to a cubin with NVRTC: no compiler, header file, GPU or driver is needed."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator, Mapping
from ctypes import byref, c_char_p, c_int, c_size_t, c_void_p
from functools import cache
from pathlib import Path

import torch

FOLDER = Path(__file__).parent
HEADERS = (
    "common.cuh", "rotation.cuh", "trellis_search.cuh", "trellis_windows.cuh", "packed_levels.cuh",
    "packed_scores.cuh", "packed_sums.cuh", "weights.cuh",
)  # fmt: skip


class KernelError(RuntimeError):
    """NVRTC, the driver or a compiled kernel is not to be had here; torch does the work then."""


def read_source(name: str) -> str:
    """Text of `name`.cu, or of a header."""
    return (FOLDER / (name if "." in name else f"{name}.cu")).read_text("utf-8")


def compile_cubin(source: str, capability: tuple[int, int], defines: Mapping[str, int]) -> bytes:
    """`source`, which may include HEADERS, as machine code of sm_XY with macros `defines`.

    Raises KernelError with the compiler's log, or when there is no NVRTC.
    """
    nvrtc = load_nvrtc()
    program = c_void_p()
    texts = (c_char_p * len(HEADERS))(*(read_source(name).encode() for name in HEADERS))
    names = (c_char_p * len(HEADERS))(*(name.encode() for name in HEADERS))
    args = (source.encode(), b"layersweep.cu", len(HEADERS), texts, names)
    _check(nvrtc.nvrtcCreateProgram(byref(program), *args))
    options = [
        f"--gpu-architecture=sm_{capability[0]}{capability[1]}",
        "-fmad=false",  # torch rounds after every operation; a fused one would differ
        "--std=c++17",
        *(f"-D{name}={value}" for name, value in defines.items()),
    ]
    try:
        words = (c_char_p * len(options))(*(option.encode() for option in options))
        if nvrtc.nvrtcCompileProgram(program, len(options), words):
            log = _read(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program)
            text = log.rstrip(b"\0\n").decode(errors="replace")
            raise KernelError(f"NVRTC refused the source with {' '.join(options)}:\n{text}")
        return _read(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program)
    finally:
        nvrtc.nvrtcDestroyProgram(byref(program))


@cache
def load_nvrtc() -> ctypes.CDLL:
    """libnvrtc, that of torch's own CUDA version first. Raises KernelError."""
    tried = list(_candidates())
    for path in tried:
        try:
            library = ctypes.CDLL(path)
        except OSError:
            continue
        library.nvrtcGetErrorString.restype = c_char_p
        library.nvrtcCreateProgram.argtypes = [
            c_void_p, c_char_p, c_char_p, c_int, c_void_p, c_void_p,
        ]  # fmt: skip
        library.nvrtcCompileProgram.argtypes = [c_void_p, c_int, c_void_p]
        return library
    raise KernelError(f"no libnvrtc among {tried}; pip install nvidia-cuda-nvrtc brings it")


def _candidates() -> Iterator[str]:
    """By soname; then wheels of NVIDIA; then toolkits. Names that fit torch's CUDA come first."""
    version = getattr(torch.version, "cuda", None)
    suffix = f".so.{version.split('.')[0]}" if version else ".so"
    yield f"libnvrtc{suffix}"
    toolkits = [Path(os.environ["CUDA_HOME"])] if "CUDA_HOME" in os.environ else []
    toolkits += sorted(Path("/usr/local").glob("cuda*"), reverse=True)
    found: list[Path] = []
    for folder in dict.fromkeys(sys.path):
        found += sorted(Path(folder).glob("nvidia/*/lib/libnvrtc.so*"), reverse=True)
    for toolkit in toolkits:
        found += sorted((toolkit / "lib64").glob("libnvrtc.so*"), reverse=True)
    yield from map(str, sorted(found, key=lambda path: suffix not in path.name))


def _check(result: int) -> None:
    if result:
        text = load_nvrtc().nvrtcGetErrorString(result).decode()
        raise KernelError(f"NVRTC: {text}")


def _read(
    size_of: ctypes._NamedFuncPointer, read: ctypes._NamedFuncPointer, program: c_void_p
) -> bytes:
    size = c_size_t()
    _check(size_of(program, byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check(read(program, buffer))
    return buffer.raw
