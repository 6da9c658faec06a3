"""The baselines: right in what they compute, and measured without loading what they oppose."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from checkpoint_builders import LAYERS, VOCAB, tiny_checkpoint
from family_builders import SMALL, decoder_of, tensors_of, written

import layersweep
from layersweep.bench import peers
from layersweep.bench.sync_nf4 import LoadedWeight, SyncNf4
from layersweep.checkpoint import open_checkpoint, read_config
from layersweep.cli.bench import measured_peer
from layersweep.errors import InputError, LayersweepError
from layersweep.families.weights import layer_blocks

CPU = torch.device("cpu")
IDS = [int(token) for token in torch.randint(VOCAB, (48,), generator=torch.manual_seed(0))]
needs_opponent = pytest.mark.skipif(
    find_spec(name=peers.OPPONENT) is None, reason=f"{peers.OPPONENT} is not installed"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("peers") / "model")


@pytest.mark.parametrize(
    ("weights", "nested", "router"),
    [("nf4", True, "nf4"), ("nf4", False, "float"), ("bf16", True, "float")],
)
def test_synchronous_nf4_computes_what_layersweep_computes(
    tmp_path: Path, weights: str, nested: bool, router: str
) -> None:
    folder = tiny_checkpoint(tmp_path / "model", weights=weights, nested=nested, router=router)
    peer = SyncNf4(open_checkpoint(str(folder)), CPU, LAYERS)
    logits = peer.logits(IDS)
    assert (logits.dtype, logits.shape) == (torch.float32, (len(IDS), VOCAB))
    chosen = logits[:-1].log_softmax(-1).gather(1, torch.tensor(IDS[1:])[:, None])[:, 0]
    (own,) = layersweep.load(str(folder), device="cpu").score([IDS])
    torch.testing.assert_close(chosen, own, rtol=0, atol=1e-4)


def test_synchronous_nf4_is_scaled_to_the_full_depth(folder: Path) -> None:
    result = peers.measure_sync_nf4(folder, "cpu", LAYERS, 16, vram_cap=2**30)
    times = result.detail["seconds_per_layer"]
    assert isinstance(times, list)
    assert len(times) == LAYERS * peers.MEASURED_PASSES
    assert LAYERS * min(times) <= result.seconds_per_pass <= LAYERS * max(times)
    assert (result.layers, result.layers_measured, result.tokens) == (LAYERS, LAYERS, 16)
    weights = open_checkpoint(str(folder)).weights
    layer = [weight for name, weight in weights.items() if name.startswith("layers.0.")]
    # the JSON and the table of levels stay behind
    unread = sum(weight.storage.other_nbytes for weight in layer)
    assert result.bytes_per_pass == LAYERS * (sum(weight.nbytes for weight in layer) - unread)
    json.dumps(result.detail)


@pytest.mark.parametrize("layers", [0, LAYERS + 1])
def test_layers_that_are_not_there(folder: Path, layers: int) -> None:
    with pytest.raises(InputError, match=f"found {layers}, needed 1 to {LAYERS}"):
        peers.measure_sync_nf4(folder, "cpu", layers, 16, vram_cap=2**30)


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("nested", [True, False])
def test_bitsandbytes_decodes_the_same_tensors(tmp_path: Path, nested: bool) -> None:
    checkpoint = open_checkpoint(str(tiny_checkpoint(tmp_path / "model", nested=nested)))
    # blocks end with rows here: across rows its CPU kernel is wrong where there is AVX-512
    weight = checkpoint.weights["layers.0.experts.0.gate_proj"]
    assert weight.shape[1] % 64 == 0
    loaded = LoadedWeight.read(weight)
    own = loaded.dense(torch.float32, bitsandbytes=False)
    assert torch.equal(loaded.dense(torch.float32, bitsandbytes=True), own)


def fields_of(folder: Path) -> dict[str, object]:
    return json.loads((folder / "config.json").read_text())


@needs_opponent
def test_cpu_offload_is_measured_in_a_child(folder: Path) -> None:
    fields = fields_of(folder) | {"num_hidden_layers": 32}
    result = peers.measure_cpu_offload(fields, decoder_of("mixtral", fields), "cpu", 2, 24, 2**30)
    seconds = result.detail["seconds"]
    assert isinstance(seconds, list)
    assert result.seconds_per_pass == pytest.approx(sum(seconds) / 2 / 2 * 32)
    decoder = read_config(folder)
    values = sum(block.elements for block in layer_blocks(decoder, 0))
    assert result.bytes_per_pass == 32 * 4 * values
    assert result.detail["finite"] is True
    json.dumps(result.detail)


@needs_opponent
def test_what_the_child_says_last_is_passed_on(folder: Path) -> None:
    with pytest.raises(LayersweepError, match=r"ended with 1: RuntimeError: .* nowhere"):
        peers.measure_cpu_offload(fields_of(folder), read_config(folder), "nowhere", 1, 8, 2**30)


def test_without_the_opponent_it_is_asked_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="needed it to measure this peer"):
        peers.measure_cpu_offload(fields_of(folder), read_config(folder), "cpu", 1, 8, 2**30)


def test_a_peer_that_does_not_run_a_model_is_left_out_and_says_why(tmp_path: Path) -> None:
    """One peer runs Mixtral alone; the other lets a few layers stand for all."""
    fields = {**SMALL, "model_type": "gpt_oss", "num_local_experts": 4, "num_experts_per_tok": 2}
    folder = written(tmp_path, fields, tensors_of("gpt_oss", fields))
    decoder = open_checkpoint(folder).decoder
    measures = (
        lambda: peers.measure_sync_nf4(folder, "cpu", 2, 16, vram_cap=2**30),
        lambda: peers.measure_cpu_offload(fields, decoder, "cpu", 2, 16, vram_cap=2**30),
    )
    assert [measured_peer("peer", measure) for measure in measures] == [
        {"job": "peer", "name": "peer", "left_out": why}
        for why in (
            "found gpt_oss, needed mixtral, which is what people ran so",
            "gpt_oss: found 2 kinds of layers, needed layers that are known to be alike: a few of "
            "them stand for all",
        )
    ]


def test_this_process_never_loads_the_opponent() -> None:
    code = "import layersweep.bench.peers, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {peers.OPPONENT, "transformers"} & set(done.stdout.split())
