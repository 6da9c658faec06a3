"""Any decoder through transformers' own layers: rows of several sequences, one layer at a time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families.table import parameters
from families.weights import randomize
from generic_models import difference, opened, random_model, saved, small_config, swept
from live_bytes import LiveBytes
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from layersweep.errors import CheckpointError, InputError
from layersweep.families.generic.interfaces import Unsupported
from layersweep.families.generic.mixing import ROWS, Called
from layersweep.families.generic.rehearsal import rehearse
from layersweep.families.registry import describe
from layersweep.kv.arms import EXACT, Arm, parse
from layersweep.model.compute import on_cpu
from layersweep.model.generic.walk import Walk
from layersweep.stream.generic_shapes import module_bytes
from layersweep.stream.plan import make_plan
from layersweep.stream.shapes import experts_at_once, rows_at_once, tile_bytes
from layersweep.sweep.generic_limits import check_modules, module_fallbacks
from layersweep.sweep.loop import run_sweep
from layersweep.sweep.model import Model
from layersweep.sweep.record import LayerHealth
from layersweep.sweep.sequences import Branch, BranchedSequence, Tile
from layersweep.sweep.streams import state_bytes
from layersweep.tasks.kv_bytes import kv_bytes

LONGEST = 400
KINDS: dict[str, dict[str, Any]] = {
    "llama": {}, "mistral": {}, "qwen3_moe": {}, "gemma2": {}, "gemma3_text": {}, "gpt_oss": {},
    "olmoe": {}, "smollm3": {}, "granitemoe": {}, "glm4_moe": {}, "gpt2": {},
    "cohere2": {"logit_scale": 1.0}, "qwen3_next": {}, "opt": {}, "phimoe": {},
    "falcon_h1": {}, "beam": {}, "deepseek_v3": {"num_key_value_heads": 4, "head_dim": 8},
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
Made = dict[str, tuple[PreTrainedModel, Path]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return {}


@pytest.fixture
def make(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """transformers' model of a kind, and ours of the same weights; made once for each kind."""

    def making(kind: str) -> tuple[PreTrainedModel, Model]:
        if kind not in made:
            model = random_model(small_config(kind, **KINDS.get(kind, {})))
            made[kind] = model, saved(model, tmp_path_factory.mktemp(kind))
        model, folder = made[kind]
        return model, opened(folder)

    return making


@pytest.mark.parametrize("kind", KINDS)
def test_every_branch_equals_its_own_forward(kind: str, make: Any) -> None:
    theirs, ours = make(kind)
    found, record = swept(ours, TILES)
    assert difference(theirs, TILES, found) < 1e-4
    assert record.nonfinite == {}


def test_what_layers_do_is_found_without_weights() -> None:
    def attentions(kind: str) -> list[Any]:
        found = rehearse(small_config(kind), LONGEST).layers
        return [attention for _, attention, _ in found]

    assert [one.window for one in attentions("gemma3_text")] == [7, 7, 7, 7]
    assert [one.window for one in attentions("gpt_oss")] == [7, None, 7, None]
    assert all(one.sinks for one in attentions("gpt_oss"))
    assert [one.softcap for one in attentions("gemma2")] == [50.0] * 4
    assert [one is None for one in attentions("qwen3_next")] == [True, True, True, False]
    parts, _, per_token = rehearse(small_config("qwen3_next"), LONGEST).layers[0]
    assert parts.mixers == ("model.layers.0.linear_attn",)
    assert (parts.experts, per_token) == ("model.layers.0.mlp.experts", 2)
    assert "model.layers.0.mlp.shared_expert" in parts.rowwise
    parts, attention, _ = rehearse(small_config("falcon_h1"), LONGEST).layers[0]
    assert parts.mixers == ("model.layers.0.mamba",) and attention is not None


