"""The frame of the codecs: what every method gets from it, and what a method of one's own needs."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kv_codecs import gaussians, positions_of
from torch import Tensor

from layersweep.kv import Stream
from layersweep.kv.check import check
from layersweep.kv.codec import Codec
from layersweep.kv.identity import Untransformed
from layersweep.kv.methods import METHODS
from layersweep.kv.vector_codec import Layout, RowCodec, VectorCodec

INSTALLED = [name for name, method in METHODS.items() if method.installed]
VALUE = Stream("v", 2, 64, role="value", rope=False)


def codec_of(name: str) -> Codec:
    keys, values = METHODS[name].pairs[0]
    return METHODS[name].build(keys, values, {})


@dataclass(frozen=True)
class Signs(RowCodec):
    """A method of 9 lines: the signs of a vector, a byte each, and its largest magnitude."""

    key_bits: int = 8
    value_bits: int = 8
    option: str = "a"

    method = "signs"

    def layout(self, dim: int, bits: int) -> Layout:
        return Layout(dim)

    def encode_rows(self, x_ND: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        return x_ND < 0, x_ND.abs().amax(1)

    def decode_rows(self, codes: Tensor, scale: Tensor | None, dim: int, bits: int) -> Tensor:
        assert scale is not None
        return (1 - 2 * codes.float()) * scale.float().unsqueeze(1)

    def identity(self) -> Codec:
        return Untransformed(of=self.method)


@pytest.mark.parametrize("name", INSTALLED)
def test_every_method_goes_through_the_frame_and_keeps_the_promises(name: str) -> None:
    codec = codec_of(name)
    assert isinstance(codec, VectorCodec)
    assert isinstance(codec.identity(), VectorCodec)
    broken = [verdict.promise for verdict in check(codec) if verdict.kept is False]
    # tokens that wait for their group count as fp16, and are kept in the float32 they come in here
    waiting = {"kivi": ("keys", "latents"), "kvarn": ("keys", "values", "latents")}
    assert broken == [f"{role}: nbytes is what is stored" for role in waiting.get(name, ())]


@pytest.mark.parametrize("name", INSTALLED)
def test_no_byte_depends_on_what_memory_held_before(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = gaussians(1, 2, 40, 64)
    x[0, 1, 3, 5] = torch.nan
    packed = []
    for dirt in (0, 1):

        def dirty(*sizes: object, dirt: int = dirt, **kind: object) -> Tensor:
            return torch.zeros(*sizes, **kind).fill_(dirt)  # type: ignore[arg-type]

        def dirty_like(like: Tensor, dirt: int = dirt) -> Tensor:
            return torch.full_like(like, dirt)

        monkeypatch.setattr(torch, "empty", dirty)
        monkeypatch.setattr(torch, "empty_like", dirty_like)
        packed.append(codec_of(name).encode(x, VALUE, positions_of(x)))
    assert torch.equal(packed[0].codes, packed[1].codes)


@settings(max_examples=30, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 40)),
    cuts=st.tuples(st.integers(0, 40), st.integers(0, 40)),
    dtype=st.sampled_from([torch.float32, torch.float16]),
)
def test_two_functions_are_a_codec(
    shape: tuple[int, int], cuts: tuple[int, int], dtype: torch.dtype
) -> None:
    batch, tokens = shape
    codec, x = Signs(), gaussians(batch, 2, tokens, 64).to(dtype)
    at, (first, second) = positions_of(x), sorted(min(cut, tokens) for cut in cuts)
    whole = codec.encode(x, VALUE, at)
    assert codec.nbytes(whole) == batch * 2 * tokens * (64 + 2)
    decoded = codec.decode(whole, at)
    assert decoded.dtype == torch.float32
    largest = x.abs().amax(-1, keepdim=True).half().float()
    assert torch.equal(decoded, torch.where(x < 0, -largest, largest))
    grown = codec.encode(x[:, :, :first], VALUE, at[:, :first])
    for part in (slice(first, second), slice(second, None)):
        grown = codec.append(grown, x[:, :, part], at[:, part])
    assert torch.equal(codec.decode(grown, at), decoded)
    one = whole.slice_batch(batch - 1, batch).slice_tokens(first, second)
    assert torch.equal(
        codec.decode(one, at[:1, first:second]), decoded[batch - 1 :, :, first:second]
    )


def test_encodings_are_shared_by_method_bits_of_the_role_and_options() -> None:
    mine = Signs(3, 2).sharing_key(VALUE)
    assert mine == Signs(4, 2).sharing_key(VALUE)
    others = (Signs(3, 4), Signs(3, 2, option="b"), Signs(3, 2).identity())
    assert mine not in [other.sharing_key(VALUE) for other in others]
