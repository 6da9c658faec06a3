"""Damaged and hostile checkpoints by name, each made from a small valid one.

    python tests/hostile_checkpoints.py DIR      writes them all: DIR/NAME is one checkpoint

A case names the words that the refusal must hold: the file, the tensor or field, what was found.
Nothing here uses layersweep; `hostile_run.py` meets them with its command line.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from checkpoint_builders import STATE
from hostile_damages import (
    CHARACTERS,
    CONFIG,
    EMPTY_LISTS,
    FIRST,
    FUSED,
    HEAD,
    INDEX,
    K_PROJ,
    NORM,
    Q_PROJ,
    SECOND,
    SINGLE,
    TOKENIZER,
    TOKENIZER_CONFIG,
    Damage,
    added,
    base,
    both,
    chat,
    config,
    content,
    enlarged,
    entry,
    entry_of,
    floats,
    gone,
    header_text,
    json_file,
    length_field,
    linked,
    mapped,
    model_part,
    nested,
    outside,
    pickle_only,
    pipe,
    pre_tokenized,
    remote_code,
    shard,
    state,
    state_text,
    tensor_of,
    text,
    tokenizer_part,
    unlinked,
    value,
    without,
    write_bomb,
)

# headers: any command refuses it. values: found as blocks are read. tokenizer, chat: by `eval`
# alone, which needs them; a chat template is rendered for needles only.
Seen = Literal["headers", "values", "tokenizer", "chat"]

# --- the corpus ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """`says`: words that one line of the refusal holds."""

    damage: Damage
    says: tuple[str, ...]
    seen: Seen = "headers"
    shards: int = 1
    layout: str = "per_expert"


def case(damage: Damage, *says: str, **options: Any) -> Case:
    return Case(damage, says, **options)


DEEP = "JSON nested deeper than"
MANY = "JSON of more than"
PLAIN = "the plain name of a .safetensors file"
ONE = '{"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}'

LENGTHS = {
    "length-0": case(length_field(0), SINGLE, "found a header that is no JSON"),
    "length-3": case(length_field(3), SINGLE, "found a header that is no JSON"),
    "length-past-the-end": case(length_field(10**7), SINGLE, "bytes (truncated), needed 10000008"),
    "length-2-63": case(length_field(2**63), SINGLE, f"a header length of {2**63}"),
    "length-minus-1": case(length_field(2**64 - 1), SINGLE, f"a header length of {2**64 - 1}"),
    "length-into-the-data": case(
        lambda folder: length_field(
            int.from_bytes((folder / SINGLE).read_bytes()[:8], "little") + 64
        )(folder),
        *(SINGLE, "found a header that is no"),
    ),
    "file-empty": case(content(SINGLE, b""), SINGLE, "found 0 bytes, needed at least the 8"),
    "file-of-7-bytes": case(content(SINGLE, b"\0" * 7), SINGLE, "found 7 bytes"),
    "file-cut": case(
        lambda folder: os.truncate(folder / SINGLE, (folder / SINGLE).stat().st_size - 1000),
        *(SINGLE, "bytes in the file (truncated)"),
    ),
    "file-cut-in-the-header": case(
        lambda folder: os.truncate(folder / SINGLE, 5000), SINGLE, "found 5000 bytes (truncated)"
    ),
    "file-trailing-bytes": case(
        shard(lambda opened: setattr(opened, "data", opened.data + b"\0" * 9)),
        *(SINGLE, "needed", "the end of"),
    ),
    "file-is-a-pickle": case(
        lambda folder: write_bomb(folder / SINGLE, folder), SINGLE, "a header length of"
    ),
    "file-is-a-pipe": case(pipe(SINGLE), SINGLE, "no readable regular file"),
}

HEADERS = {
    "header-no-json": case(header_text(lambda raw: raw[:-40]), SINGLE, "header that is no JSON"),
    "header-list": case(header_text(lambda raw: b"[]"), SINGLE, "JSON header that is no object"),
    "header-number": case(header_text(lambda raw: b"7"), SINGLE, "JSON header that is no object"),
    "header-no-utf-8": case(
        header_text(lambda raw: raw.replace(b"lm_head", b"lm_\xff\xfe")), SINGLE, "no JSON"
    ),
    "header-utf-16": case(
        header_text(lambda raw: raw.decode().encode("utf-16")), SINGLE, "header that is no JSON"
    ),
    "header-deep": case(header_text(lambda raw: nested(100_000).encode()), SINGLE, DEEP),
    "header-deep-objects": case(
        header_text(lambda raw: b'{"a":' * 50_000 + b"1" + b"}" * 50_000), SINGLE, DEEP
    ),
    "header-of-empty-lists": case(header_text(lambda raw: EMPTY_LISTS.encode()), SINGLE, MANY),
    "header-of-90-megabytes": case(
        both(length_field(90_000_000), enlarged(SINGLE, 2**30)), SINGLE, "a header length of"
    ),
    "header-same-tensor-twice": case(
        header_text(lambda raw: b'{"lm_head.weight":' + ONE.encode() + b"," + raw[1:]),
        *(SINGLE, HEAD, "the same key twice"),
    ),
    "header-same-field-twice": case(
        header_text(lambda raw: raw.replace(b'"dtype"', b'"shape": [1], "dtype"', 1)),
        *(SINGLE, "shape", "the same key twice"),
    ),
    "header-many-keys-one-twice": case(
        header_text(
            lambda raw: b"{" + b"".join(b'"%d":1,' % n for n in range(100_000)) + b'"0":1}'
        ),
        *(SINGLE, "0: found the same key twice"),
    ),
    "header-dtype-unknown": case(entry(HEAD, dtype="F4"), SINGLE, HEAD, "dtype 'F4'"),
    "header-dtype-number": case(entry(HEAD, dtype=16), SINGLE, HEAD, "dtype 16"),
    "header-dtype-deep": case(
        header_text(lambda raw: raw.replace(b'"BF16"', nested(900).encode(), 1)), SINGLE, DEEP
    ),
    "header-dtype-nested": case(
        header_text(lambda raw: raw.replace(b'"BF16"', nested(20).encode(), 1)),
        *(SINGLE, "found dtype [[[[[[[...]]]]]]]"),
    ),
    "header-dtype-megabyte": case(entry(HEAD, dtype="x" * 10**6), SINGLE, HEAD, "dtype 'xxx"),
    "header-dtype-null": case(entry(HEAD, dtype=None), SINGLE, HEAD, "dtype None"),
    "header-shape-negative": case(entry(HEAD, shape=[-128, -64]), SINGLE, HEAD, "[-128, -64]"),
    "header-shape-float": case(entry(HEAD, shape=[128.0, 64.0]), SINGLE, HEAD, "[128.0, 64.0]"),
    "header-shape-bool": case(entry(HEAD, shape=[True, 64]), SINGLE, HEAD, "shape [True, 64]"),
    "header-shape-string": case(entry(HEAD, shape="128x64"), SINGLE, HEAD, "shape '128x64'"),
    "header-shape-nan": case(entry(HEAD, shape=[math.nan]), SINGLE, HEAD, "shape [nan]"),
    "header-shape-over-2-63": case(
        entry(HEAD, shape=[2**40, 2**40]), SINGLE, HEAD, f"needed {2**81} for BF16"
    ),
    "header-shape-wraps-to-the-size": case(
        entry(HEAD, shape=[2**32 + 128, 2**32, 64]), SINGLE, HEAD, "16384 bytes"
    ),
    "header-shape-of-4000-digits": case(
        entry(HEAD, shape=[10**4000] * 2), SINGLE, HEAD, "found shape"
    ),
    "header-shape-product-of-9000-digits": case(
        entry(HEAD, shape=[10**300] * 30), SINGLE, HEAD, "found shape"
    ),
    "header-shape-of-a-million": case(entry(HEAD, shape=[2] * 10**6), SINGLE, HEAD, "found shape"),
    "header-size-of-the-shape": case(entry(HEAD, shape=[128, 65]), SINGLE, HEAD, "needed 16640"),
    "header-size-of-the-dtype": case(entry(HEAD, dtype="F32"), SINGLE, HEAD, "needed 32768"),
    "header-offsets-reversed": case(
        entry(HEAD, data_offsets=[16384, 0]), SINGLE, HEAD, "[16384, 0]"
    ),
    "header-offsets-negative": case(
        entry(HEAD, data_offsets=[-16384, 0]), SINGLE, HEAD, "[-16384, 0]"
    ),
    "header-offsets-float": case(entry(HEAD, data_offsets=[0.0, 16384.0]), SINGLE, HEAD, "[0.0, 1"),
    "header-offsets-one": case(entry(HEAD, data_offsets=[0]), SINGLE, HEAD, "data_offsets [0]"),
    "header-offsets-string": case(entry(HEAD, data_offsets="0-9"), SINGLE, HEAD, "offsets '0-9'"),
    "header-offsets-past-the-end": case(
        entry(HEAD, data_offsets=[10**9, 10**9 + 16384]), SINGLE, "unused bytes before it"
    ),
    "header-offsets-over-2-64": case(
        entry(HEAD, data_offsets=[2**64, 2**64 + 16384]), SINGLE, HEAD, "data_offsets"
    ),
    "header-overlap": case(added("x", entry_of("U8", [100], 0, 100)), SINGLE, "overlap"),
    "header-gap": case(
        shard(lambda opened: opened.header.pop(NORM)), SINGLE, "128 unused bytes before it"
    ),
    "header-entry-null": case(added("x", None), SINGLE, "x: found an incomplete header entry"),
    "header-entry-with-more": case(
        entry(HEAD, offset=3), SINGLE, HEAD, "found an incomplete header entry"
    ),
    "header-metadata-list": case(added("__metadata__", [1]), SINGLE, "__metadata__: found [1]"),
    "header-metadata-of-numbers": case(
        added("__metadata__", {"format": 7}), SINGLE, "__metadata__: found {'format': 7}"
    ),
    "header-name-with-escapes": case(
        added("\x1b[2J\n\udcff", entry_of("U8", [1], 0, 1)), SINGLE, "\\x1b[2J\\n\\udcff"
    ),
    "header-name-megabyte": case(added("y" * 10**6, None), SINGLE, "yyy", "incomplete"),
}


def dealt_elsewhere(folder: Path) -> None:
    """The index says SECOND of a tensor of FIRST."""
    owner = json.loads((folder / INDEX).read_text())["weight_map"]
    tensor = next(name for name, shard in sorted(owner.items()) if shard == FIRST)
    mapped(tensor, SECOND)(folder)


INDEXES = {
    "index-no-json": case(content(INDEX, "{"), INDEX, "no JSON"),
    "index-no-utf-8": case(content(INDEX, b'{"weight_map": {"\xff": 1}}'), INDEX, "no JSON"),
    "index-list": case(content(INDEX, "[]"), INDEX, "weight_map"),
    "index-of-empty-lists": case(content(INDEX, EMPTY_LISTS), INDEX, MANY),
    "index-of-64-gigabytes": case(enlarged(INDEX, 2**36), INDEX, f"{2**36} bytes"),
    "index-deep": case(content(INDEX, nested(200_000)), INDEX, DEEP),
    "index-no-weight-map": case(without(INDEX, "weight_map"), INDEX, "no weight_map"),
    "index-weight-map-list": case(json_file(INDEX, weight_map=[FIRST]), INDEX, "unusable"),
    "index-weight-map-empty": case(json_file(INDEX, weight_map={}), INDEX, "unusable"),
    "index-weight-map-twice": case(
        text(INDEX, '{"metadata"', '{"weight_map": {}, "metadata"'),
        *(INDEX, "weight_map: found the same key twice"),
    ),
    "index-tensor-twice": case(
        text(INDEX, '{"lm_head', f'{{"{HEAD}": "x.safetensors", "lm_head'),
        *(INDEX, f"{HEAD}: found the same key twice"),
    ),
    "index-shard-number": case(mapped(HEAD, 7), INDEX, HEAD, "shard 7", PLAIN),
    "index-shard-deep": case(
        text(INDEX, '{"lm_head', '{"a": ' + nested(900) + ', "lm_head'),
        *(INDEX, DEEP),
    ),
    "index-shard-megabyte": case(mapped(HEAD, "z" * 10**6), INDEX, HEAD, "shard 'zzz", PLAIN),
    "index-shard-null": case(mapped(HEAD, None), INDEX, HEAD, "shard None", PLAIN),
    "index-shard-parent": case(
        mapped(HEAD, f"../{FIRST}"), INDEX, HEAD, f"shard '../{FIRST}'", PLAIN
    ),
    "index-shard-dots": case(mapped(HEAD, ".."), INDEX, HEAD, "shard '..'", PLAIN),
    "index-shard-absolute": case(
        mapped(HEAD, "/etc/x.safetensors"), INDEX, HEAD, "'/etc/x.safetensors'", PLAIN
    ),
    "index-shard-subfolder": case(
        mapped(HEAD, f"a/{FIRST}"), INDEX, HEAD, f"shard 'a/{FIRST}'", PLAIN
    ),
    "index-shard-backslash": case(mapped(HEAD, f"..\\{FIRST}"), INDEX, HEAD, PLAIN),
    "index-shard-pickle": case(
        both(
            mapped(HEAD, "pytorch_model.bin"),
            lambda folder: write_bomb(folder / "pytorch_model.bin", folder),
        ),
        *(INDEX, HEAD, "shard 'pytorch_model.bin'", PLAIN),
    ),
    "index-shard-with-nul": case(mapped(HEAD, "a\0.safetensors"), INDEX, HEAD, PLAIN),
    "index-shard-with-newline": case(mapped(HEAD, "a\n.safetensors"), INDEX, HEAD, PLAIN),
    "index-shard-with-surrogate": case(mapped(HEAD, "\ud800.safetensors"), INDEX, HEAD, PLAIN),
    "index-shard-long": case(
        mapped(HEAD, "a" * 5000 + ".safetensors"), INDEX, HEAD, "shard 'aaa", PLAIN
    ),
    "index-shard-missing": case(mapped(HEAD, "x.safetensors"), "x.safetensors", "no such file"),
    "index-a-shard-for-each-of-50000": case(
        json_file(INDEX, weight_map={f"t{n}": f"{n}.safetensors" for n in range(50_000)}),
        *("0.safetensors", "no such file"),
    ),
    "index-shard-gone": case(unlinked(SECOND), SECOND, "found no such file"),
    "index-tensor-elsewhere": case(dealt_elsewhere, SECOND, "found no such tensor"),
    "index-tensor-nowhere": case(mapped("ghost.weight", FIRST), FIRST, "ghost.weight", "no such"),
    "index-link-outside": case(outside(SECOND), SECOND, "found a link to"),
    "index-link-to-etc": case(
        linked(SECOND, lambda folder: "/etc/hostname"), SECOND, "a link to /etc/hostname"
    ),
    "index-link-loop": case(linked(SECOND, lambda folder: SECOND), SECOND, "no such file"),
    "index-link-loop-of-two": case(
        both(linked(FIRST, lambda folder: SECOND), linked(SECOND, lambda folder: FIRST)),
        *(FIRST, "no such file"),
    ),
    "index-link-up-and-back": case(
        linked(SECOND, lambda folder: f"../{folder.name}-{SECOND}"), SECOND, "found a link to"
    ),
    "index-is-a-pipe": case(pipe(INDEX), INDEX, "no readable regular file"),
    "index-link-of-the-index": case(outside(INDEX), INDEX, "found a link to"),
}
INDEXES = {name: Case(c.damage, c.says, shards=2) for name, c in INDEXES.items()}


def number(field: str, *values: object) -> dict[str, Case]:
    """A case for each wrong value of a number in config.json."""
    return {
        f"config-{field}-{str(one)[:12]}": case(config(**{field: one}), CONFIG, f"{field} = ")
        for one in values
    }


CONFIGS = {
    "config-missing": case(unlinked(CONFIG), CONFIG, "found no such file"),
    "config-no-json": case(content(CONFIG, "{"), CONFIG, "no JSON"),
    "config-list": case(content(CONFIG, "[]"), CONFIG, "JSON that is no object"),
    "config-no-utf-8": case(content(CONFIG, b'{"a": "\xff"}'), CONFIG, "no JSON"),
    "config-deep": case(content(CONFIG, nested(100_000)), CONFIG, DEEP),
    "config-deep-field": case(
        text(CONFIG, '"vocab_size": 128', f'"vocab_size": {nested(900)}'), CONFIG, DEEP
    ),
    "config-of-empty-lists": case(content(CONFIG, EMPTY_LISTS), CONFIG, MANY),
    "config-of-64-gigabytes": case(enlarged(CONFIG, 2**36), CONFIG, f"{2**36} bytes"),
    "config-field-twice": case(
        text(CONFIG, '"vocab_size"', '"vocab_size": 127, "vocab_size"'),
        *(CONFIG, "vocab_size: found the same key twice"),
    ),
    "config-link-outside": case(outside(CONFIG), CONFIG, "found a link to"),
    "config-is-a-pipe": case(pipe(CONFIG), CONFIG, "no readable regular file"),
    "config-is-a-folder": case(
        both(unlinked(CONFIG), lambda folder: (folder / CONFIG).mkdir()), CONFIG, "no readable"
    ),
    "config-architecture-unknown": case(
        config(architectures=["EvilForCausalLM"]), CONFIG, "EvilForCausalLM", "can be run"
    ),
    "config-architecture-number": case(config(architectures=7), CONFIG, "architectures = 7"),
    "config-remote-code": case(
        both(remote_code, config(architectures=["X"], model_type="x")), CONFIG, "auto_map"
    ),
    **number("vocab_size", 0, -1, 2**40, 128.0, "128", True, None, math.nan),
    **number("hidden_size", 0, 10**30, math.inf),
    **number("intermediate_size", -96, 96.5),
    **number("num_hidden_layers", 0, 2**30, 2**31, 10**400, [2]),
    **number("num_attention_heads", 0, -4, 2**62),
    **number("num_key_value_heads", 0, 3),
    **number("head_dim", -16, 15, "16"),
    **number("num_local_experts", 0, 2**30, 1e9),
    **number("num_experts_per_tok", 5, 0, -2),
    **number("rms_norm_eps", 0, -1e-5, math.nan, math.inf, 1e300, 1e-300, "1e-5", 10**400),
    **number("max_position_embeddings", 0, 2**63),
    **number("sliding_window", 0, -1),
    **number("bos_token_id", -1, 1.5, True, 128),
    **number("tie_word_embeddings", "yes"),
    "config-rope-theta-0": case(
        config(rope_parameters={"rope_theta": 0}), CONFIG, "rope_theta = 0"
    ),
    "config-rope-theta-nan": case(
        config(rope_parameters={"rope_theta": math.nan}), CONFIG, "rope_theta = NaN"
    ),
    "config-rope-theta-1e-300": case(
        config(rope_parameters={"rope_theta": 1e-300}), CONFIG, "rope_theta = 1e-300"
    ),
    "config-rope-parameters-list": case(
        config(rope_parameters=[1e4]), CONFIG, "rope_parameters = [10000.0]"
    ),
    "config-rope-scaling-beside-parameters": case(
        config(rope_scaling={"type": "linear", "factor": 4.0}), CONFIG, "rope_parameters.rope_"
    ),
    "config-rope-scaling-number": case(config(rope_scaling=4), CONFIG, "rope_scaling = 4"),
    "config-layer-types-number": case(config(layer_types=7), CONFIG, "layer_types = 7"),
    "config-quantization-number": case(
        config(quantization_config=7), CONFIG, "quantization_config.quant_method = 7"
    ),
    "config-softcap": case(
        config(final_logit_softcapping=[30.0]), CONFIG, "final_logit_softcapping = [30.0]"
    ),
    "config-rope-type-unknown": case(
        config(rope_parameters={"rope_type": "eval(1)"}), CONFIG, 'rope_type = "eval(1)"'
    ),
    "config-rope-type-list": case(
        config(rope_parameters={"rope_type": [[]]}), CONFIG, "rope_type = [[]]"
    ),
    "config-hidden-act": case(config(hidden_act="__import__"), CONFIG, 'hidden_act = "__import__"'),
    "config-other-shapes": case(
        config(hidden_size=128), SINGLE, "model.embed_tokens.weight", "float [128, 128]"
    ),
    "config-more-layers": case(config(num_hidden_layers=3), CONFIG, "num_hidden_layers = 3"),
    "config-more-experts": case(config(num_local_experts=5), CONFIG, "5 experts of layer 0"),
    "config-fewer-layers": case(
        config(num_hidden_layers=1), SINGLE, "model.layers.1.", "unexpected"
    ),
}

Q_STATE = Q_PROJ + STATE
STATES = {
    "state-no-json": case(state_text(b"{"), SINGLE, Q_STATE, "no JSON"),
    "state-empty": case(state_text(b""), SINGLE, Q_STATE, "no JSON"),
    "state-no-utf-8": case(state_text(b'{"blocksize": "\xff"}'), SINGLE, Q_STATE, "no JSON"),
    "state-list": case(state_text(b"[]"), SINGLE, Q_STATE, "JSON that is no object"),
    "state-deep": case(state_text(nested(30_000).encode()), SINGLE, Q_STATE, DEEP),
    "state-deep-shape": case(
        state_text(b'{"blocksize": 64, "shape": ' + nested(900).encode() + b"}"),
        *(SINGLE, Q_STATE, DEEP),
    ),
    "state-too-long": case(state_text(b"{" + b" " * 70_000 + b"}"), SINGLE, Q_STATE, "70002"),
    "state-as-floats": case(
        tensor_of(Q_STATE, floats([1.0] * 40), "F32", [40]), SINGLE, Q_STATE, "F32 [40]"
    ),
    "state-key-twice": case(
        state_text(b'{"blocksize": 64, "blocksize": 128}'),
        *(SINGLE, Q_STATE, "blocksize", "the same key twice"),
    ),
    "state-no-blocksize": case(state(drop="blocksize"), SINGLE, Q_STATE, "blocksize None"),
    "state-no-offset": case(state(drop="nested_offset"), SINGLE, Q_STATE, "nested_blocksize alone"),
    "state-no-nested-blocksize": case(
        state(drop="nested_blocksize"), SINGLE, Q_STATE, "nested_offset alone"
    ),
    **{
        f"state-blocksize-{str(one)[:12]}": case(
            state(blocksize=one), SINGLE, Q_STATE, "found blocksize "
        )
        for one in (0, -64, 48, 63, 2**62, 10**400, "64", 64.0, True, None, math.nan, [64])
    },
    **{
        f"state-nested-blocksize-{one}": case(
            state(nested_blocksize=one), SINGLE, Q_STATE, f"found nested_blocksize {one!r}"
        )
        for one in (0, -256, 100, 2**40, "256")
    },
    **{
        f"state-nested-offset-{str(one)[:12]}": case(
            state(nested_offset=one), SINGLE, Q_STATE, "found nested_offset "
        )
        for one in (math.nan, math.inf, -math.inf, 1e39, 10**400, "0", True, [0.0])
    },
    "state-other-blocksize": case(state(blocksize=128), SINGLE, f"{Q_PROJ}.absmax", "U8 [32]"),
    "state-other-nested-blocksize": case(
        state(nested_blocksize=32), SINGLE, f"{Q_PROJ}.nested_absmax", "needed F32 [2]"
    ),
    "state-quant-type-unknown": case(state(quant_type="int3"), SINGLE, Q_STATE, "'int3'"),
    "state-quant-type-fp4": case(state(quant_type="fp4"), SINGLE, Q_STATE, "quant_type 'fp4'"),
    "state-quant-type-list": case(state(quant_type=["nf4"]), SINGLE, Q_STATE, "quant_type ['nf4']"),
    "state-shape-other": case(state(shape=[64, 65]), SINGLE, Q_STATE, "shape [64, 65]"),
    "state-shape-over-2-63": case(state(shape=[2**40, 2**40]), SINGLE, Q_STATE, "shape [10995"),
    "state-shape-string": case(state(shape="64x64"), SINGLE, Q_STATE, "shape '64x64'"),
    "state-shape-negative": case(state(shape=[-64, -64]), SINGLE, Q_STATE, "shape [-64, -64]"),
    "state-dtype-unknown": case(state(dtype="float99"), SINGLE, Q_STATE, "dtype 'float99'"),
    "state-dtype-number": case(state(dtype=16), SINGLE, Q_STATE, "dtype 16"),
    "state-nested-dtype": case(
        state(nested_dtype="float16"), SINGLE, Q_STATE, "nested_dtype 'float16'"
    ),
}

Q_ABSMAX, K_ABSMAX = f"{Q_PROJ}.absmax", f"{K_PROJ}.absmax"
Q_OUTER, Q_TABLE = f"{Q_PROJ}.nested_absmax", f"{Q_PROJ}.nested_quant_map"
COMPANIONS = {
    "absmax-missing": case(gone(Q_ABSMAX), SINGLE, Q_PROJ, "4-bit data without absmax"),
    "absmax-short": case(tensor_of(Q_ABSMAX, b"\0" * 63, "U8", [63]), SINGLE, Q_ABSMAX, "U8 [63]"),
    "absmax-wrong-dtype": case(
        tensor_of(Q_ABSMAX, b"\0" * 128, "F16", [64]), SINGLE, Q_ABSMAX, "F16 [64], needed U8 [64]"
    ),
    "nested-absmax-missing": case(gone(Q_OUTER), SINGLE, Q_PROJ, "without nested_absmax"),
    "nested-absmax-long": case(
        tensor_of(Q_OUTER, floats([1.0] * 2), "F32", [2]), SINGLE, Q_OUTER, "F32 [2]"
    ),
    "nested-map-missing": case(gone(Q_TABLE), SINGLE, Q_PROJ, "without nested_quant_map"),
    "nested-map-short": case(
        tensor_of(Q_TABLE, floats([0.0] * 255), "F32", [255]), SINGLE, Q_TABLE, "F32 [255]"
    ),
    "map-missing": case(gone(f"{Q_PROJ}.quant_map"), SINGLE, Q_PROJ, "without quant_map"),
    "map-short": case(
        tensor_of(f"{Q_PROJ}.quant_map", floats([0.0] * 15), "F32", [15]),
        *(SINGLE, f"{Q_PROJ}.quant_map", "F32 [15]"),
    ),
    "map-nan": case(
        value(f"{Q_PROJ}.quant_map", math.nan), SINGLE, f"{Q_PROJ}.quant_map", "nan at index 1"
    ),
    "map-other-values": case(
        value(f"{Q_PROJ}.quant_map", -0.7), SINGLE, f"{Q_PROJ}.quant_map", "-0.69999"
    ),
    "packed-short": case(
        tensor_of(Q_PROJ, b"\0" * 2047, "U8", [2047, 1]), SINGLE, Q_PROJ, "U8 [2047, 1]"
    ),
    "float-with-companions": case(
        tensor_of(Q_PROJ, b"\0" * 8192, "F16", [64, 64]), SINGLE, Q_PROJ, "4-bit companions"
    ),
    "both-nf4-and-fp4": case(
        shard(
            lambda opened: opened.header.update(
                {Q_STATE.replace("nf4", "fp4"): entry_of("U8", [0], 0, 0)}
            )
        ),
        *(SINGLE, Q_PROJ, "quant_state of both nf4 and fp4"),
    ),
    "tensor-missing": case(gone(NORM), NORM, "found no such tensor"),
    "tensor-unexpected": case(
        shard(lambda opened: opened.header.update({"evil.weight": entry_of("U8", [0], 0, 0)})),
        *(SINGLE, "evil.weight", "unexpected U8 [0]"),
    ),
    "no-weights-at-all": case(unlinked(SINGLE), "no safetensors file", SINGLE),
    "pickle-only": case(pickle_only, "pytorch_model.bin", "can run code when loaded"),
}

VALUES = {
    "scale-nan": case(value(K_ABSMAX, math.nan), SINGLE, f"{K_ABSMAX}[1]", "found nan"),
    "scale-inf": case(value(K_ABSMAX, math.inf), SINGLE, f"{K_ABSMAX}[1]", "found inf"),
    "scale-negative": case(value(K_ABSMAX, -0.5), SINGLE, f"{K_ABSMAX}[1]", "found -0.5"),
    "nested-scale-nan": case(value(Q_OUTER, math.nan), SINGLE, f"{Q_OUTER}[0]", "found nan"),
    "nested-scale-inf": case(value(Q_OUTER, math.inf), SINGLE, f"{Q_OUTER}[0]", "found inf"),
    "nested-scale-negative": case(value(Q_OUTER, -1.0), SINGLE, f"{Q_OUTER}[0]", "found -1.0"),
    "nested-map-nan": case(value(Q_TABLE, math.nan), SINGLE, f"{Q_TABLE}[1]", "found nan"),
    "nested-map-inf": case(value(Q_TABLE, -math.inf), SINGLE, f"{Q_TABLE}[1]", "found -inf"),
    "nested-scales-that-overflow": case(
        both(value(Q_OUTER, 3e38), value(Q_TABLE, 1e30)), SINGLE, Q_OUTER, "overflow"
    ),
}
VALUES = {name: Case(c.damage, c.says, "values") for name, c in VALUES.items()}

F_ABSMAX, F_OUTER, F_TABLE = (
    f"{FUSED}.{part}" for part in ("absmax", "nested_absmax", "nested_quant_map")
)
FUSED_EXPERTS = {
    "fused-absmax-of-one-expert": case(
        tensor_of(F_ABSMAX, b"\0" * 192, "U8", [192]), SINGLE, F_ABSMAX, "U8 [192], needed U8 [768]"
    ),
    "fused-absmax-short": case(
        tensor_of(F_ABSMAX, b"\0" * 767, "U8", [767]), SINGLE, F_ABSMAX, "U8 [767], needed U8 [768]"
    ),
    "fused-nested-absmax-short": case(
        tensor_of(F_OUTER, floats([1.0] * 2), "F32", [2]), SINGLE, F_OUTER, "needed F32 [3]"
    ),
    "fused-nested-map-missing": case(gone(F_TABLE), SINGLE, FUSED, "without nested_quant_map"),
    "fused-nested-blocksize": case(
        state(FUSED, nested_blocksize=128), SINGLE, F_OUTER, "F32 [3], needed F32 [6]"
    ),
    "fused-state-missing": case(gone(FUSED + STATE), SINGLE, FUSED, "without quant_state"),
    "fused-state-of-one-expert": case(
        state(FUSED, shape=[192, 64]), SINGLE, FUSED + STATE, "shape [192, 64], needed [4, 192, 64]"
    ),
    "fused-packed-short": case(
        tensor_of(FUSED, b"\0" * 24575, "U8", [24575, 1]), SINGLE, FUSED, "U8 [24575, 1]"
    ),
    "fused-more-experts": case(
        config(num_local_experts=5), SINGLE, "experts.gate_up_proj", "[5, 192, 64]"
    ),
    "fused-many-experts": case(
        config(num_local_experts=2**16), CONFIG, "num_local_experts = 65536", "up to 32768"
    ),
    "fused-and-one-by-one": case(
        shard(
            lambda opened: opened.header.update(
                {FUSED.replace("gate_up", "0.gate"): entry_of("U8", [0], 0, 0)}
            )
        ),
        *(SINGLE, "experts.0.gate_proj", "unexpected U8 [0]"),
    ),
    "fused-blocks-straddle-experts": case(
        both(
            state(FUSED, blocksize=4096),
            tensor_of(F_ABSMAX, b"\0" * 12, "U8", [12]),
            tensor_of(F_OUTER, floats([1.0]), "F32", [1]),
        ),
        *(SINGLE, FUSED, "nf4 blocks of 4096 elements", "divides the 6144 elements"),
    ),
    "fused-nested-scale-nan": case(
        value(F_OUTER, math.nan), SINGLE, f"{F_OUTER}[", "found nan", seen="values"
    ),
    "fused-nested-scale-negative": case(
        value(F_OUTER, -1.0), SINGLE, f"{F_OUTER}[", "found -1.0", seen="values"
    ),
    "fused-nested-map-inf": case(
        value(F_TABLE, math.inf), SINGLE, f"{F_TABLE}[1]", "found inf", seen="values"
    ),
    "fused-scales-that-overflow": case(
        both(value(F_OUTER, 3e38), value(F_TABLE, 1e30)), SINGLE, F_OUTER, "overflow", seen="values"
    ),
}
FUSED_EXPERTS = {name: replace(c, layout="fused") for name, c in FUSED_EXPERTS.items()}

TWENTY = {"type": "Replace", "pattern": {"Regex": "."}, "content": "." * 20}
BETWEEN = {"type": "Replace", "pattern": {"String": ""}, "content": "a"}
TOKENIZERS = {
    "tokenizer-missing": case(unlinked(TOKENIZER), TOKENIZER, "found no such file"),
    "tokenizer-no-json": case(content(TOKENIZER, "{"), TOKENIZER, "no readable tokenizer"),
    "tokenizer-empty": case(content(TOKENIZER, ""), TOKENIZER, "no readable tokenizer"),
    "tokenizer-list": case(content(TOKENIZER, "[]"), TOKENIZER, "no readable tokenizer"),
    "tokenizer-deep": case(content(TOKENIZER, nested(100_000)), TOKENIZER, "no readable tokenizer"),
    "tokenizer-of-empty-lists": case(content(TOKENIZER, EMPTY_LISTS), TOKENIZER, "no readable"),
    "tokenizer-of-64-gigabytes": case(enlarged(TOKENIZER, 2**36), TOKENIZER, f"{2**36} bytes"),
    "tokenizer-model-number": case(tokenizer_part(model=7), TOKENIZER, "no readable tokenizer"),
    "tokenizer-ids-of-text": case(
        model_part(vocab={"a": "1", "b": "2"}), TOKENIZER, "no readable tokenizer"
    ),
    "tokenizer-ids-negative": case(model_part(vocab={"a": -1}), TOKENIZER, "no readable tokenizer"),
    "tokenizer-ids-over-2-32": case(
        model_part(vocab={"a": 2**32 + 3}), TOKENIZER, "no readable tokenizer"
    ),
    "tokenizer-ids-beyond-the-vocabulary": case(
        model_part(vocab={c: 10**6 + i for i, c in enumerate(["<unk>", *CHARACTERS])}),
        *("text: found token id 10000", "needed ids below the model's vocabulary of 128"),
    ),
    "tokenizer-merges-of-unknown": case(
        model_part(merges=["q zz"]), TOKENIZER, "no readable tokenizer"
    ),
    "tokenizer-post-processor": case(
        tokenizer_part(post_processor={"type": "Evil"}), TOKENIZER, "no readable tokenizer"
    ),
    "tokenizer-regex-broken": case(pre_tokenized("("), TOKENIZER, "no readable tokenizer"),
    "tokenizer-unknown-token-missing": case(
        model_part(vocab={"Q": 0}), TOKENIZER, "Unk token `<unk>` not found"
    ),
    "tokenizer-panics-on-reading": case(
        tokenizer_part(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
        *(TOKENIZER, "no readable tokenizer"),
    ),
    "tokenizer-panics-on-special-tokens": case(
        tokenizer_part(
            post_processor={
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "X", "type_id": 0}}],
                "pair": [],
                "special_tokens": {},
            }
        ),
        *(TOKENIZER, "no readable tokenizer"),
    ),
    "tokenizer-panics-on-text": case(
        tokenizer_part(pre_tokenizer={"type": "FixedLength", "length": 0}),
        *(TOKENIZER, "no readable tokenizer"),
    ),
    "tokenizer-multiplies-the-text": case(
        tokenizer_part(normalizer={"type": "Sequence", "normalizers": [TWENTY] * 5}),
        *(TOKENIZER, "4084101 times as long"),
    ),
    "tokenizer-doubles-the-text": case(
        tokenizer_part(normalizer={"type": "Sequence", "normalizers": [BETWEEN] * 30}),
        *(TOKENIZER, "1073741824 times as long"),
    ),
    "tokenizer-multiplies-answers": case(
        tokenizer_part(decoder={"type": "Sequence", "decoders": [TWENTY] * 5}),
        *(TOKENIZER, "4084101 times as long"),
    ),
    "tokenizer-link-outside": case(outside(TOKENIZER), TOKENIZER, "found a link to"),
    "tokenizer-link-to-etc": case(
        linked(TOKENIZER, lambda folder: "/etc/passwd"), TOKENIZER, "found a link to /etc/passwd"
    ),
    "tokenizer-is-a-pipe": case(pipe(TOKENIZER), TOKENIZER, "found something"),
    "tokenizer-of-remote-code": case(
        both(
            remote_code,
            unlinked(TOKENIZER),
            content("vocab.json", "{}"),
        ),
        *(TOKENIZER, "auto_map"),
    ),
    "settings-no-json": case(content(TOKENIZER_CONFIG, "{"), TOKENIZER_CONFIG, "no JSON"),
    "settings-list": case(content(TOKENIZER_CONFIG, "[]"), TOKENIZER_CONFIG, "needed a JSON"),
    "settings-deep": case(content(TOKENIZER_CONFIG, nested(100_000)), TOKENIZER_CONFIG, DEEP),
    "settings-no-utf-8": case(
        content(TOKENIZER_CONFIG, b'{"a": "\xff"}'), TOKENIZER_CONFIG, "no JSON"
    ),
    "settings-link-outside": case(outside(TOKENIZER_CONFIG), TOKENIZER_CONFIG, "found a link to"),
    "special-tokens-deep": case(
        content("special_tokens_map.json", nested(100_000)), "special_tokens_map.json", DEEP
    ),
    "template-of-numbers": case(
        json_file(TOKENIZER_CONFIG, chat_template=[{"name": "default", "template": 7}]),
        *(TOKENIZER_CONFIG, "chat_template that is no text"),
    ),
    "template-number": case(
        json_file(TOKENIZER_CONFIG, chat_template=7),
        TOKENIZER_CONFIG,
        "chat_template that is no text",
    ),
    "template-file-no-utf-8": case(
        content("chat_template.jinja", b"{{ '\xff' }}"), "chat_template.jinja", "no UTF-8"
    ),
    "template-file-link-outside": case(
        linked("chat_template.jinja", lambda folder: "/etc/passwd"),
        *("chat_template.jinja", "found a link to /etc/passwd"),
    ),
}
TOKENIZERS = {name: Case(c.damage, c.says, "tokenizer") for name, c in TOKENIZERS.items()}

LOOP = "{% for a in range(99999) %}" * 4 + "{% endfor %}" * 4
CHATS = {
    "template-no-jinja": case(chat("{% if %}"), "chat template", "found an error"),
    "template-loops": case(chat(LOOP), "chat template", "more than 1 s or 512 MiB"),
    "template-range": case(chat("{{ range(10**9) | list }}"), "chat template"),
    "template-power": case(chat("{{ 10 ** (10 ** 10) }}"), "chat template"),
    "template-long-string": case(chat("{{ 'a' * 10**10 }}"), "chat template"),
    "template-padded": case(chat("{{ 'a'.center(10**10) }}"), "chat template"),
    "template-doubles": case(
        chat("{% set a = 'aaaa' %}" + "{% set a = a ~ a %}" * 60 + "{{ a }}"), "chat template"
    ),
    "template-recurses": case(
        chat("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}"), "chat template"
    ),
    "template-subclasses": case(
        chat("{{ ''.__class__.__mro__[1].__subclasses__() }}"), "chat template", "unsafe"
    ),
    "template-globals": case(
        chat("{{ raise_exception.__globals__['__builtins__']['open']('executed', 'w') }}"),
        *("chat template", "found an error"),
    ),
    "template-import": case(
        chat("{% import '/etc/passwd' as secret %}{{ secret }}"), "chat template", "found an error"
    ),
    "template-format": case(
        chat("{{ '{0.__class__.__init__.__globals__}'.format(messages) }}"), "chat template"
    ),
    "template-without-the-message": case(chat("hello"), "chat template", "0 times"),
    "template-type-error": case(chat("{{ 1 + 'a' }}"), "chat template", "found an error"),
}
CHATS = {name: Case(c.damage, c.says, "chat") for name, c in CHATS.items()}

CASES: dict[str, Case] = {
    **LENGTHS, **HEADERS, **INDEXES, **CONFIGS, **STATES, **COMPANIONS, **VALUES, **FUSED_EXPERTS,
    **TOKENIZERS, **CHATS,
}  # fmt: skip


# What `fuzz_checkpoint.py` found: messages of megabytes, numbers too long to print, counts that
# were looped over, names that no file system call takes.
FOUND_BY_FUZZER = (
    *("index-shard-long", "header-shape-of-4000-digits", "header-shape-product-of-9000-digits"),
    *("config-num_hidden_layers-1073741824", "config-num_local_experts-1073741824"),
    "index-shard-with-surrogate",
)


def build(name: str, folder: Path) -> Path:
    """The checkpoint of case `name` in `folder`, which must not exist."""
    shutil.copytree(base(CASES[name].shards, CASES[name].layout), folder)
    CASES[name].damage(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where to write them: FOLDER/NAME")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for name in CASES:
        build(name, folder / name)
    print(f"{len(CASES)} checkpoints in {folder}")


if __name__ == "__main__":
    main()
