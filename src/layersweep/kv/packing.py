"""Codes of 1 to 8 bits in bytes without waste: 8 codes of b bits are b bytes, little-endian."""

from __future__ import annotations

import torch
from torch import Tensor

# Codes are joined in pairs, pairs in fours, fours in eights, in integers too wide to turn negative.
_WIDER = (torch.int32, torch.int64, torch.int64)


def pack_bits(codes_DN: Tensor, bits: int) -> Tensor:
    """codes [D, N] integers below 2^bits, D a multiple of 8 -> [N, D bits / 8] uint8."""
    count = codes_DN.shape[1]
    for step, dtype in enumerate(_WIDER):
        pairs = codes_DN.to(dtype).view(-1, 2, count)
        codes_DN = (pairs[:, 1] << (bits << step)).bitwise_or_(pairs[:, 0])
    bytes_of_word = codes_DN.t().reshape(-1).view(torch.uint8).view(count, -1, 8)
    return bytes_of_word[:, :, :bits].reshape(count, -1)


def unpack_bits(packed: Tensor, bits: int) -> Tensor:
    """Inverse of pack_bits: [N, D bits / 8] uint8 -> codes [D, N] int32."""
    count = packed.shape[0]
    bytes_of_word = packed.new_zeros(count, packed.shape[1] // bits, 8)
    bytes_of_word[:, :, :bits] = packed.view(count, -1, bits)
    word = bytes_of_word.view(torch.int64).squeeze(2).t()
    for step in (2, 1, 0):
        width = bits << step
        halves = word.new_empty(len(word), 2, count, dtype=torch.int32 if step < 2 else None)
        torch.bitwise_and(word, (1 << width) - 1, out=halves[:, 0])
        halves[:, 1] = (word >> width) & ((1 << width) - 1)
        word = halves.view(-1, count)
    return word
