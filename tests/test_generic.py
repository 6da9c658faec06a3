"""Any decoder through transformers' own layers: rows of several sequences, one layer at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from generic_driver import random_model, small_config, sweep
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from layersweep.errors import CheckpointError
from layersweep.families.generic.build import build, read_config
from layersweep.families.generic.interfaces import Unsupported
from layersweep.families.generic.names import Source, weights_of
from layersweep.families.generic.rehearsal import rehearse
from layersweep.kv.arms import EXACT, Arm, parse
from layersweep.model.generic.decoder import Decoder
from layersweep.sweep.sequences import Branch, BranchedSequence, Tile

CPU = torch.device("cpu")
LONGEST = 400
NORMAL: dict[str, dict[str, Any]] = {
    "llama": {}, "mistral": {}, "qwen3_moe": {}, "gemma2": {}, "gemma3_text": {}, "gpt_oss": {},
    "olmoe": {}, "smollm3": {}, "granitemoe": {}, "glm4_moe": {}, "gpt2": {},
    "cohere2": {"logit_scale": 1.0}, "qwen3_next": {},
    "falcon_h1": {}, "deepseek_v3": {"num_key_value_heads": 4, "head_dim": 8},
}  # fmt: skip


def ids(count: int, seed: int) -> tuple[int, ...]:
    drawn = torch.randint(3, 160, (count,), generator=torch.Generator().manual_seed(seed))
    return tuple(drawn.tolist())


def ride(prefix: int, *own: int, arm: Arm = EXACT, streaming: bool = False) -> BranchedSequence:
    branches = tuple(
        Branch(arm, ids(count, prefix + count + at), (0, count), streaming)
        for at, count in enumerate(own)
    )
    return BranchedSequence(ids(prefix, prefix), branches)


# sequences of several lengths, with and without a prefix, two of one shape, beyond every window
TILES = [
    Tile("a", (ride(19, 9, 12, 12), ride(5, 7), ride(0, 21), ride(11, 3, 5), ride(11, 3, 5))),
    Tile("b", (ride(30, 4, 4),)),
]


def difference(model: PreTrainedModel, tiles: list[Tile], found: list[Tensor]) -> float:
    """Largest difference to transformers' plain forward of prefix + branch, over the prefix's rows
    and the branch's, in standard deviations of its logits."""
    worst = 0.0
    for tile, logits in zip(tiles, found, strict=True):
        at = 0
        for sequence in tile.sequences:
            start, at = at, at + len(sequence.prefix)
            for branch in sequence.branches:
                rows = [*range(start, start + len(sequence.prefix))]
                rows += range(at, at + len(branch.ids))
                at += len(branch.ids)
                whole = torch.tensor([sequence.prefix + branch.ids])
                with torch.inference_mode():
                    wanted = model(whole, use_cache=False).logits[0]
                worst = max(worst, float((logits[rows] - wanted).abs().max() / wanted.std()))
    return worst


@pytest.mark.parametrize("kind", NORMAL)
def test_every_branch_equals_its_own_forward(kind: str) -> None:
    config = small_config(kind, **NORMAL[kind])
    model = random_model(config)
    found = sweep(Decoder(config, CPU, LONGEST), model.state_dict(), TILES)
    assert difference(model, TILES, found) < 1e-4


def test_a_prefix_is_computed_once() -> None:
    config = small_config("llama")
    found = sweep(Decoder(config, CPU, LONGEST), random_model(config).state_dict(), TILES)
    assert [len(logits) for logits in found] == [tile.rows for tile in TILES] == [123, 38]


def test_what_layers_do_is_found_without_weights() -> None:
    layers = rehearse(small_config("gemma3_text"), LONGEST).layers
    assert [layer.attention[0].window for layer in layers] == [7, 7, 7, 7]
    layers = rehearse(small_config("gpt_oss"), LONGEST).layers
    assert [layer.attention[0].window for layer in layers] == [7, None, 7, None]
    assert all(layer.attention[0].sinks and len(layer.experts) == 1 for layer in layers)
    layers = rehearse(small_config("gemma2"), LONGEST).layers
    assert [layer.attention[0].softcap for layer in layers] == [50.0] * 4
    layers = rehearse(small_config("qwen3_next"), LONGEST).layers
    assert [len(layer.attention) for layer in layers] == [0, 0, 0, 1]
    assert layers[0].mixers == ("model.layers.0.linear_attn",)
    assert [len(rehearse(small_config("falcon_h1"), LONGEST).layers[0].mixers)] == [1]


