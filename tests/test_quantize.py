"""`layersweep quantize`: bitsandbytes' bytes, bounded memory, nothing left of what fails."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from checkpoint_builders import read_tensors, tiny_checkpoint
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BitsAndBytesConfig

from layersweep.checkpoint import nf4, open_checkpoint, read_header
from layersweep.checkpoint.header import StoredTensor
from layersweep.checkpoint.linear import is_linear
from layersweep.checkpoint.nf4_numba import pack_blocks
from layersweep.checkpoint.packing import PIECE
from layersweep.checkpoint.quantize import quantize
from layersweep.checkpoint.shard_file import ShardFile
from layersweep.cli.app import run
from layersweep.errors import CheckpointError, MachineError

# More than one piece, an odd count, a last block of one element; and smaller oddities.
SHAPES = [(1025, 1031), (64, 96), (7, 13), (1, 5), (3, 4099), (8, 64)]
CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64}


@pytest.fixture(scope="module")
def bnb() -> Iterator[ModuleType]:
    module = pytest.importorskip("bitsandbytes").functional
    with torch.compiler.set_stance("force_eager"):  # its torch fallbacks would be compiled first
        yield module


def model(folder: Path, tensors: dict[str, Tensor]) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def one_layer(dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    tensors = {
        f"model.layers.{at}.mlp.up_proj.weight": random(*shape) for at, shape in enumerate(SHAPES)
    }
    tensors["model.layers.1.mlp.up_proj.weight"][:20] = 0  # whole blocks of zeros
    tensors |= {
        "model.embed_tokens.weight": random(50, 64),
        "lm_head.weight": random(50, 64),
        "model.layers.0.input_layernorm.weight": random(64),
        "model.layers.0.self_attn.q_proj.bias": random(64),
        "model.layers.0.self_attn.sinks": random(8),
        "model.layers.0.mlp.gate.weight": random(8, 64),
        "model.layers.0.linear_attn.conv1d.weight": random(16, 1, 4),
        "model.layers.0.linear_attn.A_log": random(8).float(),
        "model.position_ids": torch.arange(40)[None],
        "model.layers.0.nothing": random(0, 4),
    }
    return tensors


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("nested, blocksize", [(True, 64), (False, 64), (True, 4096)])
def test_linear_weights_have_the_bytes_of_bitsandbytes(
    bnb: ModuleType, tmp_path: Path, dtype: torch.dtype, nested: bool, blocksize: int
) -> None:
    tensors = one_layer(dtype)
    source = model(tmp_path / "source", tensors)
    done = quantize(source, tmp_path / "nf4", blocksize=blocksize, nested=nested)
    found = read_tensors(tmp_path / "nf4")
    linear = [name for name in tensors if name.endswith("up_proj.weight")]
    assert done.packed == len(linear) == 6
    for name in linear:
        packed, state = bnb.quantize_4bit(
            tensors[name], blocksize=blocksize, quant_type="nf4", compress_statistics=nested
        )
        theirs = {name: packed}
        theirs |= {f"{name}.{part}": t for part, t in state.as_dict(packed=True).items()}
        assert {key for key in found if key.startswith(name)} == set(theirs)
        for key, tensor in theirs.items():
            assert (found[key].dtype, found[key].shape) == (tensor.dtype, tensor.shape), key
            assert torch.equal(bits(found[key]), bits(tensor)), key


def test_all_else_stays_as_it_was(tmp_path: Path) -> None:
    tensors = one_layer()
    source = model(tmp_path / "source", tensors)
    done = quantize(source, tmp_path / "nf4")
    found = read_tensors(tmp_path / "nf4")
    kept = {name: tensor for name, tensor in tensors.items() if "up_proj" not in name}
    assert set(done.kept) == set(kept)
    assert len(kept) == 10
    for name, tensor in kept.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(bits(found[name]), bits(tensor)), name
    assert done.before == sum(tensor.nbytes for tensor in tensors.values())
    assert done.after == sum(tensor.nbytes for tensor in found.values())


def test_the_compiled_pass_equals_plain_torch_at_every_bound() -> None:
    """Each bound, its neighbours in float32, and blocks of sizes from 1e-40 to 1e37."""
    bounds = nf4.level_bounds().numpy()
    around = [np.nextafter(bounds, np.float32(side)) for side in (-2, 2)]
    edges = np.concatenate([bounds, *around, [1, -1, 0, -0.0]]).astype(np.float32)
    block = np.resize(edges, 64)
    block[0] = 1
    generator = torch.Generator().manual_seed(3)
    sizes = torch.tensor([1e-40, 1e-38, 1e-20, 1.0, 3.0, 1e37])
    noise = torch.randn(6, 64, generator=generator) * sizes[:, None]
    values = torch.cat([torch.from_numpy(block), torch.zeros(64), noise.reshape(-1)])
    packed, absmax = np.empty(8 * 32, np.uint8), np.empty(8, np.float32)
    pack_blocks(values.numpy(), bounds, np.float32(nf4.SMALLEST_SCALE), packed, absmax)
    expected = nf4.quantize(values, 64, nested=False)
    assert packed.tolist() == expected.packed.tolist()
    assert absmax.tolist() == expected.absmax.tolist()


LINEAR = [
    "model.layers.3.self_attn.q_proj.weight",
    "model.layers.3.mlp.experts.7.down_proj.weight",
    "model.layers.3.mlp.shared_experts.gate_proj.weight",
    "model.layers.3.self_attn.kv_a_proj_with_mqa.weight",
    "model.language_model.layers.0.linear_attn.in_proj_qkvz.weight",
    "model.layers.3.conv.in_proj.weight",  # LFM2
    "transformer.blocks.0.norm_attn_norm.attn.Wqkv.weight",  # DBRX
]
OTHER = [
    "model.embed_tokens.weight",
    "lm_head.weight",
    "model.norm.weight",
    "model.layers.3.mlp.gate.weight",
    "model.layers.3.mlp.shared_expert_gate.weight",
    "model.layers.3.mlp.router.weight",
    "model.layers.3.block_sparse_moe.router.layer.weight",
    "model.layers.61.embed_tokens.weight",
    "model.layers.61.shared_head.head.weight",
    "model.layers.3.self_attn.q_norm.weight",
    "model.layers.3.conv.conv.weight",
    "model.layers.3.self_attn.q_proj.bias",
]


@pytest.mark.parametrize("name", LINEAR + OTHER)
def test_linear_weights_are_told_by_their_names(name: str) -> None:
    stored = StoredTensor(name, Path("x"), "BF16", (8, 64), 0, 1024)
    assert is_linear(name, stored) == (name in LINEAR)
    assert not is_linear(name, StoredTensor(name, Path("x"), "BF16", (512,), 0, 1024))


def test_fused_experts_become_single_ones(tmp_path: Path) -> None:
    fused = tiny_checkpoint(tmp_path / "fused", layout="fused", weights="bf16")
    single = tiny_checkpoint(tmp_path / "single", layout="gate_proj", weights="bf16")
    for source in (fused, single):
        quantize(source, tmp_path / f"{source.name}-nf4")
    found, expected = (read_tensors(tmp_path / f"{name}-nf4") for name in ("fused", "single"))
    assert found.keys() == expected.keys()
    assert "model.layers.1.mlp.experts.3.up_proj.weight.nested_absmax" in found
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    checkpoint = open_checkpoint(str(tmp_path / "fused-nf4"))
    assert (checkpoint.weights_kind, checkpoint.router_kind) == ("nf4", "bfloat16")


def test_fused_experts_of_another_layout_stay(tmp_path: Path) -> None:
    """Transposed, as gpt-oss and Llama 4 have them: [E, H, 2 I] and [E, I, H]."""
    at = "model.layers.0.mlp.experts"
    tensors = {
        f"{at}.gate_up_proj": torch.ones(4, 64, 192),
        f"{at}.down_proj": torch.ones(4, 96, 64),
    }
    tensors["model.layers.0.self_attn.q_proj.weight"] = torch.ones(64, 64)
    done = quantize(model(tmp_path / "source", tensors), tmp_path / "nf4")
    assert set(done.kept) == {f"{at}.gate_up_proj", f"{at}.down_proj"}


def test_config_is_what_transformers_writes_and_small_files_come_along(tmp_path: Path) -> None:
    source = model(tmp_path / "source", one_layer(torch.float16))
    beside = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "merges.txt")
    for name in (*beside, "chat_template.jinja", "LICENSE", "card.json", "README.md", "x.bin"):
        (source / name).write_text(name)
    quantize(source, tmp_path / "nf4", nested=False)
    config = json.loads((tmp_path / "nf4/config.json").read_text())
    expected = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=False,
        bnb_4bit_compute_dtype="float16", llm_int8_skip_modules=["lm_head", "mlp.gate"],
    )  # fmt: skip
    assert config.pop("quantization_config") == expected.to_dict()
    assert config == CONFIG
    names = {path.name for path in (tmp_path / "nf4").iterdir()}
    assert names == {*beside, "chat_template.jinja", "LICENSE", "config.json", "model.safetensors"}


def test_shards_and_threads_change_no_tensor(tmp_path: Path) -> None:
    source = model(tmp_path / "source", one_layer())
    quantize(source, tmp_path / "one", threads=1)
    quantize(source, tmp_path / "many", threads=3, shard_bytes=20_000)
    quantize(source, tmp_path / "again", threads=1, shard_bytes=20_000)
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert [file.name for file in files][
        -1
    ] == f"model-{len(files):05d}-of-{len(files):05d}.safetensors"
    assert len(files) >= 3
    index = json.loads((tmp_path / "many/model.safetensors.index.json").read_text())
    found = {name: file.name for file in files for name in load_file(file)}
    assert index["weight_map"] == found
    whole, cut = read_tensors(tmp_path / "one"), read_tensors(tmp_path / "many")
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    assert whole.keys() == cut.keys()
    assert all(torch.equal(bits(whole[name]), bits(cut[name])) for name in whole)
    assert all(file.read_bytes() == (tmp_path / "again" / file.name).read_bytes() for file in files)


def peak_bytes() -> int:
    (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x]
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="Linux resets its peak")
def test_memory_stays_far_below_a_weight(tmp_path: Path) -> None:
    """192 MB in two weights and an embedding of 100 MB, on two threads."""
    source = model(tmp_path / "source", one_layer())
    quantize(source, tmp_path / "warm")  # compiles
    shapes = {f"model.layers.{at}.mlp.up_proj.weight": (4096, 5632) for at in range(2)}
    shapes["model.embed_tokens.weight"] = (25_000, 2000)
    write_sparse(source / "model.safetensors", shapes)
    size = (source / "model.safetensors").stat().st_size
    assert size > 190e6
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what is held now
    before = peak_bytes()
    quantize(source, tmp_path / "nf4", threads=2)
    assert peak_bytes() - before < 48e6


def write_sparse(path: Path, shapes: dict[str, tuple[int, int]]) -> None:
    """A file of zeros in bfloat16 that takes no disk."""
    entries, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    head = json.dumps(entries).encode()
    path.write_bytes(len(head).to_bytes(8, "little") + head)
    os.truncate(path, 8 + len(head) + end)


def test_a_file_opens_only_when_it_is_finished(tmp_path: Path) -> None:
    shard = ShardFile(tmp_path / "a.safetensors", [("x", "F32", (2,))], ["state"])
    shard.write("x", memoryview(np.arange(2, dtype=np.float32)).cast("B"))
    with pytest.raises(CheckpointError):
        read_header(shard.path)
    with pytest.raises(SafetensorError):
        safe_open(shard.path, framework="pt")
    shard.finish({"state": b"{}"})
    found = load_file(shard.path)
    assert found["x"].tolist() == [0, 1]
    assert found["state"].tolist() == list(b"{}")
    assert set(read_header(shard.path)) == {"x", "state"}
    with pytest.raises(FileExistsError):
        ShardFile(shard.path, [], [])


def test_an_interrupted_run_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(phase: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    source = model(tmp_path / "source", one_layer())
    with pytest.raises(KeyboardInterrupt):
        quantize(source, tmp_path / "nf4", progress=interrupt)
    assert list((tmp_path / "nf4").iterdir()) == []


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    source = model(tmp_path / "source", one_layer())
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(MachineError, match="nf4: No space left on device"):
        quantize(source, tmp_path / "nf4")
    assert list((tmp_path / "nf4").iterdir()) == []


@pytest.mark.parametrize("value", [math.nan, -math.inf])
@pytest.mark.parametrize(
    "name, place", [("model.layers.0.mlp.up_proj.weight", (1024, 7)), ("lm_head.weight", (9, 5))]
)
def test_a_weight_that_is_not_finite_is_named(
    tmp_path: Path, name: str, place: tuple[int, int], value: float
) -> None:
    tensors = one_layer()
    assert math.prod(SHAPES[0]) > PIECE > 0
    tensors[name][place] = value
    source = model(tmp_path / "source", tensors)
    found = rf"{name}: found {value} at \[{place[0]}, {place[1]}\], needed finite weights"
    with pytest.raises(CheckpointError, match=found):
        quantize(source, tmp_path / "nf4")
    assert list((tmp_path / "nf4").iterdir()) == []


def test_what_cannot_be_quantized_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    good = model(tmp_path / "good", one_layer())
    dequantized = shutil.copytree(good, tmp_path / "dequantized")
    (dequantized / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    gpt2 = shutil.copytree(good, tmp_path / "gpt2")
    (gpt2 / "config.json").write_text('{"model_type": "gpt2"}')
    tiny_checkpoint(tmp_path / "nf4", weights="nf4")
    mixed = tiny_checkpoint(tmp_path / "mixed", weights="mixed")
    plain = model(tmp_path / "plain", {"model.norm.weight": torch.ones(4)})
    for folder, file in (("gguf", "model.gguf"), ("pickle", "pytorch_model.bin"), ("no", "a.txt")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / file).write_text("x")
        (tmp_path / folder / "config.json").write_text("{}")
    no_config = shutil.copytree(good, tmp_path / "no_config")
    (no_config / "config.json").unlink()
    monkeypatch.chdir(tmp_path)
    for source, target, found in (
        (good, good, "found files in it, needed an empty folder"),
        (good, good / "config.json", "found a file, needed a folder"),
        ("nf4", "new", "experts.0.w1.weight: found U8 [3072, 1]: already quantized, needed"),
        (mixed, "new", "block_sparse_moe.gate.weight: found U8 [128, 1]"),
        (dequantized, "new", "quantization_config: found {'quant_method': 'gptq'}"),
        (plain, "new", "found no weight of a linear layer"),
        ("gguf", "new", "gguf: found only model.gguf, needed *.safetensors"),
        ("gguf/model.gguf", "new", "found a GGUF file, needed a folder"),
        ("pickle", "new", "only pytorch_model.bin, a format that can run code"),
        ("no", "new", "found no safetensors file"),
        (no_config, "new", "config.json: found no such file"),
        (
            gpt2,
            "new",
            "model_type: found 'gpt2', needed a model whose linear weights are [out, in]",
        ),
        ("org/name", "new", "hf download org/name --local-dir DIR"),
    ):
        assert run(["quantize", str(source), str(target)]) == 2, source
        assert found in capsys.readouterr().err
    assert run(["quantize", str(good), "new", "--blocksize", "60"]) == 2
    assert "--blocksize: found 60, needed one of 32, 64" in capsys.readouterr().err
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(9, 9, 1000))
    assert run(["quantize", str(good), "new"]) == 2
    assert "found 1000 B of free disk, needed 562.61 KiB" in capsys.readouterr().err
    assert list(Path("new").iterdir()) == []


def test_the_command_prints_its_result_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = model(tmp_path / "source", one_layer())
    target = tmp_path / "nf4"
    assert run(["quantize", str(source), str(target), "--no-double-quant"]) == 0
    said = capsys.readouterr()
    first, second = said.out.splitlines()
    assert first.startswith(f"{target}: 6 weights as NF4; 2.07 MiB became ")
    assert first.endswith("MB/s)")
    assert second.startswith("as before: ")
    assert "lm_head.weight" in second
    assert said.err == ""
    assert not any("nested" in name for name in read_tensors(target))
