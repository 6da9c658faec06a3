"""How a sweep computes: device, dtype, and the implementation of each job, chosen once."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from layersweep.checkpoint import nf4
from layersweep.errors import Fallback
from layersweep.model.attention import (
    Attention,
    FlashAttention,
    PlainAttention,
    TritonAttention,
    choose_attention,
)
from layersweep.model.ops import CudaOps, GroupedProducts, TorchOps


@dataclass(frozen=True)
class Compute:
    """`router_float`: routing weights stay float32. `capability`: the GPU's, or the one assumed
    in its place; None on the CPU. `fallbacks`: what could not be chosen as wanted, and why."""

    device: torch.device
    dtype: torch.dtype
    router_float: bool
    ops: TorchOps
    attention: Attention
    capability: tuple[int, int] | None = None
    fallbacks: tuple[Fallback, ...] = ()

    @property
    def cpu(self) -> bool:
        return self.device.type == "cpu"

    @contextmanager
    def numerics(self) -> Iterator[None]:
        """Full-precision sums in products, and fused attention alone, while it is open."""
        if self.cpu:
            yield
            return
        matmul = torch.backends.cuda.matmul
        before = (
            matmul.allow_fp16_reduced_precision_reduction,
            matmul.allow_bf16_reduced_precision_reduction,
            torch.get_float32_matmul_precision(),
        )
        matmul.allow_fp16_reduced_precision_reduction = False
        matmul.allow_bf16_reduced_precision_reduction = False
        torch.set_float32_matmul_precision("highest")  # no TF32
        try:
            with sdpa_kernel(list(self.attention.backends)):
                yield
        finally:
            matmul.allow_fp16_reduced_precision_reduction = before[0]
            matmul.allow_bf16_reduced_precision_reduction = before[1]
            torch.set_float32_matmul_precision(before[2])


def on_cpu(dtype: torch.dtype = torch.float32, *, router_float: bool = True) -> Compute:
    """Plain torch on the CPU."""
    return Compute(torch.device("cpu"), dtype, router_float, TorchOps(), PlainAttention())


def choose_compute(
    device: torch.device,
    dtype: torch.dtype,
    *,
    router_float: bool = True,
    assume_capability: tuple[int, int] | None = None,
    groups: bool = False,
) -> Compute:
    """The implementations for a device. Our kernels are compiled and tried on a small input
    here; if they do not work, plain torch serves, and the fallback says so. `groups`: the model
    has experts that are visited together."""
    if device.type == "cpu":
        return on_cpu(dtype, router_float=router_float)
    capability = assume_capability or torch.cuda.get_device_capability(device)
    grouped: GroupedProducts | None = None
    missing: tuple[Fallback, ...] = ()
    if groups and capability >= (8, 0) and dtype != torch.float32:
        grouped, missing = _grouped_products(device, dtype)
    ops, fallbacks = _kernel_ops(device, dtype, grouped)
    attention, also = _attention(device, dtype, capability)
    fallbacks = (*fallbacks, *missing, *also)
    return Compute(device, dtype, router_float, ops, attention, capability, fallbacks)


def _attention(
    device: torch.device, dtype: torch.dtype, capability: tuple[int, int]
) -> tuple[Attention, tuple[Fallback, ...]]:
    from layersweep.kernels import KernelError

    chosen = choose_attention(device, dtype, capability)
    if not isinstance(chosen, TritonAttention):
        return chosen, ()
    try:
        from layersweep.kernels.flash_triton import prove  # brings Triton

        prove(device, dtype)
    except (ImportError, KernelError) as failure:
        why, used = str(failure).splitlines()[0], FlashAttention()
        return used, (Fallback("attention", chosen.name, f"torch's {used.name}, slower", why),)
    return chosen, ()


def _grouped_products(
    device: torch.device, dtype: torch.dtype
) -> tuple[GroupedProducts | None, tuple[Fallback, ...]]:
    from layersweep.kernels import KernelError

    try:
        from layersweep.kernels.grouped_triton import grouped_products, prove  # brings Triton

        prove(device, dtype)
    except (ImportError, KernelError) as failure:
        why = str(failure).splitlines()[0]
        wanted, used = "grouped products in Triton", "a product per expert, slower"
        return None, (Fallback("experts", wanted, used, why),)
    return grouped_products, ()


def _kernel_ops(
    device: torch.device, dtype: torch.dtype, grouped: GroupedProducts | None
) -> tuple[TorchOps, tuple[Fallback, ...]]:
    from layersweep.kernels import KernelError, load_kernels

    wanted = CudaOps.name
    try:
        ops = CudaOps(load_kernels(device, dtype), device, grouped)
    except KernelError as failure:
        why = str(failure).splitlines()[0]
        return TorchOps(), (Fallback("kernels", wanted, "plain torch, slower", why),)
    if not _decodes_like_torch(ops, device, dtype):
        why = "they decode NF4 differently from the reference on this device"
        return TorchOps(), (Fallback("kernels", wanted, "plain torch, slower", why),)
    return ops, ()


def _decodes_like_torch(ops: CudaOps, device: torch.device, dtype: torch.dtype) -> bool:
    """A small weight through the kernel and through plain torch: equal bit for bit, or broken."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 1000, generator=generator)
    made = nf4.quantize(weight)
    assert made.nested is not None
    nested = nf4.NestedScales(
        made.nested.absmax.to(device), made.nested.quant_map.to(device), made.nested.blocksize,
        made.nested.offset,
    )  # fmt: skip
    moved = nf4.QuantizedTensor(
        made.packed.to(device), made.absmax.to(device), made.blocksize, nested
    )
    found, expected = (torch.empty(24, 1000, dtype=dtype, device=device) for _ in range(2))
    ops.decode(moved, found)
    moved.decode(expected)
    return bool(torch.equal(found, expected))


class Scratch:
    """Memory for what lives only during one phase of a layer: one buffer on a GPU, handed out
    from its start, so that phases that follow one another share it. On the CPU torch's allocator
    does as well. Order on the stream makes reuse safe."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self._buffer = None
        if device.type == "cuda":
            self._buffer = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self._device, self.used = device, 0
        self._typed: dict[torch.dtype, Tensor] = {}  # the whole buffer

    def take(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """An uninitialized tensor; it is gone when its frame is left."""
        if self._buffer is None:
            return torch.empty(shape, dtype=dtype, device=self._device)
        count, start = math.prod(shape), self.used // dtype.itemsize
        self.used += -(-count * dtype.itemsize // 256) * 256
        assert self.used <= self._buffer.numel(), "scratch is smaller than the plan says"
        if dtype not in self._typed:
            whole = self._buffer.numel() // 8 * 8  # of any type
            self._typed[dtype] = self._buffer[:whole].view(dtype)
        return self._typed[dtype][start : start + count].view(shape)

    def frame(self) -> ScratchFrame:
        """What is taken inside is given back at the end."""
        return ScratchFrame(self)


class ScratchFrame:
    """A with statement over scratch. A class of its own, since a layer opens several and a
    generator takes the host four times as long."""

    __slots__ = ("_before", "_scratch")

    def __init__(self, scratch: Scratch) -> None:
        self._scratch, self._before = scratch, scratch.used

    def __enter__(self) -> None:
        return None

    def __exit__(self, *failure: object) -> None:
        self._scratch.used = self._before
