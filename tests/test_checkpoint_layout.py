"""Every layout gives the same canonical weights; every contradiction is refused by name."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_builders import (
    EXPERTS,
    FFN,
    HIDDEN,
    LAYERS,
    STATE,
    VOCAB,
    dequantized_state_dict,
    random_weights,
    read_tensors,
    tiny_checkpoint,
    tiny_config,
    write_checkpoint,
)
from safetensors.torch import save_file
from torch import Tensor

from layersweep.checkpoint import Checkpoint, Weight, nf4, open_checkpoint, scan_checkpoint
from layersweep.checkpoint.storage.four_bit import FourBit
from layersweep.checkpoint.strict_json import MOST_VALUES
from layersweep.errors import CheckpointError, InputError

DTYPES = {
    "U8": torch.uint8,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
GATE = "model.layers.0.block_sparse_moe.gate.weight"


def raw(tensor: Any) -> Tensor:
    with open(tensor.file, "rb") as file:
        file.seek(tensor.offset)
        data = torch.frombuffer(bytearray(file.read(tensor.nbytes)), dtype=DTYPES[tensor.dtype])
    return data.view(tensor.shape)


def dense(weight: Weight) -> Tensor:
    """The weight in float32, from the byte ranges that the checkpoint gives."""
    quant = weight.storage
    if not isinstance(quant, FourBit):
        return raw(weight.data).float().view(weight.shape)
    scales = raw(quant.absmax).reshape(-1)
    if quant.nested:
        inner = quant.nested
        scales = nf4.expand_absmax(
            *(scales, raw(inner.absmax), raw(inner.quant_map), inner.blocksize, inner.offset),
            skip=inner.skip,
        )
    packed = raw(weight.data).contiguous().view(torch.uint8).reshape(-1)
    return nf4.dequantize(packed, scales, quant.blocksize, weight.shape, torch.float32)


def expected_weights(folder: Path) -> dict[str, Tensor]:
    """Canonical name -> dense weight, through the builders' own reader."""
    state = dequantized_state_dict(folder)
    expected = {
        "embed": state["model.embed_tokens.weight"],
        "norm": state["model.norm.weight"],
        "lm_head": state["lm_head.weight"],
    }
    for layer in range(LAYERS):
        old, new = f"model.layers.{layer}", f"layers.{layer}"
        expected[f"{new}.attention_norm"] = state[f"{old}.input_layernorm.weight"]
        expected[f"{new}.feed_norm"] = state[f"{old}.post_attention_layernorm.weight"]
        for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
            expected[f"{new}.{part}"] = state[f"{old}.self_attn.{part}.weight"]
        expected[f"{new}.router"] = state[f"{old}.mlp.gate.weight"]
        up, down = state[f"{old}.mlp.experts.gate_up_proj"], state[f"{old}.mlp.experts.down_proj"]
        for expert in range(EXPERTS):
            expected[f"{new}.experts.{expert}.gate_proj"] = up[expert, :FFN]
            expected[f"{new}.experts.{expert}.up_proj"] = up[expert, FFN:]
            expected[f"{new}.experts.{expert}.down_proj"] = down[expert]
    return expected


def assert_reads(checkpoint: Checkpoint, folder: Path) -> None:
    expected = expected_weights(folder)
    assert checkpoint.weights.keys() == expected.keys()
    for name, tensor in expected.items():
        weight = checkpoint.weights[name]
        assert weight.name == name
        assert weight.shape == tuple(tensor.shape), name
        assert torch.equal(dense(weight), tensor), name


