"""Attention of one new token per sequence that reads the codes of `trellis` where they lie.

Legend: B sequences, Q query heads, G key heads, T tokens, D numbers of a head.

To the codec a vector is  x = a + s c H : c its levels, s its scale times its level, H the rotation
back, a the mean, or the sink that it is coded around. With the basis A of a key head, M = H A^-1,
and the prediction P of values (kv/fit.py), whose rows of key head g are P_g,
    k = a A^-1 + s c M                            before RoPE
    v = a' + s' c' H + sum over g of k_g P_g

Scores. A score is <q, R(t) k>, R the turn to position t. Turns add up, so for keys from t on,
    <q, R(t + j) k> = <R(-t) q, R(j) k>
The query turns back once for 32 keys, and R(j), j < 32, is one small table. M cannot move to the
query's side: R stands between them, and differs from key to key; there it would be a product for
each key and query head. So tensor cores make keys, 32 at a time, and all query heads of the group
read them. Without RoPE, R is 1.

Values. With the softmax's weights p all the rest is linear, and nothing more is decoded:
    sum p v = P0 a' + P1 b' + (sum p s' c') H
              + sum over g of [P2 a_g A_g^-1 + P3 b_g A_g^-1 + (sum p s_g c_g) M_g] P_g
P0 ... P3 sum the weights of tokens whose value, whose key is coded around the mean a or a sink b.
Every query head sums the levels of every key head, for each predicts its values. One matrix for
each key head, H above M_g P_g, meets these sums once. What is coarse of keys predicted the values.

What is exact, or coded finely, is decoded and joins the softmax as columns: some hundred tokens.

Codes are read in chunks of 1024 tokens, whose weights are relative to the chunk's own maximum
(flash decoding: Dao et al., 2023). Levels, M, turned keys, and weights times scales are half
numbers, as attention's operands are anyway; sums are float32. `attend_decoded` is the oracle.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from layersweep.kernels.packed import (
    PACKED_BITS,
    PACKED_DIMS,
    TILE,
    Coded,
    PackedKernels,
)
from layersweep.kv.codec import basis_for
from layersweep.kv.encoded import Encoded
from layersweep.kv.rotate import rotate_back
from layersweep.kv.sinks import FLAGS
from layersweep.kv.stored import StoredStream, joined_pieces
from layersweep.kv.trellis import Code, Trellis
from layersweep.kv.trellis_scale import scale_values

LOG2_E = math.log2(math.e)
Pair = tuple[Tensor, Tensor]


def refusal(keys: StoredStream, values: StoredStream) -> str | None:
    """Why these streams of a layer cannot be read as codes, or None if they can."""
    for stored in (keys, values):
        codec, name, middle = stored.codec, stored.stream.name, stored.middle
        if not isinstance(codec, Trellis) or codec.states != "256":
            return f"stream '{name}' is not coded by trellis with 256 states"
        if stored.stream.dim not in PACKED_DIMS or stored.stream.rotation is not None:
            return f"stream '{name}' has head size {stored.stream.dim}, or turns by itself"
        if stored.stream.window is not None:
            return f"stream '{name}' has a window"
        if middle is None or stored.hidden or middle.packed.mean is None:
            return f"stream '{name}' has no coded tokens, or some that nobody sees"
        if middle.packed.bits not in PACKED_BITS:
            return f"stream '{name}' has {middle.packed.bits} bits"
    assert keys.middle is not None and values.middle is not None
    sizes = {(one.stream.dim, one.middle and one.middle.packed.tokens) for one in (keys, values)}
    if len(sizes) > 1:
        return "keys and values differ in head size, or in the tokens that are coded"
    if not _coarse(keys.middle, values.middle):
        return "all that is coded is coded finely"
    return None


@dataclass(frozen=True, eq=False)
class Turn:
    """RoPE of a head of D numbers: D / 2 pairs, some of which may not turn.

    cos, sin  float32 [positions, D / 2]
    order     int64 [D]: the first number of each pair, then the second
    near      int32 [TILE, D / 4, 2]: two cosines, and two sines, of positions from 0 on as half
              numbers, without the factor of a stretched context
    """

    cos: Tensor
    sin: Tensor
    order: Tensor
    near: Tensor

    @classmethod
    def of(cls, cos_SR: Tensor, sin_SR: Tensor, dim: int, interleaved: bool = False) -> Turn:
        """Of rope_table's cos and sin of positions from 0 on, at least TILE of them."""
        assert len(cos_SR) >= TILE, "a table of fewer positions than a tile has"
        width, device = cos_SR.shape[1], cos_SR.device
        turning, still = torch.arange(width, device=device), torch.arange(width, dim, device=device)
        pairs = turning.view(-1, 2).t() if interleaved else turning.view(2, -1)
        order = torch.cat((pairs, still.view(2, -1)), dim=1).flatten()
        rest = cos_SR.new_ones(len(cos_SR), (dim - width) // 2, dtype=torch.float32)
        cos = torch.cat((cos_SR[:, : width // 2].float(), rest), dim=1)
        sin = torch.cat((sin_SR[:, : width // 2].float(), rest * 0), dim=1)
        both = torch.stack((cos[:TILE], sin[:TILE])) / cos[0]
        halves = both.half().view(2, TILE, -1, 2).permute(1, 2, 0, 3).contiguous()
        return cls(cos, sin, order, halves.view(torch.int32).squeeze(3))

    @classmethod
    def none(cls, dim: int, positions: int, device: torch.device) -> Turn:
        """Of a layer whose keys do not turn."""
        empty = torch.ones(max(positions, TILE), 0, device=device)
        return cls.of(empty, empty, dim)

    def pairs(self, x: Tensor) -> Tensor:
        """Numbers of heads in the order of their pairs."""
        return x.index_select(-1, self.order)

    def turned(self, x_BHTD: Tensor, positions_BT: Tensor) -> Tensor:
        """Heads at these positions, in pairs and turned, float32."""
        low, high = self.pairs(x_BHTD).float().chunk(2, dim=-1)
        cos, sin = (table[positions_BT].unsqueeze(1) for table in (self.cos, self.sin))
        return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)


@dataclass(frozen=True, eq=False)
class Frame:
    """What a layer brings, whatever it has stored: its streams' coordinates as operands of kernels.

    `back` float32 [G, D, D]: M of keys. `matrix`: the same in pairs, in the order in which lanes
    load it. `result` float32 [G, D or (1 + G) D, D]: H, then M_g P_g of each key head g.
    """

    turn: Turn
    back: Tensor
    matrix: Tensor
    result: Tensor

    @classmethod
    def of(cls, keys: StoredStream, values: StoredStream, turn: Turn) -> Frame:
        assert keys.codec is not None
        groups, dim, device = keys.stream.heads, keys.stream.dim, turn.cos.device
        back = rotate_back(torch.eye(dim, device=device), randomized=True).contiguous()
        result, unturned = back.expand(groups, dim, dim), back.expand(groups, dim, dim)
        basis, prediction = basis_for(keys.codec, keys.stream), values.stream.prediction
        if basis is not None:
            unturned = back @ basis.back
        if prediction is not None:
            weight = prediction.weight.float().view(groups, dim, groups, dim)
            told = torch.einsum("hcd,hdge->ghce", unturned, weight).flatten(1, 2)
            result = torch.cat((result, told), dim=1)
        halves = turn.pairs(unturned).half().view(groups, 4, dim // 16, 2, 2, 2, dim // 16, 8)
        # a lane's quarter, step, word, one of two; low or high, columns, r -> as packed.cu takes it
        lanes = halves.permute(0, 6, 2, 7, 1, 5, 3, 4).contiguous().view(torch.int32)
        return cls(
            turn, unturned, lanes.view(groups, dim // 16, dim // 16, 32, 4), result.contiguous()
        )


@dataclass(frozen=True, eq=False)
class PackedPast:
    """A layer's cache under one arm, ready for one new token per sequence at a time. It has to be
    made again only when tokens have been coded.

    keys, values  coded tokens; spans int32 [B, 2]: position of the first, how many there are
    around        float32 [B, G, 2, D]: mean and sink of keys, in pairs
    offsets       float32 [B, G, 4, D]: a', b', and what a and b of all key heads say of values
    exact         the other tokens, decoded: keys turned, in pairs, and values, [B, G, E, D]
    """

    frame: Frame
    keys: Coded
    values: Coded
    spans: Tensor
    around: Tensor
    offsets: Tensor
    exact: Pair

    @classmethod
    def of(
        cls, keys: StoredStream, values: StoredStream, frame: Frame, tokens_B: Tensor | None = None
    ) -> PackedPast:
        """`tokens_B`: how many are coded of each, where StoredStream.joined padded them."""
        assert refusal(keys, values) is None and keys.middle and values.middle
        turn, prediction = frame.turn, values.stream.prediction
        coarse = _coarse(keys.middle, values.middle)
        starts = keys.middle.positions[:, 0]
        counts = torch.full_like(starts, coarse) if tokens_B is None else tokens_B.to(starts)
        basis = keys.middle.basis
        around, own = _around(keys.middle), _around(values.middle)
        around = around if basis is None else around @ basis.back
        told = torch.zeros_like(own) if prediction is None else prediction.values(around)
        return cls(
            frame, _coded(keys.middle, coarse), _coded(values.middle, coarse),
            torch.stack((starts, counts), dim=1).int().contiguous(),
            turn.pairs(around).contiguous(), torch.cat((own, told), dim=2).contiguous(),
            _exact(keys, values, turn, coarse),
        )  # fmt: skip

    def attend(
        self, kernels: PackedKernels, q_BQD: Tensor, own: Pair, *, scale: float,
        softcap: float | None = None, sinks_Q: Tensor | None = None,
        own_tokens_B: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """[B, Q, D] in the dtype of q, which sits at its position, turned. `own`: further exact
        tokens [B, G, E, D], the query's among them, keys turned; of each sequence the first
        `own_tokens_B`, by default all. Nothing is behind a window. Rules: model.attention.Rule."""
        frame, turn, dtype = self.frame, self.frame.turn, q_BQD.dtype
        batch, heads, dim = q_BQD.shape
        q = turn.pairs(q_BQD).float() * (scale / softcap if softcap else scale * LOG2_E)
        cap, factors = softcap * LOG2_E if softcap else 0.0, scale_values(q.device)
        weighed = kernels.packed_scores(
            q, self.keys, self.values, factors, self.around, frame.matrix, turn.near,
            (turn.cos, turn.sin), self.spans, cap,
        )  # fmt: skip

        def sums(coded: Coded, every_head: bool) -> Tensor:
            return kernels.packed_sums(coded, factors, self.spans, weighed, every_head)

        predicted = frame.result.shape[1] > dim
        parts = sums(self.values, False), sums(self.keys, True) if predicted else None
        columns = (
            torch.cat((self.exact[0], turn.pairs(own[0])), dim=2).to(dtype),
            torch.cat((self.exact[1], own[1]), dim=2).to(dtype),
        )
        before, new = self.exact[0].shape[2], own[0].shape[2]
        counts = torch.full((batch,), before + new, dtype=torch.int32, device=q.device)
        if own_tokens_B is not None:
            counts = (own_tokens_B + before).int()
        sinks = None if sinks_Q is None else sinks_Q.float() * LOG2_E
        base, levels = kernels.packed_join(
            q, columns, counts, sinks, weighed, parts,
            (self.values.sizes, self.keys.sizes), self.offsets, cap,
        )  # fmt: skip
        found = torch.baddbmm(base, levels, frame.result)
        return (
            found.view(len(found), batch, -1, dim)
            .transpose(0, 1)
            .reshape(batch, heads, dim)
            .to(dtype)
        )


def attend_decoded(
    keys: StoredStream, values: StoredStream, turn: Turn, q_BQD: Tensor, own: Pair, *, scale: float,
    softcap: float | None = None, sinks_Q: Tensor | None = None, tokens_B: Tensor | None = None,
    own_tokens_B: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The oracle: as PackedPast.attend, by decoding everything; float32."""
    assert keys.middle is not None
    key_pieces = keys.pieces()
    k, v = (
        joined_pieces(pieces).float()
        for pieces in (key_pieces, values.pieces(keys=(keys, key_pieces)))
    )
    head = 0 if keys.head is None else keys.head.shape[2]
    coded, tokens, device = keys.middle.packed.tokens, k.shape[2], k.device
    k = torch.cat((turn.turned(k, _positions(keys, tokens)), turn.pairs(own[0]).float()), dim=2)
    v = torch.cat((v, own[1].float()), dim=2)
    column = torch.arange(k.shape[2], device=device)
    seen = torch.ones(len(k), k.shape[2], dtype=torch.bool, device=device)
    if tokens_B is not None:
        seen &= (column < head + tokens_B[:, None]) | (column >= head + coded)
    if own_tokens_B is not None:
        seen &= column < tokens + own_tokens_B[:, None]
    q = turn.pairs(q_BQD).float().view(len(k), k.shape[1], -1, k.shape[3])
    scores = q @ k.mT * scale
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    scores = scores.masked_fill(~seen[:, None, None], -torch.inf)
    if sinks_Q is not None:
        sink = sinks_Q.float().view(1, k.shape[1], -1, 1).expand(len(q), -1, -1, 1)
        scores = torch.cat((scores, sink), dim=3)
    return (scores.softmax(-1)[..., : k.shape[2]] @ v).flatten(1, 2)


def _positions(keys: StoredStream, tokens: int) -> Tensor:
    """Of all tokens, [B, tokens]; each sequence's coded ones begin where it says."""
    assert keys.middle is not None
    head = 0 if keys.head is None else keys.head.shape[2]
    starts = keys.middle.positions[:, :1]
    column = torch.arange(tokens, device=starts.device)
    return torch.where(column < head, keys.first + column, starts - head + column)


def _coarse(keys: Encoded, values: Encoded) -> int:
    """How many of the coded tokens are left coarse: whole bytes of flags, or all."""
    fine = max(one.fine.packed.tokens if one.fine else 0 for one in (keys, values))
    tokens = keys.packed.tokens
    return (tokens - fine) // FLAGS * FLAGS if fine else tokens


def _coded(middle: Encoded, tokens: int) -> Coded:
    packed = middle.packed.slice_tokens(0, tokens)
    assert packed.scale is not None and packed.mean is not None
    sizes = packed.mean[..., packed.dim].float().contiguous()
    levels = Code(8, packed.bits).levels(sizes.device)
    flags = middle.found.flags if middle.found else None
    return Coded(packed.bits, packed.codes, packed.scale, sizes, flags, levels)


def _around(middle: Encoded) -> Tensor:
    """Mean and sink in the codec's coordinates, float32 [B, G, 2, D]."""
    assert middle.packed.mean is not None
    mean = middle.packed.mean[:, :, None, : middle.packed.dim].float()
    return torch.cat((mean, middle.found.center.float() if middle.found else mean), dim=2)


def _exact(keys: StoredStream, values: StoredStream, turn: Turn, coarse: int) -> Pair:
    """What lies around the first `coarse` coded tokens, decoded; keys turned, in pairs."""
    assert keys.middle is not None
    head = 0 if keys.head is None else keys.head.shape[2]
    last_keys, last_values = (
        stored.since(keys.first + head + coarse, {}) for stored in (keys, values)
    )
    key_pieces = last_keys.pieces()
    value_pieces = last_values.pieces(keys=(last_keys, key_pieces))
    k, v = _joined(keys, key_pieces), _joined(values, value_pieces)
    positions = _positions(keys, coarse + k.shape[2])
    around = torch.cat((positions[:, :head], positions[:, head + coarse :]), dim=1)
    return turn.turned(k, around).to(k.dtype), v


def _joined(stored: StoredStream, after: Sequence[Tensor]) -> Tensor:
    """The exact tokens before the coded ones and what comes after these, perhaps nothing."""
    assert stored.middle is not None
    size = *stored.middle.packed.codes.shape[:2], 0, stored.stream.dim
    none = stored.middle.packed.codes.new_empty(size, dtype=stored.middle.dtype)
    return torch.cat([none if stored.head is None else stored.head, *after], dim=2)
