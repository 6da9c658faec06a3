"""Damaged and hostile GGUF files by name, each made from a small valid one.

    python tests/hostile_gguf.py DIR      writes them all: DIR/NAME.gguf

A case names the words that the refusal must hold: the tensor or key, and what was found. Files are
put together byte by byte: nothing here uses layersweep, and the gguf package writes none of these.
"""

from __future__ import annotations

import argparse
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
NUMBERS = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "B",
           U64: "Q", I64: "q", F64: "d"}  # fmt: skip
F32_TENSOR, Q8_0, Q4_K, IQ2_XXS = 0, 8, 12, 16
SIZES = {F32_TENSOR: (1, 4), Q8_0: (32, 34), Q4_K: (256, 144), IQ2_XXS: (256, 66)}


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def number(kind: int, value: float) -> bytes:
    return struct.pack("<" + NUMBERS[kind], value)


@dataclass(frozen=True)
class Key:
    """`value`: its bytes, whatever the type says."""

    name: str
    kind: int
    value: bytes

    def encode(self) -> bytes:
        return string(self.name) + number(U32, self.kind) + self.value


@dataclass(frozen=True)
class Tensor:
    """`sizes`: the fastest first. `offset`, `dimensions`: what the file says, if not the truth."""

    name: str | bytes
    sizes: tuple[int, ...]
    kind: int = F32_TENSOR
    data: bytes | None = None
    offset: int | None = None
    dimensions: int | None = None

    @property
    def content(self) -> bytes:
        count, (elements, nbytes) = 1, SIZES.get(self.kind, (1, 4))
        for size in self.sizes:
            count *= size
        if self.data is not None:
            return self.data
        return (
            struct.pack("<f", 0.5) * count
            if self.kind == F32_TENSOR
            else bytes(count // elements * nbytes)
        )


@dataclass(frozen=True)
class File:
    keys: tuple[Key, ...]
    tensors: tuple[Tensor, ...]
    magic: bytes = b"GGUF"
    version: int = 3
    tensor_count: int | None = None
    key_count: int | None = None
    alignment: int = 32
    tail: bytes = b""
    cut: int | None = None
    replaced: tuple[tuple[int, bytes], ...] = field(default=())

    def encode(self) -> bytes:
        count = len(self.tensors) if self.tensor_count is None else self.tensor_count
        keys = len(self.keys) if self.key_count is None else self.key_count
        head = self.magic + number(U32, self.version) + number(U64, count) + number(U64, keys)
        head += b"".join(key.encode() for key in self.keys)
        data = b""
        for one in self.tensors:
            offset = len(data) if one.offset is None else one.offset
            dimensions = len(one.sizes) if one.dimensions is None else one.dimensions
            sizes = b"".join(number(U64, size) for size in one.sizes)
            head += string(one.name) + number(U32, dimensions) + sizes
            head += number(U32, one.kind) + number(U64, offset)
            data += one.content + bytes(-len(one.content) % self.alignment)
        raw = bytearray(head + bytes(-len(head) % self.alignment) + data + self.tail)
        for at, new in self.replaced:
            raw[at : at + len(new)] = new
        return bytes(raw[: self.cut])

    def with_key(self, name: str, kind: int, value: bytes) -> File:
        """In place of the one of that name, or behind all."""
        key = Key(name, kind, value)
        if any(one.name == name for one in self.keys):
            return replace(self, keys=tuple(key if one.name == name else one for one in self.keys))
        return replace(self, keys=(*self.keys, key))

    def without_key(self, name: str) -> File:
        return replace(self, keys=tuple(one for one in self.keys if one.name != name))

    def with_tensor(self, name: str, change: Callable[[Tensor], Tensor]) -> File:
        changed = (change(one) if one.name == name else one for one in self.tensors)
        return replace(self, tensors=tuple(changed))

    def without_tensor(self, name: str) -> File:
        return replace(self, tensors=tuple(one for one in self.tensors if one.name != name))


def valid() -> File:
    """A Llama of one layer, hidden 32, one head, vocabulary 64, matrices in Q8_0."""
    counts = {
        "context_length": 64, "embedding_length": 32, "block_count": 1, "feed_forward_length": 32,
        "attention.head_count": 1, "attention.head_count_kv": 1,
    }  # fmt: skip
    keys = [
        Key("general.architecture", STRING, string("llama")),
        *(Key(f"llama.{name}", U32, number(U32, value)) for name, value in counts.items()),
        Key("llama.attention.layer_norm_rms_epsilon", F32, number(F32, 1e-5)),
        Key("llama.rope.freq_base", F32, number(F32, 1e4)),
    ]
    square = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    tensors = [
        Tensor("token_embd.weight", (32, 64), Q8_0),
        Tensor("output_norm.weight", (32,)),
        Tensor("output.weight", (32, 64), Q8_0),
        *(Tensor(f"blk.0.{name}.weight", (32,)) for name in ("attn_norm", "ffn_norm")),
        *(Tensor(f"blk.0.{name}.weight", (32, 32), Q8_0) for name in square),
    ]
    return File(tuple(keys), tuple(tensors))


@dataclass(frozen=True)
class Case:
    """`says`: words that one line of the refusal holds. `values`: found as blocks are read."""

    file: File
    says: tuple[str, ...]
    values: bool = False


def case(file: File, *says: str, values: bool = False) -> Case:
    return Case(file, says, values)


V, Q = valid(), "blk.0.attn_q.weight"
COUNT, ARCHITECTURE = "llama.block_count", "general.architecture"
U64_MAX, I64_MAX = 2**64 - 1, 2**63 - 1


def strings(*texts: str, count: int | None = None) -> bytes:
    stated = len(texts) if count is None else count
    return number(U32, STRING) + number(U64, stated) + b"".join(map(string, texts))


def array(kind: int, count: int, raw: bytes = b"") -> bytes:
    return number(U32, kind) + number(U64, count) + raw


def scale(value: float) -> bytes:
    return struct.pack("<e", value) + bytes(32) + bytes(34 * 31)


HEADS = {
    "empty": case(replace(V, cut=0), "found a file that begins with b''"),
    "three-bytes": case(replace(V, cut=3), "found a file that begins with b''"),
    "magic-of-another-format": case(replace(V, magic=b"GGML"), "begins with b'GGML'"),
    "magic-backwards": case(replace(V, magic=b"FUGG"), "begins with b'FUGG'"),
    "safetensors": case(replace(V, replaced=((0, b"\x10\0\0\0\0\0\0\0{}"),)), "begins with"),
    "magic-alone": case(replace(V, cut=4), "found 4 bytes (truncated)"),
    "version-0": case(replace(V, version=0), "found version 0"),
    "version-1": case(replace(V, version=1), "found version 1"),
    "version-4": case(replace(V, version=4), "found version 4"),
    "version-max": case(replace(V, version=2**32 - 1), "found version 4294967295"),
    "big-endian": case(replace(V, version=3 << 24), "a big-endian file"),
    "tensors-2-64": case(replace(V, tensor_count=U64_MAX), f"found {U64_MAX} tensors"),
    "tensors-2-63": case(replace(V, tensor_count=2**63), f"found {2**63} tensors"),
    "tensors-a-billion": case(replace(V, tensor_count=10**9), "found 1000000000 tensors"),
    "keys-2-64": case(replace(V, key_count=U64_MAX), f"found {U64_MAX} keys"),
    "keys-a-million": case(replace(V, key_count=10**6), "found 1000000 keys"),
    "one-key-more": case(replace(V, key_count=len(V.keys) + 1), "needed"),
    "one-key-less": case(replace(V, key_count=len(V.keys) - 1), "needed"),
    "one-tensor-more": case(replace(V, tensor_count=len(V.tensors) + 1), "tensor 12: found"),
    "cut-in-the-keys": case(replace(V, cut=100), "found 100 bytes (truncated)"),
    "cut-in-the-tensors": case(replace(V, cut=600), "found 600 bytes (truncated)"),
    "cut-in-the-data": case(
        replace(V, cut=len(V.encode()) - 40), "blk.0.ffn_down.weight", "in the file (truncated)"
    ),
    "no-data": case(replace(V, cut=1100), "in the file (truncated)"),
}  # fmt: skip

KEYS = {
    "key-without-end": case(
        replace(V, keys=(Key("", U32, b""), *V.keys), replaced=((24, number(U64, U64_MAX)),)),
        "key 0: found", "(truncated)",
    ),
    "key-longer-than-the-file": case(
        replace(V, replaced=((24, number(U64, 10**9)),)), "key 0: found", "(truncated)"
    ),
    "key-no-utf-8": case(
        replace(V, replaced=((32, b"\xff\xfe"),)), "key 0: found a string that is no UTF-8"
    ),
    "key-twice": case(
        replace(V, keys=(*V.keys, V.keys[1])), "llama.context_length: found the same key twice"
    ),
    "key-unknown": case(
        V.with_key("llama.attention.scale_of_mine", F32, number(F32, 1.0)),
        "llama.attention.scale_of_mine: found 1.0, needed a key that is known here",
    ),
    "key-with-control-characters": case(
        V.with_key("llama.\n\x1b[2Jx", U32, number(U32, 1)), "llama.\\n\\x1b[2Jx: found 1"
    ),
    "value-type-13": case(V.with_key(COUNT, 13, b""), f"{COUNT}: found a value of type 13"),
    "value-type-max": case(
        V.with_key(COUNT, 2**32 - 1, b""), f"{COUNT}: found a value of type 4294967295"
    ),
    "bool-of-2": case(
        V.with_key("general.x", BOOL, b"\2"), "general.x: found a boolean of 2, needed 0 or 1"
    ),
    "string-without-end": case(
        V.with_key("general.name", STRING, number(U64, U64_MAX)),
        "general.name: found", "(truncated)",
    ),
    "string-of-2-63": case(
        V.with_key("general.name", STRING, number(U64, 2**63)), "general.name: found"
    ),
    "string-no-utf-8": case(
        V.with_key("general.name", STRING, string(b"\xc3\x28")),
        "general.name: found a string that is no UTF-8",
    ),
    "array-of-arrays": case(
        V.with_key("general.x", ARRAY, array(ARRAY, 1, array(U8, 1, b"\0"))),
        "general.x: found an array of type 9",
    ),
    "array-of-type-99": case(
        V.with_key("general.x", ARRAY, array(99, 1)), "general.x: found an array of type 99"
    ),
    "array-2-64": case(
        V.with_key("general.x", ARRAY, array(U64, U64_MAX)), "general.x: found", "(truncated)"
    ),
    "array-whose-bytes-overflow": case(
        V.with_key("general.x", ARRAY, array(U64, 2**61)), "general.x: found", "(truncated)"
    ),
    "array-longer-than-the-file": case(
        V.with_key("general.x", ARRAY, array(F32, 10**8)), "general.x: found", "(truncated)"
    ),
    "strings-2-64": case(
        V.with_key("tokenizer.ggml.tokens", ARRAY, strings(count=U64_MAX)),
        f"tokenizer.ggml.tokens: found {U64_MAX} strings in arrays",
    ),
    "strings-more-than-there-are": case(
        V.with_key("tokenizer.ggml.tokens", ARRAY, strings("a", count=2**20)),
        "tokenizer.ggml.tokens: found",
    ),
    "alignment-0": case(
        V.with_key("general.alignment", U32, number(U32, 0)),
        "general.alignment: found 0, needed a power of two",
    ),
    "alignment-3": case(
        V.with_key("general.alignment", U32, number(U32, 3)), "general.alignment: found 3"
    ),
    "alignment-2-31": case(
        V.with_key("general.alignment", U32, number(U32, 2**31)), "general.alignment: found"
    ),
    "alignment-2-62": case(
        V.with_key("general.alignment", U64, number(U64, 2**62)), "general.alignment: found"
    ),
    "alignment-negative": case(
        V.with_key("general.alignment", I32, number(I32, -32)), "general.alignment: found -32"
    ),
    "alignment-text": case(
        V.with_key("general.alignment", STRING, string("32")), "general.alignment: found '32'"
    ),
    "alignment-of-another-file": case(
        V.with_key("general.alignment", U32, number(U32, 4096)), "offset 2176, needed 4096"
    ),
}  # fmt: skip

CONFIG = {
    "no-architecture": case(V.without_key(ARCHITECTURE), f"{ARCHITECTURE}: found ''"),
    "architecture-unknown": case(
        V.with_key(ARCHITECTURE, STRING, string("gptj")),
        f"{ARCHITECTURE}: found 'gptj', needed one of llama,",
    ),
    "architecture-a-number": case(
        V.with_key(ARCHITECTURE, U32, number(U32, 3)), f"{ARCHITECTURE}: found ''"
    ),
    "no-block-count": case(V.without_key(COUNT), f"{COUNT}: found None, needed a positive integer"),
    "blocks-0": case(V.with_key(COUNT, U32, number(U32, 0)), f"{COUNT}: found 0"),
    "blocks-negative": case(V.with_key(COUNT, I64, number(I64, -1)), f"{COUNT}: found -1"),
    "blocks-2-31": case(V.with_key(COUNT, U32, number(U32, 2**31 - 1)), "num_hidden_layers"),
    "blocks-2-64": case(V.with_key(COUNT, U64, number(U64, U64_MAX)), f"{COUNT}: found {U64_MAX}"),
    "blocks-a-float": case(V.with_key(COUNT, F32, number(F32, 1.0)), f"{COUNT}: found 1.0"),
    "blocks-text": case(V.with_key(COUNT, STRING, string("1")), f"{COUNT}: found '1'"),
    "blocks-true": case(V.with_key(COUNT, BOOL, b"\1"), f"{COUNT}: found True"),
    "two-blocks": case(V.with_key(COUNT, U32, number(U32, 2)), "num_hidden_layers = 2"),
    "heads-differ-by-layer": case(
        V.with_key("llama.attention.head_count_kv", ARRAY, array(U32, 2, struct.pack("<2I", 1, 2))),
        "llama.attention.head_count_kv: found [1, 2]", "one for all layers",
    ),
    "epsilon-nan": case(
        V.with_key("llama.attention.layer_norm_rms_epsilon", F32, number(F32, float("nan"))),
        "llama.attention.layer_norm_rms_epsilon: found nan",
    ),
    "theta-infinite": case(
        V.with_key("llama.rope.freq_base", F32, number(F32, float("inf"))),
        "llama.rope.freq_base: found inf",
    ),
    "theta-negative": case(
        V.with_key("llama.rope.freq_base", F64, number(F64, -1e4)), "llama.rope.freq_base: found"
    ),
    "rope-of-another-kind": case(
        V.with_key("llama.rope.scaling.type", STRING, string("mine")),
        "llama.rope.scaling.type: found 'mine'",
    ),
    "partial-rope": case(
        V.with_key("llama.rope.dimension_count", U32, number(U32, 16)),
        "llama.rope.dimension_count: found 16, needed 32",
    ),
    "vocabulary-of-another-size": case(
        V.with_key("llama.vocab_size", U32, number(U32, 65)),
        "llama.vocab_size: found 65, needed 64",
    ),
    "experts-without-tensors": case(
        V.with_key("llama.expert_count", U32, number(U32, 8)).with_key(
            "llama.expert_used_count", U32, number(U32, 2)
        ),
        "8 experts of layer 0",
    ),
    "experts-2-31": case(
        V.with_key("llama.expert_count", U32, number(U32, 2**31 - 1)), "num_local_experts"
    ),
    "split-without-its-files": case(
        V.with_key("split.count", U16, number(U16, 3)), "split.count: found"
    ),
}  # fmt: skip

TENSORS = {
    "name-of-64-bytes": case(
        V.with_tensor(Q, lambda one: replace(one, name="x" * 64)), "found a name of 64 bytes"
    ),
    "name-without-end": case(
        V.with_tensor(Q, lambda one: replace(one, name=b"\0" * 5000)), "found a name of 5000 bytes"
    ),
    "name-no-utf-8": case(
        V.with_tensor(Q, lambda one: replace(one, name=b"\xff")), "tensor 5: found a string"
    ),
    "dimensions-0": case(
        V.with_tensor(Q, lambda one: replace(one, sizes=())), f"{Q}: found 0 dimensions"
    ),
    "dimensions-5": case(
        V.with_tensor(Q, lambda one: replace(one, sizes=(32, 32, 1, 1, 1))),
        f"{Q}: found 5 dimensions",
    ),
    "dimensions-2-32": case(
        V.with_tensor(Q, lambda one: replace(one, dimensions=2**32 - 1)),
        f"{Q}: found 4294967295 dimensions",
    ),
    "size-0": case(
        V.with_tensor(Q, lambda one: replace(one, sizes=(32, 0))), f"{Q}: found Q8_0 [0, 32]"
    ),
    "size-2-63": case(
        V.with_tensor(Q, lambda one: replace(one, sizes=(32, 2**63), data=b"")),
        f"{Q}: found dimensions [32, {2**63}]",
    ),
    "sizes-overflow": case(
        V.with_tensor(Q, lambda one: replace(one, sizes=(2**32, 2**32), data=b"")),
        f"{Q}: found dimensions", "fewer than 2^63 elements",
    ),
    "sizes-overflow-to-0": case(
        V.with_tensor(Q, lambda one: replace(one, sizes=(2**32, 2**32, 2, 2), data=b"")),
        f"{Q}: found dimensions",
    ),
    "size-of-the-next-terabyte": case(
        V.with_tensor(Q, lambda one: replace(one, sizes=(32, 2**40), data=b"")),
        Q, "in the file (truncated)",
    ),
    "type-99": case(V.with_tensor(Q, lambda one: replace(one, kind=99)), f"{Q}: found type 99"),
    "type-4": case(V.with_tensor(Q, lambda one: replace(one, kind=4)), f"{Q}: found type 4"),
    "type-max": case(
        V.with_tensor(Q, lambda one: replace(one, kind=2**32 - 1)), f"{Q}: found type 4294967295"
    ),
    "type-not-decoded": case(
        V.with_tensor(Q, lambda one: replace(one, sizes=(256, 4), kind=IQ2_XXS)),
        f"{Q}: found type IQ2_XXS, needed a type that is decoded here",
    ),
    "rows-of-part-of-a-block": case(
        V.with_tensor(Q, lambda one: replace(one, sizes=(33, 32), data=b"")),
        f"{Q}: found rows of 33, needed a multiple of 32 for Q8_0",
    ),
    "rows-for-another-type": case(
        V.with_tensor(Q, lambda one: replace(one, kind=Q4_K, data=b"")),
        f"{Q}: found rows of 32, needed a multiple of 256 for Q4_K",
    ),
    "offset-2-64": case(
        V.with_tensor(Q, lambda one: replace(one, offset=U64_MAX)), f"{Q}: found offset {U64_MAX}"
    ),
    "offset-of-another": case(
        V.with_tensor(Q, lambda one: replace(one, offset=0)), f"{Q}: found offset 0"
    ),
    "offset-1": case(V.with_tensor(Q, lambda one: replace(one, offset=1)), f"{Q}: found offset 1"),
    "tensor-twice": case(
        replace(V, tensors=(*V.tensors, V.tensors[5])), f"{Q}: found the same tensor twice"
    ),
    "tensor-missing": case(V.without_tensor(Q), f"{Q}: found no such tensor"),
    "embedding-missing": case(V.without_tensor("token_embd.weight"), "token_embd.weight: found no"),
    "tensor-unknown": case(
        replace(V, tensors=(*V.tensors, Tensor("blk.0.attn_x.weight", (32,)))),
        "blk.0.attn_x.weight: found unexpected F32 [32]",
    ),
    "tensor-of-another-layer": case(
        replace(V, tensors=(*V.tensors, Tensor("blk.7.attn_q.weight", (32, 32), Q8_0))),
        "blk.7.attn_q.weight: found unexpected",
    ),
    "shape-of-another": case(
        V.with_tensor(Q, lambda one: replace(one, sizes=(32, 64))), f"{Q}: found Q8_0 [64, 32]"
    ),
    "shape-turned": case(
        V.with_tensor("token_embd.weight", lambda one: replace(one, sizes=(64, 32))),
        "token_embd.weight: found Q8_0 [32, 64]",
    ),
    "embedding-of-one-dimension": case(
        V.with_tensor("token_embd.weight", lambda one: replace(one, sizes=(2048,))),
        "token_embd.weight: found Q8_0 [2048]",
    ),
    "frequencies-of-another-size": case(
        replace(V, tensors=(*V.tensors, Tensor("rope_freqs.weight", (15,)))),
        "rope_freqs.weight: found F32 [15], needed F32 [16]",
    ),
    "frequencies-of-0": case(
        replace(V, tensors=(*V.tensors, Tensor("rope_freqs.weight", (16,), data=bytes(64)))),
        "rope_scaling.short_factor",
    ),
}  # fmt: skip

VALUES = {
    f"scale-{name}": case(
        V.with_tensor(Q, lambda one, value=value: replace(one, data=scale(value))),
        f"{Q}: found a scale of {value} in block 0, needed finite scales",
        values=True,
    )
    for name, value in (("nan", float("nan")), ("infinite", float("inf")), ("minus", float("-inf")))
}

CASES = HEADS | KEYS | CONFIG | TENSORS | VALUES


def mutated(rng: random.Random, raw: bytes) -> bytes:
    """A few bytes of the header changed, most often to a number that a reader trips over."""
    changed = bytearray(raw)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at, kind = rng.randrange(min(len(changed), 1200) or 1), rng.random()
        if kind < 0.4:
            changed[at : at + 1] = bytes([rng.choice((0, 1, 2, 8, 9, 12, 127, 128, 255))])
        elif kind < 0.7:
            size, value = rng.choice((4, 8)), rng.choice((0, 2**31, 2**32 - 1, -1, -(2**63)))
            changed[at : at + size] = (value % 2 ** (8 * size)).to_bytes(size, "little")
        elif kind < 0.85:
            del changed[at : at + rng.choice((1, 4, 8, 40))]
        else:
            changed[at:at] = bytes(changed[at : at + rng.choice((1, 4, 8, 40))])
    return bytes(changed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for name, one in CASES.items():
        (folder / f"{name}.gguf").write_bytes(one.file.encode())


if __name__ == "__main__":
    main()
