"""A KV codec of one's own, in 30 lines: 8 levels per number, one scale per vector.

    layersweep codec check tests/own_codec.py:Rounded
    layersweep eval demo --kv tests/own_codec.py:Rounded:K3V2

>>> import torch
>>> from layersweep.kv.stream import Stream
>>> codec, keys = Rounded(3, 2), torch.randn(1, 2, 5, 64)
>>> packed = codec.encode(keys, Stream("k", 2, 64, role="key", rope=True), torch.arange(5)[None])
>>> codec.decode(packed, torch.arange(5)[None]).shape, codec.nbytes(packed)
(torch.Size([1, 2, 5, 64]), 680)
"""

import torch


class Rounded:
    """Rounds to 2^bits levels between -max and max; a byte a number, the honest price of that."""

    def __init__(self, key_bits, value_bits):
        self.bits = {"key": key_bits, "latent": key_bits, "value": value_bits}

    def encode(self, x, stream, positions, mean=None):
        half = 2 ** (self.bits[stream.role] - 1) - 0.5
        scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-20)
        code = (x / scale * half - 0.5).round().nan_to_num(0).clamp(-128, 127).to(torch.int8)
        return {"code": code, "scale": scale, "half": half}

    def decode(self, packed, positions):
        return (packed["code"].float() + 0.5) / packed["half"] * packed["scale"]

    def append(self, packed, x, positions):
        role = "key" if packed["half"] == 2 ** (self.bits["key"] - 1) - 0.5 else "value"
        new = self.encode(x, type("S", (), {"role": role}), positions)
        return packed | {k: torch.cat((packed[k], new[k]), dim=2) for k in ("code", "scale")}

    def nbytes(self, packed):
        return packed["code"].nbytes + packed["scale"].nbytes
