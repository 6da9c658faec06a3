"""The engine on a real GPU: every placement gives the same bits, budgets hold, old paths work.

python -m pytest -m gpu
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from stepped import in_one_pass, stepped, texts
from studies import needle_of, perplexity_of
from test_stream import a_file
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import layersweep
from layersweep.checkpoint.synth import write_synthetic
from layersweep.checkpoint.synth_shapes import MIXTRAL_8X7B
from layersweep.environment import DEVICE_RESERVE, Budget
from layersweep.errors import Fallback, GateError, MachineError
from layersweep.kernels import KernelError, Kernels
from layersweep.kv import parse
from layersweep.kv.arms import EXACT
from layersweep.model.attention import (
    FlashAttention,
    MemoryEfficientAttention,
    PlainAttention,
)
from layersweep.model.compute import choose_compute
from layersweep.stream.plan import host_ring_bytes, place
from layersweep.stream.runs import Placement, compute_ring, runs_of
from layersweep.stream.store import BlockStore
from layersweep.study.run import Outcome, StudyRun, run_study
from layersweep.study.study import Study, prepare_study
from layersweep.sweep.caches import KeptCaches, cache_memory
from layersweep.sweep.engine import Engine
from layersweep.sweep.loop import run_sweep
from layersweep.sweep.model import Model, load
from layersweep.sweep.record import Pieces, joined
from layersweep.sweep.sequences import Branch, BranchedSequence, Tile, tiles_of
from layersweep.tasks.settings import EvalSettings

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda:0")
GIB = 2**30
# 6 layers of 8 experts, wide enough that a run is one or two experts
WIDE = MIXTRAL_8X7B.with_fields(
    {
        "vocab_size": 4096, "hidden_size": 2048, "intermediate_size": 7168,
        "num_hidden_layers": 6, "num_attention_heads": 16, "num_key_value_heads": 4,
    }
)  # fmt: skip


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wide") / "model"
    write_synthetic(folder, WIDE)
    return folder


@pytest.fixture(autouse=True)
def fresh_peak() -> Iterator[None]:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    yield
    torch.cuda.set_per_process_memory_fraction(1.0, CUDA)


def rides(count: int, vocab: int, prefix: int = 300, length: int = 100) -> list[BranchedSequence]:
    found = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        ids = tuple(torch.randint(0, vocab, (prefix + length,), generator=generator).tolist())
        arms = [EXACT, parse("lloyd:K3V2"), parse("e8:K4V2"), EXACT]
        branches = tuple(Branch(arm, ids[prefix:], (0, length - 1)) for arm in arms)
        found.append(BranchedSequence(ids[:prefix], branches))
    return found


def logits_of(
    model: Model, tiles: list[Tile], placement: Placement, sweeps: int
) -> tuple[dict[int, list[Tensor]], BlockStore]:
    found: dict[int, list[Tensor]] = {}

    def read(tile: Tile, number: int, sequence: BranchedSequence, pieces: Pieces) -> None:
        found[tile.first + number] = joined(pieces)

    store = BlockStore(model.specs, placement, CUDA, decode=model.compute.ops.decode)
    engine = Engine(model.checkpoint.decoder, store, model.compute, model.plan(tiles).scratch)
    for number in range(sweeps):
        run_sweep(engine, tiles[number::sweeps], read)
    engine.close()
    return found, store


def placements(model: Model) -> dict[str, tuple[Placement, int]]:
    """name -> placement and number of sweeps."""
    runs = runs_of(model.specs)
    everything, ring = frozenset(range(len(runs))), min(compute_ring(runs), 2 * GIB)
    host_ring = host_ring_bytes(runs, model.machine)
    none: frozenset[int] = frozenset()
    odd = frozenset(range(1, len(runs), 2))
    return {
        "from disk, one sweep": (Placement(none, none, ring, host_ring), 1),
        "from disk, four sweeps": (Placement(none, none, ring, host_ring, drop_cache=True), 4),
        "host store": (Placement(none, everything, ring, host_ring), 4),
        "on the device": (Placement(everything, none, ring, host_ring), 4),
        "half and half": (Placement(odd, everything - odd, ring, host_ring), 2),
    }


def test_every_placement_gives_the_same_bits(wide: Path) -> None:
    model = load(str(wide), device="cuda")
    tiles = tiles_of("t", rides(8, WIDE.fields["vocab_size"]), 2)
    expected, stored = None, sum(spec.stored_bytes for spec in model.specs)
    for name, (placement, sweeps) in placements(model).items():
        found, store = logits_of(model, tiles, placement, sweeps)
        expected = expected or found
        for index, parts in expected.items():
            pairs = zip(parts, found[index], strict=True)
            assert all(torch.equal(a, b) for a, b in pairs), (name, index)
        again = sweeps if name.startswith("from disk") else 1
        assert store.bytes_read == again * stored, name
        copies = {"on the device": 1, "half and half": 0}.get(name, sweeps)
        whole = sum(run.nbytes for run in store.runs)
        assert not copies or store.h2d_bytes == copies * whole
        assert store.fallbacks == []


@pytest.mark.parametrize("capability", [None, "7.5"])
def test_a_token_at_a_time_is_one_pass(wide: Path, capability: str | None) -> None:
    model = load(str(wide), vram="8GiB", device="cuda:0", assume_capability=capability)
    arms = [EXACT, parse("K3V2"), parse("K4V2"), parse("e8:K4V2@window=9")]
    given = texts([(300, 20), (280, 31), (280, 31)], len(arms), 4, 4096, 0)
    placement, _ = placements(model)["on the device"]
    store = BlockStore(model.specs, placement, CUDA, decode=model.compute.ops.decode)
    engine = Engine(model.checkpoint.decoder, store, model.compute, 2**28)
    expected = in_one_pass(engine, given, arms).log_softmax(-1)
    found = stepped(engine, given, arms, KeptCaches(4))
    distance = (found.log_softmax(-1) - expected).norm(dim=-1) / expected.norm(dim=-1)
    # nearly all: a token whose experts are a close call may be sent to another one
    assert distance.isfinite().all() and distance.flatten().quantile(0.9) < 1e-3
    for room in (2**28, 2**20):  # the smaller one holds a part of them
        said: list[Fallback] = []
        memory = cache_memory(room, pin=True, say=said.append)
        for _ in range(2):  # and again where others' caches were
            caches = KeptCaches(4, memory)
            assert torch.equal(stepped(engine, given, arms, caches), found)
            assert caches.moved_bytes > 0 and not said
        memory.close()
    engine.close()


def test_blocks_survive_a_busy_ring(tmp_path: Path) -> None:
    """Random sizes through a small ring while kernels still use what is to be overwritten."""
    sizes = [2_000_000 + 2 * 4999 * index for index in range(90)]
    specs, contents = a_file(tmp_path, sizes)
    runs = runs_of(specs)
    placement = Placement(
        frozenset(), frozenset(), compute_ring(runs), 2 * max(r.nbytes for r in runs)
    )
    store = BlockStore(specs, placement, CUDA)
    busy = torch.randn(4096, 4096, device=CUDA)
    sums = []
    for _ in range(3):
        with store.sweep():
            for index in range(len(specs)):
                arena = store.get(index).arena
                busy = busy @ busy * 1e-3  # the stream is late: the ring must wait for it
                sums.append(arena.view(torch.int16).long().sum())
                store.release(index)
    expected = [
        int(np.frombuffer(content, np.int16).astype(np.int64).sum()) for content in contents
    ]
    assert [int(total) for total in sums] == expected * 3
    store.close()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_attention_kernels_agree_with_the_dense_mask(dtype: torch.dtype) -> None:
    plain = PlainAttention()
    kernels = [MemoryEfficientAttention()]
    if dtype != torch.float32:
        kernels.append(FlashAttention())
    for queries, keys in ((200, 200), (60, 700), (1, 300)):
        q = torch.randn(3, 16, queries, 128, device=CUDA, dtype=dtype)
        k, v = (torch.randn(3, 4, keys, 128, device=CUDA, dtype=dtype) for _ in range(2))
        mask = torch.rand(queries, keys, device=CUDA) < 0.5
        mask[:, 0] = True
        for look in (None, mask):
            expected = plain(q.double(), k.double(), v.double(), look)
            for kernel in kernels:
                compute = replace(choose_compute(CUDA, dtype), attention=kernel)
                with compute.numerics():
                    found = kernel(q, k, v, look)
                error = (found.double() - expected).abs().max()
                assert error < {torch.float32: 1e-4, torch.float16: 2e-3}.get(dtype, 2e-2), kernel


def test_the_math_kernel_is_an_error_and_never_a_fallback() -> None:
    compute = choose_compute(CUDA, torch.float16)
    q = torch.randn(1, 4, 8, 64, device=CUDA, dtype=torch.float64)  # no fused kernel takes it
    with compute.numerics(), pytest.raises(RuntimeError):
        FlashAttention()(q, q, q, None)


def test_precision_switches_are_off_inside_and_as_before_outside() -> None:
    compute = choose_compute(CUDA, torch.float16)
    matmul = torch.backends.cuda.matmul
    matmul.allow_fp16_reduced_precision_reduction = True
    torch.set_float32_matmul_precision("high")
    with compute.numerics():
        assert not matmul.allow_fp16_reduced_precision_reduction
        assert torch.get_float32_matmul_precision() == "highest"
    assert matmul.allow_fp16_reduced_precision_reduction
    assert torch.get_float32_matmul_precision() == "high"
    torch.set_float32_matmul_precision("highest")


SMALL = EvalSettings(
    kv="lloyd:K3V2,lloyd:K4V2", segments=20, niah_depths=(0.2, 0.8), niah_per_depth=2
)


def measured(model: Model, settings: EvalSettings) -> tuple[Study, Outcome]:
    study = prepare_study(model, settings)
    return study, run_study(study)


def nll(study: Study) -> dict[str, np.ndarray]:
    return perplexity_of(study).numbers.nll


def test_cpu_and_gpu_agree_on_the_bundled_model() -> None:
    cpu, _ = measured(layersweep.load("demo", device="cpu"), SMALL)
    single, _ = measured(layersweep.load("demo", device="cuda", dtype="float32"), SMALL)
    half, outcome = measured(layersweep.load("demo", device="cuda"), SMALL)
    # float32: another order of additions, nothing else. KV codes at a boundary may flip.
    for arm in nll(cpu):
        apart = {name: nll(study)[arm] - nll(cpu)[arm] for name, study in
                 (("float32", single), ("float16", half))}  # fmt: skip
        print(arm, {n: (float(d.mean()), float(np.abs(d).max())) for n, d in apart.items()})
        assert np.abs(apart["float32"]).max() < 2e-3, arm
    assert np.abs(nll(single)["exact"] - nll(cpu)["exact"]).max() < 1e-4
    # Deltas: in float32 within the noise floor that the float16 run reports; in float16, where
    # keys near a boundary are coded differently, within the error of the windows' mean.
    floor = np.abs(perplexity_of(half).numbers.control_delta["identity:lloyd"]).max()
    for arm in ("lloyd:K3V2", "lloyd:K4V2"):
        deltas = [nll(study)[arm] - nll(study)["exact"] for study in (cpu, single, half)]
        apart = [delta - deltas[0] for delta in deltas[1:]]
        sem = apart[1].std(ddof=1) / len(apart[1]) ** 0.5
        print(f"{arm}: mean deltas {[float(d.mean()) for d in deltas]} (CPU, float32, float16), "
              f"float16 - CPU SEM {sem:.2e}, noise floor {floor:.2e} nats")  # fmt: skip
        assert abs(apart[0].mean()) < floor
        assert abs(apart[1].mean()) < 2 * sem
    assert perplexity_of(half).numbers.control_delta["exact"].tolist() == [0.0] * 4
    assert needle_of(half).numbers.correct == needle_of(cpu).numbers.correct
    assert outcome.peak_device_bytes <= half.plan.device_bytes


def test_a_study_repeats_bit_for_bit_in_one_sweep_or_several() -> None:
    model = layersweep.load("demo", device="cuda", vram="4GiB")
    settings = replace(SMALL, segments=80, tasks=("ppl",))
    first, one = measured(model, settings)
    again, _ = measured(model, settings)
    less = first.plan.device_bytes - first.plan.peaks["hidden states"] // 2
    small = replace(model, vram=Budget(less, "test"))
    several, outcome = measured(small, settings)
    assert one.sweeps == 1 and outcome.sweeps >= 2
    for arm in nll(first):
        assert np.array_equal(nll(first)[arm], nll(again)[arm])
        assert np.array_equal(nll(first)[arm], nll(several)[arm])


def test_memory_that_ends_in_the_middle_halves_the_tiles_of_a_sweep() -> None:
    """The allocator gets no more than it has, in layer 2; what is left of the run needs less."""
    settings = replace(SMALL, segments=80, tasks=("ppl",))
    whole, _ = measured(layersweep.load("demo", device="cuda", vram="4GiB"), settings)
    study = prepare_study(layersweep.load("demo", device="cuda", vram="4GiB"), settings)
    total = torch.cuda.get_device_properties(CUDA).total_memory
    told: list[Fallback] = []
    planned = study.plan.device_bytes

    def take(phase: str, done: int, total_visits: int) -> None:
        if done == 2 * (4 + 8) and not told:
            torch.cuda.empty_cache()
            held = torch.cuda.memory_reserved(CUDA)
            torch.cuda.set_per_process_memory_fraction(held / total, CUDA)

    with StudyRun(study, told.append) as run:
        outcome = run.measure(progress=take)
    assert [one.what for one in told] == ["device memory"] and told[0] in outcome.fallbacks
    assert outcome.sweeps == 2 and outcome.gate_sweeps == 0
    assert outcome.peak_device_bytes <= study.plan.device_bytes < planned
    for arm in nll(whole):
        assert np.array_equal(nll(whole)[arm], nll(study)[arm])


OTHER = """
import sys, torch
free, _ = torch.cuda.mem_get_info()
held = torch.empty(free - int(sys.argv[1]), dtype=torch.uint8, device="cuda")
print("held", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("fits", ["half of the tiles", "nothing"])
def test_another_process_takes_the_memory_that_was_planned(
    wide: Path, tmp_path: Path, fits: str
) -> None:
    """Between the plan and the run. Half of the tiles fit what it leaves, or not even one."""
    text = tmp_path / "text.txt"
    text.write_text("One sentence after another, and then some more of them. " * 30_000)
    settings = EvalSettings(kv="lloyd:K3V2", tasks=("ppl",), segments=160, text=str(text))
    model = load(str(wide), device="cuda", vram="14GiB")
    wanted, _ = measured(model, settings)
    study = prepare_study(model, settings)
    whole, context = study.plan.device_bytes, model.context_bytes
    keep = GIB // 2
    if fits != "nothing":
        half = whole - study.plan.peaks["hidden states"] // 2
        keep = half - context + DEVICE_RESERVE + GIB // 8
        assert keep < whole - context, (half, whole)
    torch.cuda.empty_cache()
    with subprocess.Popen(
        [sys.executable, "-c", OTHER, str(keep)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        told: list[Fallback] = []
        if fits == "nothing":
            with pytest.raises(MachineError, match="no smaller plan fits"), StudyRun(study) as run:
                run.measure()
        else:
            with StudyRun(study, told.append) as run:
                outcome = run.measure()
            print(told, study.plan.device_bytes, outcome.peak_device_bytes)
            assert told and outcome.sweeps >= 2
            for arm in nll(wanted):
                assert np.array_equal(nll(wanted)[arm], nll(study)[arm])
        assert other.stdin is not None
        other.stdin.close()


def test_an_older_card_takes_its_paths_and_stays_within_the_plan_at_4096_tokens(wide: Path) -> None:
    """sm_75: float16 without Triton, flash, cuDNN attention, enable_gqa or grouped products."""
    model = load(str(wide), device="cuda", assume_capability="7.5", vram="14GiB")
    assert (model.paths.attention, model.compute.dtype) == ("memory-efficient", torch.float16)
    total = torch.cuda.get_device_properties(CUDA).total_memory
    torch.cuda.set_per_process_memory_fraction(14 * GIB / total, CUDA)
    tiles = tiles_of("t", rides(4, WIDE.fields["vocab_size"], prefix=4036, length=60), 10)
    plan = model.plan(tiles)
    engine = model.open(plan)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        run_sweep(engine, tiles, lambda tile, number, sequence, logits: None)
    engine.close()
    names = {event.key.lower() for event in seen.key_averages()}
    for word in ("triton", "flash", "cudnn", "grouped_mm", "_scaled_dot_product_attention_math"):
        assert not [name for name in names if word in name], word
    assert [name for name in names if "fmha" in name or "efficient_attention" in name]
    peak = torch.cuda.max_memory_reserved(CUDA) + model.context_bytes
    print(f"peak {peak / GIB:.3f} GiB, planned {plan.device_bytes / GIB:.3f} GiB")
    assert peak <= plan.device_bytes


def test_old_and_new_paths_measure_the_same() -> None:
    models = [layersweep.load("demo", device="cuda", assume_capability=c) for c in (None, "7.5")]
    each = "8 dense experts at a time, a product each, all tiles"
    newest = torch.cuda.get_device_capability(CUDA) >= (8, 0)
    grouped = "grouped products in Triton, 8 at once" if newest else each
    assert [model.paths.experts for model in models] == [grouped, each]
    new, old = (nll(measured(model, SMALL)[0]) for model in models)
    for arm in new:
        assert np.abs(new[arm] - old[arm]).max() < 5e-3


def test_without_kernels_plain_torch_serves_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = replace(SMALL, niah_per_depth=1)
    with_kernels = nll(measured(layersweep.load("demo", device="cuda"), settings)[0])

    def missing(device: torch.device, dtype: torch.dtype) -> Kernels:
        raise KernelError("no libnvrtc.so.13")

    monkeypatch.setattr("layersweep.kernels.load_kernels", missing)
    model = layersweep.load("demo", device="cuda")
    (fallback,) = model.compute.fallbacks
    assert (fallback.used, fallback.why) == ("plain torch, slower", "no libnvrtc.so.13")
    study, outcome = measured(model, settings)
    assert study.fallbacks == [fallback]
    for arm, values in nll(study).items():
        assert np.abs(values - with_kernels[arm]).max() < 5e-3
    assert outcome.peak_device_bytes <= study.plan.device_bytes


def test_a_bad_layer_is_named_and_a_bad_baseline_ends_the_run(
    wide: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("One sentence after another, and then some more of them. " * 3000)
    settings = EvalSettings(kv="lloyd:K3V2", tasks=("ppl",), segments=4, prefix=64,
                            continuation=32, text=str(text), gate="off")  # fmt: skip
    study = prepare_study(load(str(wide), device="cuda"), settings)
    ops, visits = study.model.compute.ops, iter(range(100))
    leave = ops.leave_layer_

    def poisoned(hidden: Tensor, *rest: object) -> None:
        if next(visits) == 3:
            hidden[0] = float("nan")  # the first window's prefix, in layer 3
        leave(hidden, *rest)

    monkeypatch.setattr(ops, "leave_layer_", poisoned)
    with pytest.raises(
        GateError, match="perplexity 0: the exact baseline is not finite from layer 3"
    ):
        run_study(study)


def test_place_keeps_nothing_on_the_device_without_room(wide: Path) -> None:
    model = load(str(wide), device="cuda")
    runs = runs_of(model.specs)
    ring = host_ring_bytes(runs, model.machine)
    assert place(runs, model.machine, ring, room=0).device == frozenset()