class Leaking(nn.Module):
    """Each row and very little of the rows before it."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        return x + self.share * x.cumsum(1) if self.share else x.square()


@pytest.mark.parametrize(("share", "mixes"), [(0.0, False), (0.1, True), (1e-12, True)])
def test_tokens_that_see_each_other_are_found_however_little(share: float, mixes: bool) -> None:
    module, x = Leaking(share), torch.randn(1, ROWS, 4)
    assert Called(module, (x,), {}, module(x)).mixes() is mixes


@pytest.mark.parametrize(
    ("kind", "pairs", "first"),
    [("llama", 8, [0, 8]), ("cohere", 8, [0, 1]), ("glm4_moe", 4, [0, 4]), ("smollm3", 0, [])],
)
def test_how_keys_turn_is_read_off_them(kind: str, pairs: int, first: list[int]) -> None:
    """Halves, neighbours, a part of a head, and not at all."""
    config = small_config(kind)
    turning = rehearse(config, LONGEST).layers[3][0].turning
    assert turning is not None and len(turning.first) == pairs
    assert [*turning.first[:1], *turning.second[:1]] == first
    if pairs:
        theta = config.rope_parameters["rope_theta"]
        wanted = [theta ** (-at / pairs) for at in range(pairs)]
        assert [abs(speed) for speed in turning.speed] == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt_oss", "glm4_moe"])
def test_codecs_see_keys_before_rope(kind: str, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a codec gets is what the key projection made, up to a factor of yarn's."""
    theirs, ours = make(kind)
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
    projection = theirs.model.layers[1].self_attn.k_proj
    hook = projection.register_forward_hook(lambda *call: made.append(call[-1]))
    with torch.inference_mode():
        theirs(torch.tensor([tile.sequences[0].prefix]), use_cache=False)
    hook.remove()
    swept(ours, [tile])
    wanted = made[0].view(1, 30, 2, 16).transpose(1, 2)[:, :, -seen[1].shape[2] :]
    factor = getattr(theirs.model.rotary_emb, "attention_scaling", 1.0)  # yarn's, of all keys
    assert torch.allclose(seen[1], factor * wanted, atol=2e-5)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt_oss", "qwen3_next"])
def test_identity_arms_change_nothing_but_rounding(kind: str, streaming: bool, make: Any) -> None:
    theirs, ours = make(kind)
    arm = parse("identity")
    sequence = ride(0, 40, arm=arm, streaming=True) if streaming else ride(31, 9, 9, arm=arm)
    found, record = swept(ours, [Tile("t", (sequence,))])
    assert difference(theirs, [Tile("t", (sequence,))], found) < 1e-3
    assert list(record.cache_bits) == [("t", arm.name)]


def test_a_window_keeps_its_tokens_alone(make: Any) -> None:
    """Window 7: a branch after 31 tokens reads 6 of them, 2 heads of 16, keys and values."""
    _, ours = make("mistral")
    _, record = swept(ours, [Tile("t", (ride(31, 9, arm=parse("fp8")),))])
    assert record.cache_bits["t", "fp8"][1] == 4 * 6 * 2 * 16 * 2


def test_a_coarse_codec_moves_the_numbers(make: Any) -> None:
    theirs, ours = make("llama")
    tile = Tile("t", (ride(31, 9, arm=parse("lloyd:K2V2")),))
    found, _ = swept(ours, [tile])
    assert 0.05 < difference(theirs, [tile], found) < 10


def test_numbers_do_not_depend_on_the_other_tiles(make: Any) -> None:
    _, ours = make("qwen3_moe")
    together, alone = swept(ours, TILES)[0][1], swept(ours, TILES[1:])[0][0]
    assert torch.equal(together[0][0], alone[0][0])


def test_a_second_exact_branch_differs_by_nothing(make: Any) -> None:
    _, ours = make("qwen3_moe")
    branch = Branch(EXACT, ids(12, 5), (0, 12))
    tile = Tile("t", (BranchedSequence(ids(20, 6), (branch, branch)),))
    ((one, other),) = swept(ours, [tile])[0][0]
    assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("gemma2", {"attn_logit_softcapping": 5.0}),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0}}),
        ("mistral", {"sliding_window": 3}),
    ],
)
def test_a_field_that_moves_transformers_moves_this(
    kind: str, change: dict[str, Any], make: Any, tmp_path: Path
) -> None:
    theirs, _ = make(kind)
    changed = random_model(small_config(kind, **change))  # of the same weights
    ours = opened(saved(changed, tmp_path))
    found, _ = swept(ours, TILES[1:])
    assert difference(changed, TILES[1:], found) < 1e-4
    assert difference(theirs, TILES[1:], found) > 1e-2


