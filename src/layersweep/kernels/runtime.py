"""Load compiled kernels into torch's context and launch them on torch's stream, through ctypes."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Mapping, Sequence
from ctypes import byref, c_char_p, c_int, c_size_t, c_uint, c_void_p
from functools import cache
from threading import Lock

import torch
from torch import Tensor

from layersweep.kernels.nvrtc import KernelError, compile_cubin

__all__ = ["Argument", "KernelError", "Module", "compile_cubin"]

# A tensor or None goes as a pointer; a kernel's layout says how wide an int is.
Argument = Tensor | int | float | None

_BUFFER_POINTER, _BUFFER_SIZE = 1, 2  # CU_LAUNCH_PARAM_*
_MAX_SHARED, _USUAL_SHARED = 8, 48 << 10  # CU_FUNC_ATTRIBUTE_..., what needs no leave
_WRONG_CONTEXT = (201, 400)  # CUDA_ERROR_INVALID_CONTEXT, CUDA_ERROR_INVALID_HANDLE


class _Function:
    """One kernel: its handle and one reusable buffer of parameters."""

    def __init__(self, handle: c_void_p, layout: str) -> None:
        self.handle = handle
        self.layout = struct.Struct("@" + layout)
        self.shared = _USUAL_SHARED
        self.buffer = ctypes.create_string_buffer(self.layout.size)
        self._size = c_size_t(self.layout.size)
        self.extra = (c_void_p * 5)(
            *(_BUFFER_POINTER, ctypes.addressof(self.buffer)),
            *(_BUFFER_SIZE, ctypes.addressof(self._size)),
            None,
        )


class Module:
    """The kernels of one cubin on one device (with index).

    `layouts`: {kernel: struct format of its parameters}, P pointer, q 64-bit, i 32-bit, f float.
    """

    def __init__(self, cubin: bytes, layouts: Mapping[str, str], device: torch.device) -> None:
        self._driver = _driver()
        self._device = device
        self._layouts = layouts
        self._functions: dict[str, _Function] = {}
        self._lock = Lock()  # the parameters' buffer is shared, and ctypes lets other threads run
        self._launch = self._driver.cuLaunchKernel
        torch.zeros(1, device=device)  # makes torch create its context
        self._context = _primary_context(device.index)
        handle = c_void_p()
        with _Within(self._context):
            _check(self._driver.cuModuleLoadDataEx(byref(handle), cubin, 0, None, None))
        self._module = handle

    def launch(
        self,
        name: str,
        grid: tuple[int, int, int],
        block: int,
        args: Sequence[Argument],
        shared: int = 0,
    ) -> None:
        """Queue kernel `name` on the current stream of the device; returns at once. `shared`: bytes
        of shared memory that it asks for. Raises KernelError, also where the device has less."""
        values = [
            one.data_ptr() if isinstance(one, Tensor) else 0 if one is None else one for one in args
        ]
        with self._lock:
            function = self._functions.get(name) or self._find(name)
            if shared > function.shared:
                self._allow(function, shared)
            function.layout.pack_into(function.buffer, 0, *values)
            sizes = (*grid, block, 1, 1, shared, _raw_stream(self._device.index))
            result = self._launch(function.handle, *sizes, None, function.extra)
            if result in _WRONG_CONTEXT:  # a new thread, or another device is the current one
                with _Within(self._context):
                    result = self._launch(function.handle, *sizes, None, function.extra)
        if result:
            _check(result, f"launch of {name} with grid {grid} and {block} threads: ")

    def _find(self, name: str) -> _Function:
        handle = c_void_p()
        with _Within(self._context):  # lazy loading may load the kernel here
            _check(self._driver.cuModuleGetFunction(byref(handle), self._module, name.encode()))
        self._functions[name] = _Function(handle, self._layouts[name])
        return self._functions[name]

    def _allow(self, function: _Function, shared: int) -> None:
        """More shared memory than every kernel may have."""
        with _Within(self._context):
            _check(self._driver.cuFuncSetAttribute(function.handle, _MAX_SHARED, shared))
        function.shared = shared


class _Within:
    """A context made the current one for a while."""

    def __init__(self, context: c_void_p) -> None:
        self._context = context

    def __enter__(self) -> None:
        _check(_driver().cuCtxPushCurrent_v2(self._context))

    def __exit__(self, *failure: object) -> None:
        _driver().cuCtxPopCurrent_v2(byref(c_void_p()))


def _public_stream(index: int) -> int:
    return int(torch.cuda.current_stream(index).cuda_stream)


# The private function, which Triton's launcher uses too, builds no Stream object: 2 us less.
_raw_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", _public_stream)


@cache
def _driver() -> ctypes.CDLL:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise KernelError(f"no NVIDIA driver: {error}") from None
    driver.cuModuleLoadDataEx.argtypes = [c_void_p, c_char_p, c_uint, c_void_p, c_void_p]
    driver.cuModuleGetFunction.argtypes = [c_void_p, c_void_p, c_char_p]
    driver.cuLaunchKernel.argtypes = [c_void_p, *[c_uint] * 7, c_void_p, c_void_p, c_void_p]
    driver.cuFuncSetAttribute.argtypes = [c_void_p, c_int, c_int]
    driver.cuCtxPushCurrent_v2.argtypes = [c_void_p]
    driver.cuDevicePrimaryCtxRetain.argtypes = [c_void_p, c_int]
    return driver


@cache
def _primary_context(index: int) -> c_void_p:
    """torch's context of a device; kept for the life of the process.

    The index is torch's: of devices that CUDA_VISIBLE_DEVICES leaves, as the driver counts too.
    """
    device, context = c_int(), c_void_p()
    _check(_driver().cuDeviceGet(byref(device), index))
    _check(_driver().cuDevicePrimaryCtxRetain(byref(context), device.value))
    return context


def _check(result: int, what: str = "") -> None:
    if result:
        text = c_char_p()
        _driver().cuGetErrorString(result, byref(text))
        raise KernelError(f"{what}{(text.value or b'unknown error').decode()} (CUDA {result})")