@pytest.mark.parametrize(
    ("layout", "weights", "nested", "router", "shards"),
    [
        ("per_expert", "nf4", True, "nf4", 1),
        ("per_expert", "nf4", True, "nf4", 3),
        ("per_expert", "nf4", False, "float", 1),
        ("per_expert", "bf16", True, "float", 2),
        ("per_expert", "f16", True, "float", 1),
        ("gate_proj", "nf4", True, "float", 2),
        ("gate_proj", "f32", True, "float", 1),
        ("fused", "bf16", True, "float", 1),
        ("fused", "f32", True, "float", 2),
        ("fused", "mixed", True, "nf4", 1),
        ("fused", "nf4", True, "nf4", 1),
        ("fused", "nf4", True, "float", 3),
        ("fused", "nf4", False, "nf4", 2),
        ("per_expert", "mixed", False, "float", 3),
    ],
)
def test_layouts(
    tmp_path: Path, layout: str, weights: str, nested: bool, router: str, shards: int
) -> None:
    tiny_checkpoint(tmp_path, layout, weights, nested, router, shards)
    checkpoint = open_checkpoint(str(tmp_path))
    assert_reads(checkpoint, tmp_path)
    stored = {"nf4": "nf4", "bf16": "bf16", "f16": "float16", "f32": "float32", "mixed": "mixed"}
    assert checkpoint.weights_kind == stored[weights]
    routers = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}
    packed = "nf4" if router == "nf4" else "float16"
    assert checkpoint.router_kind == routers.get(weights, packed)
    assert len(checkpoint.files) == shards
    assert checkpoint.nbytes == sum(tensor.nbytes for tensor in read_tensors(tmp_path).values())


def test_descriptions_and_bytes(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path, router="float")
    weights = open_checkpoint(str(tmp_path)).weights
    assert weights["layers.0.router"].describe() == f"float16 {EXPERTS}x{HIDDEN}"
    assert weights["layers.1.q_proj"].describe() == "nf4 1x2048"
    gate_proj = weights["layers.0.experts.3.gate_proj"]
    state = read_tensors(tmp_path)[f"model.layers.0.block_sparse_moe.experts.3.w1.weight{STATE}"]
    assert gate_proj.nbytes == 3072 + 96 + 64 + 4 + 1024 + state.nbytes


def test_quant_storage_other_than_uint8(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "u8")
    tensors = read_tensors(tmp_path / "u8")
    for storage in (torch.bfloat16, torch.float32, torch.float16):
        folder = tmp_path / str(storage)
        folder.mkdir()
        packed = {name for name in tensors if name + STATE in tensors}
        stored = {
            name: tensor.reshape(-1).view(storage).view(-1, 1) if name in packed else tensor
            for name, tensor in tensors.items()
        }
        save_file(stored, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(tiny_config()))
        checkpoint = open_checkpoint(str(folder))
        assert_reads(checkpoint, folder)
        assert DTYPES[checkpoint.weights["layers.0.q_proj"].data.dtype] == storage


def test_tied_embeddings(tmp_path: Path) -> None:
    change(tiny_checkpoint(tmp_path), drop=["lm_head.weight"], config={"tie_word_embeddings": True})
    checkpoint = open_checkpoint(str(tmp_path))
    assert checkpoint.weights["lm_head"].data == checkpoint.weights["embed"].data
    assert checkpoint.nbytes == sum(tensor.nbytes for tensor in read_tensors(tmp_path).values())


def test_packed_without_quant_state_is_read_and_announced(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path, nested=False)
    tensors = read_tensors(tmp_path)
    expected = expected_weights(tmp_path)
    names = [name for name in tensors if name.endswith(STATE)]
    change(tmp_path, drop=names)
    checkpoint = open_checkpoint(str(tmp_path))
    assert torch.equal(dense(checkpoint.weights["layers.0.q_proj"]), expected["layers.0.q_proj"])
    assert any(
        f"and {len(names) - 1} more: packed without quant_state" in note
        for note in checkpoint.notes
    )