@pytest.mark.parametrize(
    ("kind", "pairs", "first"),
    [("llama", 8, [0, 8]), ("cohere", 8, [0, 1]), ("glm4_moe", 4, [0, 4]), ("smollm3", 0, [])],
)
def test_how_keys_turn_is_read_off_them(kind: str, pairs: int, first: list[int]) -> None:
    """Halves, neighbours, a part of a head, and not at all."""
    config = small_config(kind)
    turning = rehearse(config, LONGEST).layers[3].attention[0].rotation
    assert turning is not None and len(turning.first) == pairs
    assert [*turning.first[:1].tolist(), *turning.second[:1].tolist()] == first
    if pairs:
        theta = config.rope_parameters["rope_theta"]
        wanted = torch.tensor([theta ** (-at / pairs) for at in range(pairs)])
        assert torch.allclose(turning.speed.abs(), wanted.double(), rtol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "cohere", "gpt_oss", "glm4_moe"])
def test_codecs_see_keys_before_rope(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a codec gets is what the key projection made, up to a factor of yarn's."""
    config = small_config(kind)
    model = random_model(config)
    tile = Tile("t", (ride(30, 6, arm=parse("fp8")),))
    seen: list[Tensor] = []
    codec = type(parse("fp8").codec)
    encode = codec.encode
    monkeypatch.setattr(
        codec, "encode",
        lambda self, x, stream, at, mean=None: (
            seen.append(x) if stream.role == "key" else None,
            encode(self, x, stream, at, mean),
        )[1],
    )  # fmt: skip
    made: list[Tensor] = []
    layer = model.model.layers[1]
    layer.self_attn.k_proj.register_forward_hook(lambda *call: made.append(call[-1]))
    with torch.inference_mode():
        model(torch.tensor([tile.sequences[0].prefix]), use_cache=False)
    sweep(Decoder(config, CPU, LONGEST), model.state_dict(), [tile])
    wanted = made[0].view(1, 30, 2, 16).transpose(1, 2)[:, :, -seen[1].shape[2] :]
    factor = getattr(model.model.rotary_emb, "attention_scaling", 1.0)  # yarn's, of all keys alike
    assert torch.allclose(seen[1], factor * wanted, atol=2e-5)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt_oss", "qwen3_next"])
def test_identity_arms_change_nothing_but_rounding(kind: str, streaming: bool) -> None:
    config = small_config(kind)
    model = random_model(config)
    arm = parse("identity")
    sequence = ride(0, 40, arm=arm, streaming=True) if streaming else ride(31, 9, 9, arm=arm)
    counted: list[tuple[str, float, int]] = []
    found = sweep(
        Decoder(config, CPU, LONGEST), model.state_dict(), [Tile("t", (sequence,))],
        lambda arm, bits, elements: counted.append((arm.name, bits / elements, elements)),
    )  # fmt: skip
    assert difference(model, [Tile("t", (sequence,))], found) < 2e-4
    attention_layers = 1 if kind == "qwen3_next" else 4
    assert len(counted) == attention_layers * len(sequence.branches)


def test_a_window_keeps_its_tokens_alone() -> None:
    """Window 7: a branch after 31 tokens reads 6 of them, 2 heads of 16, keys and values."""
    config = small_config("mistral")
    counted: list[int] = []
    sweep(
        Decoder(config, CPU, LONGEST), random_model(config).state_dict(),
        [Tile("t", (ride(31, 9, arm=parse("fp8")),))],
        lambda arm, bits, elements: counted.append(elements),
    )  # fmt: skip
    assert counted == [6 * 2 * 16 * 2] * 4


def test_a_coarse_codec_moves_the_numbers() -> None:
    config = small_config("llama")
    model = random_model(config)
    tile = Tile("t", (ride(31, 9, arm=parse("lloyd:K2V2")),))
    found = sweep(Decoder(config, CPU, LONGEST), model.state_dict(), [tile])
    assert 0.05 < difference(model, [tile], found) < 10


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe", "gpt_oss", "mixtral", "sarvam_moe"])
def test_parameters_are_found_under_published_names(kind: str, tmp_path: Path) -> None:
    model = random_model(small_config(kind))
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    found = weights_of(build(read_config(tmp_path)), stored)
    for name, wanted in model.state_dict().items():
        for weight in found[name]:
            parts = [_part(stored, source) for source in weight.sources]
            whole = torch.cat(parts) if len(parts) > 1 else parts[0]
            assert torch.equal(whole, wanted if weight.expert is None else wanted[weight.expert])
            assert weight.shape == tuple(whole.shape)
    used = {s.stored for weights in found.values() for w in weights for s in w.sources}
    assert used == set(stored)


def _part(stored: dict[str, Tensor], source: Source) -> Tensor:
    return stored[source.stored][slice(*source.rows) if source.rows else slice(None)]


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    model = random_model(small_config("qwen3_moe"))
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        stored = list(file.keys())
    gone = "model.layers.2.mlp.experts.3.up_proj.weight"
    with pytest.raises(CheckpointError, match="found 6 and 5 experts"):
        weights_of(build(read_config(tmp_path)), set(stored) - {gone})
    with pytest.raises(CheckpointError, match=r"no tensor for model\.norm\.weight"):
        weights_of(build(read_config(tmp_path)), set(stored) - {"model.norm.weight"})


@pytest.mark.parametrize(
    ("kind", "fields", "why"),
    [
        ("bart", {}, "encoder-decoder"),
        ("bloom", {}, "position_ids"),
        ("bert", {}, "looks ahead"),
        ("mpt", {}, "position_ids"),
        ("diffllama", {}, "two attention calls"),
        ("doge", {}, "'Sight' object"),
        ("openai-gpt", {}, "no layer that attends"),
        ("inkling_text", {}, "position_bias"),
    ],
)
def test_what_cannot_run_is_refused_with_its_reason(
    kind: str, fields: dict[str, Any], why: str
) -> None:
    with pytest.raises(Unsupported, match=why):
        rehearse(small_config(kind, **fields), LONGEST)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"model_type": "lama"}', "found model_type 'lama'"),
        ('{"model_type": "llama", "auto_map": {}}', "auto_map"),
    ],
)
def test_a_config_of_somebody_else_is_refused(tmp_path: Path, text: str, why: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=why):
        read_config(tmp_path)


