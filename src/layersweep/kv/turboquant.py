"""`turboquant`: the cache that vLLM ships under this name. Keys rotated, values not.

Keys, with y = H x, H the Sylvester Hadamard matrix over sqrt(D):
    n = |x| (fp16);   c = nearest Lloyd-Max level of sqrt(D) y / |x|;   x^ = H (n c / |c|)
so that x^ is as long as x (vLLM's norm correction). Keys of 8 bits are e4m3 numbers without a
scale: x^ = e4m3(x), NaN beyond 464, where vLLM's conversion saturates.
Values, per vector, with L = 2^bits - 1: zero = min(x), scale = (max(x) - min(x)) / L, both fp16;
    code = round((x - zero) / scale);   x^ = scale * code + zero
Bits per element: keys bits + 16 / D, or 8; values bits + 32 / D. vLLM's names are turboquant_k8v4,
_4bit_nc, _k3v4_nc and _3bit_nc: K8V4, K4V4, K3V4 and K3V3. By default it leaves the first and last
two layers exact: write @pb=2.

Source: vllm/model_executor/layers/quantization/turboquant and triton_turboquant_store.py,
triton_turboquant_decode.py of vllm/v1/attention/ops. What differs: levels solved exactly, where
vLLM integrates by 200 trapezoids; value codes made for the rounded scale; keys before RoPE, there
after it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from layersweep.kv.codec import Codec
from layersweep.kv.identity import Identity
from layersweep.kv.lloyd import look_up, nearest_levels, signed_levels, with_signs
from layersweep.kv.packing import pack_bits, unpack_bits
from layersweep.kv.rotate import add_rows, rotate, rotate_back
from layersweep.kv.stream import Role
from layersweep.kv.uniform import decode_vectors, encode_vectors, group_layout
from layersweep.kv.vector_codec import Layout, RowCodec, VectorCodec

_SMALLEST_SQUARE = 1e-36


@dataclass(frozen=True)
class TurboQuant(RowCodec):
    """See the module's text. This codec is that of the keys, and of a latent."""

    key_bits: int
    value_bits: int

    method = "turboquant"

    def for_role(self, role: Role) -> VectorCodec:
        if role == "value":
            return TurboQuantValues(self.key_bits, self.value_bits)
        return TurboQuantKeys8(self.key_bits, self.value_bits) if self.key_bits == 8 else self

    def layout(self, dim: int, bits: int) -> Layout:
        return Layout(dim * bits // 8)

    def encode_rows(self, x_ND: Tensor, bits: int) -> tuple[Tensor, Tensor | None]:
        y_DN = rotate(x_ND, randomized=False)
        square = add_rows(y_DN * y_DN)
        inverse = square.clamp(min=_SMALLEST_SQUARE).rsqrt_()
        u_DN = y_DN.mul_(inverse * len(y_DN) ** 0.5)
        index, _ = nearest_levels(u_DN.abs(), bits)
        return pack_bits(with_signs(index, u_DN, bits), bits), square * inverse

    def decode_rows(self, codes: Tensor, scale: Tensor | None, dim: int, bits: int) -> Tensor:
        assert scale is not None
        c_DN = look_up(signed_levels(bits, codes.device), unpack_bits(codes, bits))
        return rotate_back(c_DN.mul_(scale.float() * add_rows(c_DN * c_DN).rsqrt_()), False)

    def identity(self) -> Codec:
        return Identity(of=self.method, randomized=False)


@dataclass(frozen=True)
class TurboQuantKeys8(TurboQuant):
    """Keys of 8 bits."""

    def layout(self, dim: int, bits: int) -> Layout:
        return Layout(dim, scale=None)

    def encode_rows(self, x_ND: Tensor, bits: int) -> tuple[Tensor, None]:
        return x_ND.float().to(torch.float8_e4m3fn).view(torch.uint8), None

    def decode_rows(self, codes: Tensor, scale: Tensor | None, dim: int, bits: int) -> Tensor:
        return codes.view(torch.float8_e4m3fn).float()


@dataclass(frozen=True)
class TurboQuantValues(TurboQuant):
    """Values of any number of bits."""

    def layout(self, dim: int, bits: int) -> Layout:
        return group_layout(dim, bits, dim)

    def encode_rows(self, x_ND: Tensor, bits: int) -> tuple[Tensor, None]:
        return encode_vectors(x_ND, bits, x_ND.shape[1]), None

    def decode_rows(self, codes: Tensor, scale: Tensor | None, dim: int, bits: int) -> Tensor:
        return decode_vectors(codes, dim, bits, dim)