def test_tokenizer_larger_than_the_vocabulary_is_a_note(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path)
    merges = [["a", "b"]] * (MOST_VALUES // 3)  # Gemma's has more values than other JSON may have
    model = {"vocab": {"a": 0, "b": VOCAB - 1}, "merges": merges}
    tokenizer = {"model": model, "added_tokens": []}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert not any("tokenizer" in note for note in open_checkpoint(str(tmp_path)).notes)
    tokenizer["added_tokens"] = [{"id": VOCAB + 4}]
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    notes = open_checkpoint(str(tmp_path)).notes
    assert any("ids up to 132, the vocabulary ends at 127" in note for note in notes)


def test_fingerprint_sees_headers_and_config_but_not_data(tmp_path: Path) -> None:
    first = open_checkpoint(str(tiny_checkpoint(tmp_path / "a", nested=False, seed=1)))
    other = open_checkpoint(str(tiny_checkpoint(tmp_path / "b", nested=False, seed=2)))
    assert first.fingerprint == other.fingerprint  # random data differ, headers do not
    change(tmp_path / "b", config={"rope_theta": 10000.0})
    assert open_checkpoint(str(tmp_path / "b")).fingerprint != first.fingerprint
    plain = open_checkpoint(str(tiny_checkpoint(tmp_path / "c", nested=True)))
    assert plain.fingerprint != first.fingerprint


def change(
    folder: Path,
    drop: list[str] | None = None,
    add: dict[str, Tensor] | None = None,
    config: dict[str, Any] | None = None,
) -> Path:
    """The checkpoint in one file, with tensors dropped, added or replaced, and other settings."""
    tensors = {n: t for n, t in read_tensors(folder).items() if n not in (drop or [])}
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    write_checkpoint(folder, tensors | (add or {}), 1)
    settings = json.loads((folder / "config.json").read_text()) | (config or {})
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def state_bytes(**changes: Any) -> Tensor:
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [64, 64]}
    state |= changes
    return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