def test_a_missing_expert_is_named(make: Any, made: Made) -> None:
    make("qwen3_moe")
    found = describe(made["qwen3_moe"][0].config.to_dict(), "config.json", generic=True)
    assert found.decoder is not None and found.names is not None
    layer = {f"model.layers.{at}.mlp.experts" for at in range(4)}
    there = {
        **{name: 0 for name in made["qwen3_moe"][0].state_dict() if "experts" not in name},
        **{
            f"{of}.{expert}.{part}_proj.weight": 0
            for of in layer
            for expert in range(6)
            for part in ("gate", "up", "down")
        },
    }
    assert len(found.names.layer(found.decoder, 2, there).single) == 9 + 6 * 3
    found = describe(made["qwen3_moe"][0].config.to_dict(), "config.json", generic=True)
    assert found.decoder is not None and found.names is not None
    there.pop("model.layers.2.mlp.experts.3.up_proj.weight")
    with pytest.raises(CheckpointError, match="found 6 and 5 experts"):
        found.names.layer(found.decoder, 2, there)


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("bart", "encoder-decoder"),
        ("bloom", "position_ids"),
        ("bert", "looks ahead"),
        ("mpt", "position_ids"),
        ("diffllama", "two attention calls"),
        ("doge", "computes with its attention mask"),
        ("falcon", "attention of its own"),
        ("llama4_text", "counts row by row"),
        ("openai-gpt", "no layer that attends"),
        ("inkling_text", "position_bias"),
    ],
)
def test_what_cannot_run_is_refused_with_its_reason(kind: str, why: str) -> None:
    with pytest.raises(Unsupported, match=why):
        rehearse(small_config(kind), LONGEST)
    problems = describe(small_config(kind).to_dict(), "config.json").problems
    assert len(problems) == 1 and why in problems[0].sentence()


