"""Codes of 1 to 8 bits in bytes without waste: 8 codes of b bits are b bytes, little-endian."""

from __future__ import annotations

import torch
from torch import Tensor


def pack_bits(codes_DN: Tensor, bits: int) -> Tensor:
    """codes [D, N] uint8 below 2^bits, D a multiple of 8 -> [N, D bits / 8] uint8."""
    count = codes_DN.shape[1]
    groups = codes_DN.view(-1, 8, count)
    word = groups[:, 0].to(torch.int64)
    for i in range(1, 8):
        word |= groups[:, i].to(torch.int64) << (bits * i)
    bytes_of_word = word.t().contiguous().view(torch.uint8).view(count, -1, 8)
    return bytes_of_word[:, :, :bits].reshape(count, -1)


def unpack_bits(packed: Tensor, bits: int) -> Tensor:
    """Inverse of pack_bits: [N, D bits / 8] uint8 -> codes [D, N] int32."""
    count = packed.shape[0]
    bytes_of_word = packed.new_zeros(count, packed.shape[1] // bits, 8)
    bytes_of_word[:, :, :bits] = packed.view(count, -1, bits)
    word = bytes_of_word.view(torch.int64).squeeze(2).t().contiguous()
    codes = torch.empty(len(word), 8, count, dtype=torch.int32, device=packed.device)
    for i in range(8):
        codes[:, i] = (word >> (bits * i)) & (2**bits - 1)
    return codes.view(-1, count)