Break = Callable[[Path], object]
plain_state = Q_PROJ + STATE
BROKEN: dict[str, tuple[Break, str, str]] = {
    "missing weight": (
        lambda f: change(f, drop=["model.norm.weight"]),
        "model.norm.weight: found no such tensor",
        "needed model.norm.weight",
    ),
    "missing absmax": (
        lambda f: change(f, drop=[f"{Q_PROJ}.absmax"]),
        f"{Q_PROJ}: found 4-bit data without absmax",
        f"needed {Q_PROJ}.absmax",
    ),
    "missing quant_map": (
        lambda f: change(f, drop=[f"{Q_PROJ}.quant_map"]),
        f"{Q_PROJ}: found 4-bit data without quant_map",
        f"needed {Q_PROJ}.quant_map",
    ),
    "packed, no companions": (
        lambda f: change(f, drop=[Q_PROJ + s for s in (".absmax", ".quant_map", STATE)]),
        f"{Q_PROJ}: found U8 [2048, 1] (packed) without quant_state",
        f"needed {plain_state}",
    ),
    "float with companions": (
        lambda f: change(f, add={GATE: torch.ones(EXPERTS, HIDDEN, dtype=torch.float16)}),
        f"{GATE}: found F16 [4, 64] and its 4-bit companions absmax, quant_map, quant_state",
        "needed float [4, 64] without companions, or packed U8 [128, 1] with quant_state",
    ),
    "wrong float shape": (
        lambda f: change(f, add={"model.norm.weight": torch.ones(HIDDEN + 1)}),
        "model.norm.weight: found F32 [65]",
        "needed float [64]",
    ),
    "wrong packed size": (
        lambda f: change(f, add={Q_PROJ: torch.ones(2047, 1, dtype=torch.uint8)}),
        f"{Q_PROJ}: found U8 [2047, 1] and 4-bit companions",
        "needed float [64, 64] or packed U8 [2048, 1]",
    ),
    "integer weight": (
        lambda f: change(f, add={"lm_head.weight": torch.ones(VOCAB, HIDDEN, dtype=torch.int32)}),
        "lm_head.weight: found I32 [128, 64]",
        "needed float [128, 64]",
    ),
    "wrong absmax size": (
        lambda f: change(f, add={f"{Q_PROJ}.absmax": torch.ones(63)}),
        f"{Q_PROJ}.absmax: found F32 [63]",
        "needed F32 [64]",
    ),
    "another table": (
        lambda f: change(f, add={f"{Q_PROJ}.quant_map": torch.linspace(-1, 1, 16)}),
        f"{Q_PROJ}.quant_map: found -0.8666",
        "needed -0.6961928009986877, the NF4 table",
    ),
    "block size 0": (
        lambda f: change(f, add={plain_state: state_bytes(blocksize=0)}),
        f"{plain_state}: found blocksize 0",
        "needed a power of two",
    ),
    "other shape in quant_state": (
        lambda f: change(f, add={plain_state: state_bytes(shape=[32, 128])}),
        f"{plain_state}: found shape [32, 128]",
        "needed [64, 64], the shape in config.json",
    ),
    "other type in quant_state": (
        lambda f: change(f, add={plain_state: state_bytes(quant_type="fp4")}),
        f"{plain_state}: found quant_type 'fp4'",
        "needed 'nf4'",
    ),
    "offset without nested scales": (
        lambda f: change(f, add={plain_state: state_bytes(nested_offset=0.5)}),
        f"{plain_state}: found nested_offset alone",
        "needed nested_blocksize and nested_offset",
    ),
    "nested offset infinite": (
        lambda f: change(
            f, add={plain_state: state_bytes(nested_offset=1e999, nested_blocksize=256)}
        ),
        f"{plain_state}: found nested_offset inf",
        "needed a finite number",
    ),
    "nested scales missing": (
        lambda f: change(
            f, add={plain_state: state_bytes(nested_offset=0.5, nested_blocksize=256)}
        ),
        f"{Q_PROJ}: found nested scales without nested_absmax and nested_quant_map",
        f"needed {Q_PROJ}.nested_absmax",
    ),
    "no JSON in quant_state": (
        lambda f: change(f, add={plain_state: torch.ones(9, dtype=torch.uint8)}),
        f"{plain_state}: found no JSON",
        "needed UTF-8 JSON",
    ),
    "one layer too many": (
        lambda f: change(f, config={"num_hidden_layers": 1}),
        "model.layers.1.",
        "needed only tensors of the architecture",
    ),
    "one layer too few": (
        lambda f: change(f, config={"num_hidden_layers": 3}),
        "config.json: found num_hidden_layers = 3",
        "needed the 2 layers in the shards",
    ),
    "bias": (
        lambda f: change(f, add={"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}),
        "model.layers.0.self_attn.q_proj.bias: found unexpected F32 [64]",
        "needed only tensors",
    ),
    "two names": (
        lambda f: change(f, add={"model.layers.0.mlp.gate.weight": torch.ones(4, 64)}),
        f"{GATE}: found also model.layers.0.mlp.gate.weight",
        "needed one layers.0.router",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_contradictions_are_refused(tmp_path: Path, case: str) -> None:
    damage, found, needed = BROKEN[case]
    damage(tiny_checkpoint(tmp_path, nested=False))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(tmp_path))
    message = str(caught.value)
    assert str(tmp_path) in message
    assert found in message
    assert needed in message
    assert caught.value.exit_code == 2
    assert caught.value.hint


def test_nested_scales_without_quant_state_are_refused(tmp_path: Path) -> None:
    change(tiny_checkpoint(tmp_path, nested=True), drop=[plain_state])
    with pytest.raises(CheckpointError, match="without quant_state, which holds their offset"):
        open_checkpoint(str(tmp_path))


def test_every_problem_is_reported_at_once(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path, nested=False)
    change(tmp_path, drop=["model.norm.weight", f"{Q_PROJ}.absmax"], config={"vocab_size": 99})
    checkpoint, problems = scan_checkpoint(str(tmp_path))
    assert checkpoint is None
    assert [problem.tensor for problem in problems] == [
        "model.embed_tokens.weight",
        Q_PROJ,
        "model.norm.weight",
        "lm_head.weight",
    ]
    with pytest.raises(CheckpointError, match=r"\(and 3 more problems\)"):
        open_checkpoint(str(tmp_path))


def test_an_adapter_alone_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    save_file({"x": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"config\.json: found no such file") as caught:
        open_checkpoint(str(tmp_path))
    assert "this is an adapter: merge it into its model" in caught.value.hint


def test_revision_of_a_local_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--revision: found 'main'"):
        open_checkpoint(str(tiny_checkpoint(tmp_path)), revision="main")


def test_full_size_headers_open_within_a_second(tmp_path: Path) -> None:
    """A 24 GB Mixtral-8x7B of sparse files: 5,635 tensors in 33 shards."""
    config = tiny_config() | {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "num_local_experts": 8,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    write_sparse_mixtral(tmp_path)
    start = time.perf_counter()
    checkpoint = open_checkpoint(str(tmp_path))
    seconds = time.perf_counter() - start
    assert checkpoint.router_kind == "nf4"
    assert 24.47e9 < checkpoint.nbytes < 24.50e9
    assert checkpoint.weights["layers.0.router"].describe() == "nf4 1x16384"
    assert seconds < 1.0


def write_sparse_mixtral(folder: Path) -> None:
    """One shard per layer; only headers, quant_map and quant_state are really written."""
    shapes = {"self_attn.q_proj": (4096, 4096), "self_attn.o_proj": (4096, 4096)}
    shapes |= {"self_attn.k_proj": (1024, 4096), "self_attn.v_proj": (1024, 4096)}
    shapes |= {"block_sparse_moe.gate": (8, 4096)}
    for expert in range(8):
        for part, shape in (("w1", (14336, 4096)), ("w2", (4096, 14336)), ("w3", (14336, 4096))):
            shapes[f"block_sparse_moe.experts.{expert}.{part}"] = shape
    table = torch.tensor(nf4.NF4_CODE).numpy().tobytes()
    weight_map = {}
    for layer in range(33):
        parts: list[tuple[str, str, list[int], bytes | int]] = []
        if layer == 32:
            parts += [
                ("model.embed_tokens.weight", "BF16", [32000, 4096], 262_144_000),
                ("lm_head.weight", "BF16", [32000, 4096], 262_144_000),
                ("model.norm.weight", "BF16", [4096], 8192),
            ]
        for part, (rows, columns) in shapes.items() if layer < 32 else ():
            name = f"model.layers.{layer}.{part}.weight"
            blocks = rows * columns // 64
            state = bytes(
                state_bytes(
                    shape=[rows, columns],
                    nested_blocksize=256,
                    nested_dtype="float32",
                    nested_offset=0.0123456789,
                ).tolist()
            )
            groups = -(-blocks // 256)
            parts += [
                (name, "U8", [rows * columns // 2, 1], rows * columns // 2),
                (f"{name}.absmax", "U8", [blocks], blocks),
                (f"{name}.nested_absmax", "F32", [groups], 4 * groups),
                (f"{name}.nested_quant_map", "F32", [256], 1024),
                (f"{name}.quant_map", "F32", [16], table),
                (name + STATE, "U8", [len(state)], state),
            ]
        if layer < 32:
            for norm in ("input_layernorm", "post_attention_layernorm"):
                parts.append((f"model.layers.{layer}.{norm}.weight", "BF16", [4096], 8192))
        weight_map.update(write_sparse(folder / f"model-{layer:02d}.safetensors", parts))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_sparse(
    path: Path, parts: list[tuple[str, str, list[int], bytes | int]]
) -> dict[str, str]:
    header, position = {}, 0
    for name, dtype, shape, data in parts:
        size = data if isinstance(data, int) else len(data)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + size]}
        position += size
    encoded = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        start = file.tell()
        for name, _, _, data in parts:
            if isinstance(data, bytes):
                file.seek(start + header[name]["data_offsets"][0])
                file.write(data)
        file.truncate(start + position)
    return dict.fromkeys(header, path.name)


def test_random_weights_are_reproducible() -> None:
    first, again, other = random_weights(3), random_weights(3), random_weights(4)
    assert torch.equal(first["lm_head.weight"], again["lm_head.weight"])
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])