def test_a_model_that_fails_fails_in_the_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a forward pass raises in its thread comes out where the sweep waits for it."""
    config = small_config("llama")
    decoder = Decoder(config, CPU, LONGEST)
    weights = random_model(config).state_dict()
    weights["model.layers.2.self_attn.q_proj.weight"] = torch.zeros(3, 64)
    with pytest.raises(RuntimeError, match="shape"):
        sweep(decoder, weights, TILES)


def test_configs_are_not_shared() -> None:
    config = small_config("qwen3_moe")
    build(config)
    assert config._experts_implementation != "layersweep"


def test_numbers_do_not_depend_on_the_other_tiles() -> None:
    config = small_config("qwen3_moe")
    decoder, weights = Decoder(config, CPU, LONGEST), random_model(config).state_dict()
    together, alone = sweep(decoder, weights, TILES)[1], sweep(decoder, weights, TILES[1:])[0]
    assert torch.equal(together, alone)


def test_a_field_that_moves_transformers_moves_this() -> None:
    """With theta or the softcap changed, both come to the same other numbers."""
    for kind, change in (
        ("gemma2", {"attn_logit_softcapping": 5.0}),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0}}),
        ("mistral", {"sliding_window": 3}),
    ):
        plain, changed = small_config(kind), small_config(kind, **change)
        weights = random_model(plain).state_dict()
        found = sweep(Decoder(changed, CPU, LONGEST), weights, TILES[1:])
        assert difference(random_model(changed), TILES[1:], found) < 1e-4
        assert difference(random_model(plain), TILES[1:], found) > 1e-2