def test_a_model_that_fails_fails_in_the_sweep(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a forward pass raises in its thread comes out where the sweep waits for it."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    _, ours = make("llama")

    def fails(self: object, x: Tensor) -> Tensor:
        raise RuntimeError("on purpose")

    monkeypatch.setattr(LlamaMLP, "forward", fails)
    with pytest.raises(RuntimeError, match="on purpose"):
        swept(ours, TILES)


@pytest.mark.parametrize(
    ("kind", "weights"),
    [("qwen3_moe", "auto"), ("qwen3_moe", "nf4"), ("gpt_oss", "nf4")],  # which stores columns
)
def test_it_equals_the_program_of_this_package(
    kind: str, weights: str, make: Any, made: Made
) -> None:
    make(kind)
    folder = made[kind][1]
    (generic, _), (own, _) = (
        swept(opened(folder, weights=weights, program=program), TILES)
        for program in ("generic", "auto")
    )
    for one, other in zip(_leaves(generic), _leaves(own), strict=True):
        assert torch.allclose(one, other, atol=1e-4 * float(other.std()))


def test_what_stays_in_16_bits_under_nf4_is_said(make: Any, made: Made) -> None:
    make("qwen3_moe")
    folder = made["qwen3_moe"][1]
    said = opened(folder, weights="nf4", program="generic").compute.fallbacks
    (left,) = [one for one in said if one.what == "--weights nf4"]
    assert "not " in left.why and "gate" in left.why and "q_proj" not in left.why
    stored = opened(folder, weights="auto", program="generic").compute.fallbacks
    assert [one for one in stored if one.what == "--weights nf4"] == []


def _leaves(found: list[list[list[Tensor]]]) -> list[Tensor]:
    return [logits for tile in found for sequence in tile for logits in sequence]


def test_the_lead_tile_is_looked_at_in_every_layer(make: Any) -> None:
    _, ours = make("qwen3_moe")
    seen: list[LayerHealth] = []
    lead = Tile("gate", (ride(0, 30),))
    engine = ours.open(ours.plan([lead, *TILES]))
    try:
        record = run_sweep(engine, TILES, lambda *read: None, lead=lead, check=seen.append)
    finally:
        engine.close()
    assert [health.layer for health in seen] == [0, 1, 2, 3]
    for health in seen:
        assert 0 < health.largest < 1e3
        assert health.experts_used is not None and 2 < health.experts_used <= 6
        assert health.router_spread is not None and health.router_spread > 0.01
    assert record.experts_used == [health.experts_used for health in seen]


def test_a_branch_that_is_not_finite_is_named_with_its_layer(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    _, ours = make("llama")
    forward, calls = LlamaMLP.forward, [0]

    def fails(self: Any, x: Tensor) -> Tensor:
        """Layer 2: a row of the second branch of the only sequence."""
        found = forward(self, x)
        calls[0] += 1
        if calls[0] == 3:
            found[0, 12] = torch.inf
        return found

    monkeypatch.setattr(LlamaMLP, "forward", fails)
    _, record = swept(ours, [Tile("t", (ride(5, 6, 7),))])
    assert record.nonfinite == {(0, 0, 1): 2}


# How far a plan may be above the peak: with experts further, all of whose rows may go to one.
EXCESS = {
    "llama": 1.15, "starcoder2": 1.15, "phi": 1.15, "lfm2": 1.15, "falcon_h1": 1.15,
    "qwen3_moe": 1.4, "qwen3_next": 1.4, "dbrx": 1.4,
}  # fmt: skip
WATCHED = frozenset({"starcoder2", "lfm2", "qwen3_next"})  # in every run of the tests
SIZES: dict[str, dict[str, Any]] = {
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 8},
    "dbrx": {
        "d_model": 128,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 512,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {
            "hidden_size": 128,
            "ffn_hidden_size": 80,
            "moe_num_experts": 6,
            "moe_top_k": 2,
        },
    },
}


@pytest.mark.parametrize("kind", parameters(EXCESS, WATCHED))
def test_memory_stays_within_the_plan(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At sizes where hidden states and what is made of them dominate."""
    sizes = {
        "hidden_size": 128, "intermediate_size": 320, "moe_intermediate_size": 80,
        "head_dim": 32, "num_hidden_layers": 2,
    }  # fmt: skip
    known = small_config(kind)
    fields = {key: size for key, size in sizes.items() if hasattr(known, key)}
    fields |= SIZES.get(kind, {})
    ours = opened(saved(random_model(small_config(kind, **fields)), tmp_path))
    own = tuple(Branch(parse(arm), ids(64, 7), (0, 63)) for arm in ("exact", "fp8", "identity"))
    tiles = [Tile("t", (BranchedSequence(ids(128, 5), own),) * 6) for _ in range(2)]
    live = LiveBytes()
    monkeypatch.setattr(Walk, "_run", live.around(Walk._run))
    with live:
        swept(ours, tiles)
    peaks = ours.plan(tiles).peaks
    planned = sum(peaks.values()) - peaks["fixed"]
    weights = sum(spec.nbytes for spec in ours.specs)  # in the ring, which is no working set
    peak = live.peak - weights
    assert peak < planned < EXCESS[kind] * peak


def test_on_a_gpu_each_tile_has_a_workspace_and_norms_take_no_float32(make: Any) -> None:
    """64 MiB per walk, in whose thread cuBLAS works; rows of experts lie in the scratch."""
    ours, decoder = make("qwen3_moe")[1], make("qwen3_moe")[1].decoder
    shapes = [replace(ours.shape(tile), rows=6144, rows_at_once=6144) for tile in TILES]
    gpu = replace(ours.machine, cpu=False, element=2, vram=2**31, grouped=True)
    plans = [
        make_plan(decoder, ours.specs, shapes, replace(gpu, kernels=own)) for own in (True, False)
    ]
    held = sum(tile_bytes(decoder, shape, 2) for shape in shapes)
    assert [plan.peaks["hidden states"] - held for plan in plans] == [2 * 64 * 2**20] * 2
    wide, rows = 64 + 2 * 48, rows_at_once(decoder.layers[0].feed, "expert", 6144, cpu=False)
    together = experts_at_once(decoder, decoder.layers[0], 2, cpu=False)
    assert plans[0].peaks["scratch"] >= rows * together * wide * 2
    ours_at, theirs_at = (
        module_bytes(decoder, shapes[0], replace(gpu, kernels=own), attending=0)
        for own in (True, False)
    )
    assert ours_at < 0.9 * theirs_at


def test_a_plan_that_could_not_be_measured_is_said() -> None:
    """JetMoE asks how many rows each of its experts has."""
    fields = small_config("jetmoe", kv_channels=16).to_dict()
    found = describe(fields, "config.json", generic=True)
    assert found.decoder is not None
    (guess,) = [one for one in module_fallbacks(found.decoder, 2) if one.what == "memory plan"]
    assert guess.used == "a generous guess" and "meta" in guess.why


def test_images_are_left_to_others(tmp_path: Path) -> None:
    """Mistral 3 reads images: its text part is a Mistral, whose tensors have other names there."""
    text = small_config("mistral")
    vision = CONFIG_MAPPING["pixtral"](
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
    )
    whole = CONFIG_MAPPING["mistral3"](text_config=text.to_dict(), vision_config=vision.to_dict())
    theirs = AutoModelForImageTextToText.from_config(whole, dtype=torch.float32).eval()
    randomize(theirs)
    ours = opened(saved(theirs, tmp_path))
    assert [one.used for one in ours.compute.fallbacks] == ["its text part, a mistral"]
    found, _ = swept(ours, TILES[1:])
    assert difference(theirs, TILES[1:], found) < 1e-4


def test_what_such_a_decoder_cannot_do_is_refused() -> None:
    fields = small_config("glm4_moe_lite", num_key_value_heads=4).to_dict()
    found = describe(fields, "config.json", generic=True)
    assert found.decoder is not None
    with pytest.raises(InputError, match="fp8 for a glm4_moe_lite, needed exact arms alone"):
        check_modules(found.decoder, [EXACT, parse("fp8")], generates=False)
    with pytest.raises(InputError, match="token by token"):
        check_modules(found.decoder, [EXACT], generates=True)
    check_modules(found.decoder, [EXACT], generates=False)
    found = describe(small_config("zaya", num_experts_per_tok=1).to_dict(), "config.json")
    assert found.decoder is not None
    assert [one.used for one in module_fallbacks(found.decoder, 4)] == ["as attention sees them"]


def test_fields_that_transformers_does_not_read_are_listed() -> None:
    fields = {**small_config("cohere2").to_dict(), "rope_tetha": 1e6, "torch_dtype": "float16"}
    found = describe(fields, "config.json", generic=True)
    assert found.unused == ("rope_tetha",)


def test_states_are_counted_as_transformers_keeps_them() -> None:
    """Layers 0 to 2 of 4: a convolution over 2 * 2 * 16 + 4 * 16 channels of 4 tokens in bfloat16,
    and 4 heads of 16 x 16 in float32; layer 3: 2 heads of 16, keys and values."""
    fields = small_config("qwen3_next").to_dict()
    decoder = describe(fields, "config.json", generic=True).decoder
    assert decoder is not None
    assert state_bytes(decoder) == 3 * (2 * 128 * 4 + 4 * 4 * 16 * 16)
    found = kv_bytes(EXACT, decoder, on_cpu())
    assert found == {str(at): 2 * 2 * 2 * 16 + 15_360 / at for at in (4096, 32_768)}
    fields = small_config("minimax").to_dict()  # whose cache is its own
    decoder = describe(fields, "config.json", generic=True).decoder
    assert decoder is not None and state_bytes(decoder) is None
    assert kv_bytes(EXACT, decoder, on_cpu()) is None
