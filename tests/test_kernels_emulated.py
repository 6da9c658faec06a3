"""The CUDA sources, run on the CPU as C++ (tests/cuda_on_cpu), against plain-torch oracles."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import kernel_checks as check
import pytest
import router_checks
import torch
from capped_checks import check_capped
from checkpoint_builders import tiny_checkpoint
from cuda_on_cpu.emulated import COMPILER, Workshop
from format_checks import NAMES, check_format
from half_search import half_search
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from layersweep.checkpoint.storage.ggml import DECODED
from layersweep.kernels import KernelError, Kernels, load_kernels
from layersweep.kernels.codecs import Launcher
from layersweep.kernels.runtime import Argument
from layersweep.kv import sinks, trellis
from layersweep.kv.arms import EXACT, parse
from layersweep.kv.lloyd_tables import POSITIVE_LEVELS
from layersweep.kv.store import KvStore
from layersweep.kv.stream import keys_and_values
from layersweep.model.attention import Rule
from layersweep.model.ops import CudaOps, TorchOps
from layersweep.stream import shapes
from layersweep.sweep.dense import DenseWeights
from layersweep.sweep.model import load
from layersweep.sweep.sequences import Branch, BranchedSequence, tiles_of

pytestmark = pytest.mark.skipif(COMPILER is None, reason="g++ is not installed")

CPU = torch.device("cpu")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Head sizes: powers of two, sums of several, and an odd part whose tree of sums is ragged.
DIMS = ((0, 128), (1, 80), (2, 64), (0, 8), (1, 120), (2, 256), (0, 24))

# Rows of codes whose bytes come 16, 4 or 1 at a time; halves that are no multiple of 8.
TRELLIS_DIMS = (
    (0, 128), (1, 80), (2, 64), (1, 8), pytest.param(0, 256, marks=pytest.mark.slow),
)  # fmt: skip


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    dims = [(DTYPES[scalar], dim) for scalar, dim in DIMS]
    return Workshop(tmp_path_factory.mktemp("kernels"), dims)


@pytest.fixture(params=DTYPES, ids=str)
def kernels(request: pytest.FixtureRequest, workshop: Workshop) -> Kernels:
    return workshop.kernels(request.param)


class Noted:
    """Kernels of a source whose launches are noted by name."""

    def __init__(self, module: Launcher, launches: list[str]) -> None:
        self._module, self._launches = module, launches

    def launch(
        self, name: str, grid: tuple[int, int, int], block: int, args: Sequence[Argument]
    ) -> None:
        self._launches.append(name)
        self._module.launch(name, grid, block, args)


@pytest.fixture
def seed() -> int:
    chosen = random.SystemRandom().randrange(2**31)
    print(f"seed {chosen}")
    return chosen


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("shape", [(64, 384), (1, 1), (3, 5), (7, 67), (33, 259), (8193,)], ids=str)
def test_nf4(kernels: Kernels, shape: tuple[int, ...], nested: bool, seed: int) -> None:
    check.check_nf4(kernels, CPU, shape, seed, nested=nested)


@settings(max_examples=25, deadline=None)
@given(
    count=st.integers(1, 3000),
    blocksize=st.sampled_from((2, 8, 16, 24, 64, 100, 128, 4096)),
    nested=st.booleans(),
    offset_bytes=st.integers(0, 5),
    seed=st.integers(0, 2**31),
)
def test_nf4_of_any_block_size_and_alignment(
    workshop: Workshop, count: int, blocksize: int, nested: bool, offset_bytes: int, seed: int
) -> None:
    kernels = workshop.kernels(DTYPES[seed % 3])
    check.check_nf4(kernels, CPU, (count,), seed, blocksize, nested, offset_bytes)


@pytest.mark.parametrize("parts", [1, 5, 40])
def test_nf4_of_weights_that_lie_alike(kernels: Kernels, parts: int, seed: int) -> None:
    check.check_nf4_alike(kernels, CPU, (24, 136), parts, seed)


@pytest.mark.parametrize("nested", [True, False])
def test_a_group_of_experts_is_decoded_by_one_launch_for_each_key(
    nested: bool, workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(str(tiny_checkpoint(tmp_path, nested=nested)), device="cpu")
    monkeypatch.setattr(shapes, "experts_at_once", lambda *shape, cpu: 3)
    emulated = workshop.kernels(torch.float32)
    launches: list[str] = []
    module = emulated._module("nf4")
    monkeypatch.setattr(emulated, "_module", lambda name: Noted(module, launches))
    experts = [at for at, spec in enumerate(model.specs) if spec.role == "expert"]
    one = BranchedSequence((1,), (Branch(EXACT, (2,), (0, 1)),))
    engine = model.open(model.plan(tiles_of("t", [one], 1)))
    dense = {
        ops: DenseWeights(model.decoder, replace(model.compute, ops=ops))
        for ops in (TorchOps(), CudaOps(emulated, CPU))
    }
    with engine.store.sweep():
        for group in (experts[:3], experts[3:4]):  # a layer has four
            for weights in dense.values():
                weights.fill_feeds([engine.store.get(at) for at in group])
            plain, together = (weights.feeds for weights in dense.values())
            assert len(plain["gate_up_proj"]) == len(group)
            assert all(torch.equal(together[key], plain[key]) for key in plain)
    engine.close()
    assert launches == ["nf4_alike"] * 3  # of the group; the store decodes what comes alone


@pytest.mark.parametrize("kind", DECODED)
def test_ggml(workshop: Workshop, kind: str, seed: int) -> None:
    kernels = workshop.kernels(torch.float16)  # one source of 13 kernels takes 3 s to compile
    check.check_ggml(kernels, CPU, kind, seed)
    check.check_ggml(kernels, CPU, kind, seed, head=8)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("rows", "columns"), [(72, 96), (8, 224)])
def test_format(workshop: Workshop, name: str, rows: int, columns: int, seed: int) -> None:
    kernels = workshop.kernels(torch.float16)  # each dtype of three sources takes 3 s to compile
    check_format(kernels, CPU, name, rows, columns, seed)


@pytest.mark.parametrize("width", [8, 248, 256, 1032, 2304])
def test_rms_norm(kernels: Kernels, width: int, seed: int) -> None:
    check.check_rms_norm(kernels, CPU, 7, 5, width, seed)


@pytest.mark.parametrize("inner", [8, 264, 2056])
def test_swiglu(kernels: Kernels, inner: int, seed: int) -> None:
    check.check_swiglu(kernels, CPU, 5, inner, seed)


@pytest.mark.parametrize("inner", [8, 264, 2056])
def test_activations(kernels: Kernels, inner: int, seed: int) -> None:
    check.check_activations(kernels, CPU, 3, inner, seed)


@pytest.mark.parametrize("width", [8, 264, 2056])
def test_add_rows(kernels: Kernels, width: int, seed: int) -> None:
    check.check_add_rows(kernels, CPU, 9, 6, width, seed)


@pytest.mark.parametrize("width", [8, 264])
def test_add_places(kernels: Kernels, width: int, seed: int) -> None:
    check.check_add_places(kernels, CPU, 9, 6, 3, width, seed)


# Fewer experts than a warp has lanes, than a block has threads, and more; each is compiled.
EXPERTS = {7: torch.float16, 60: torch.bfloat16, 300: torch.float16}


@pytest.mark.parametrize("experts", EXPERTS)
def test_choose_experts(workshop: Workshop, experts: int, seed: int) -> None:
    kernels = workshop.kernels(EXPERTS[experts])
    for router in router_checks.ROUTERS:
        router_checks.check_choose_experts(kernels, CPU, 9, experts, router, seed)


def test_choose_experts_at_edges(workshop: Workshop) -> None:
    router_checks.check_choose_experts_at_edges(workshop.kernels(EXPERTS[60]), CPU, 60)


@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(0, 900) | st.sampled_from((255, 256, 257, 512)),
    experts=st.sampled_from(tuple(EXPERTS)),
    per_token=st.integers(1, 16),
    seed=st.integers(0, 2**31),
)
def test_sort_by_expert(
    workshop: Workshop, rows: int, experts: int, per_token: int, seed: int
) -> None:
    kernels = workshop.kernels(EXPERTS[experts])
    router_checks.check_sort_by_expert(kernels, CPU, rows, experts, min(per_token, experts), seed)


@pytest.mark.parametrize("width", [8, 264, 2056])
def test_leave_layer(kernels: Kernels, width: int, seed: int) -> None:
    check.check_leave_layer(kernels, CPU, 10, width, seed)


@pytest.mark.parametrize(
    "shape",
    [(2, 3, 37, 128), (1, 2, 5, 80), (2, 1, 3, 24), (1, 1, 300, 2), (2, 2, 3, 256)],
    ids=str,
)
def test_rope(kernels: Kernels, shape: tuple[int, int, int, int], seed: int) -> None:
    check.check_rope(kernels, CPU, shape, seed)


@pytest.mark.parametrize(
    "scalar, shape, rule, masked",
    [
        (0, (1, 2, 1, 66, 70, 40), Rule(0.3, softcap=2.0), False),
        (0, (1, 1, 1, 3, 134, 40), Rule(window=66, softcap=2.0), False),
        (2, (2, 2, 2, 1, 1, 24), Rule(softcap=2.0), False),
        (2, (1, 2, 1, 5, 66, 24), Rule(softcap=2.0), True),
    ],
    ids=str,
)
def test_capped_attention(
    workshop: Workshop, scalar: int, shape: tuple[int, int, int, int, int, int], rule: Rule,
    masked: bool, seed: int,
) -> None:  # fmt: skip
    check_capped(workshop.kernels(DTYPES[scalar]), CPU, shape, rule, seed, masked)


@pytest.mark.parametrize("bits", POSITIVE_LEVELS)
@pytest.mark.parametrize("scalar, dim", DIMS)
def test_lloyd(workshop: Workshop, scalar: int, dim: int, bits: int, seed: int) -> None:
    count = 37 if bits in (3, 6) else 5  # more than the 32 vectors of a block, or a part of one
    check.check_lloyd(workshop.kernels(DTYPES[scalar]), CPU, count, dim, bits, seed)


def test_lloyd_of_nonfinite_vectors(workshop: Workshop) -> None:
    check.check_lloyd_nonfinite(workshop.kernels(torch.float16), CPU, 128)
    check.check_lloyd_nonfinite(workshop.kernels(torch.bfloat16), CPU, 80)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("window", [8, 10])
@pytest.mark.parametrize("scalar, dim", TRELLIS_DIMS)
def test_trellis(
    workshop: Workshop, scalar: int, dim: int, window: int, bits: int, seed: int
) -> None:
    if dim * bits < window:
        pytest.skip("fewer bits than a state has")
    kernels = workshop.kernels(DTYPES[scalar])
    count = 9 if bits == 3 else 6  # more than the 8 vectors of a block, or whole blocks of 2
    check.check_trellis(kernels, CPU, count, dim, bits, window, seed)
    check.check_trellis(kernels, CPU, 3, dim, bits, window, seed, ties=True)


@pytest.mark.parametrize("scalar, dim", TRELLIS_DIMS)
def test_trellis_scale(workshop: Workshop, scalar: int, dim: int, seed: int) -> None:
    check.check_trellis_scale(workshop.kernels(DTYPES[scalar]), CPU, dim, seed)


@settings(max_examples=15, deadline=None)
@given(
    batch=st.integers(1, 2),
    heads=st.integers(1, 2),
    tokens=st.integers(1, 1100) | st.sampled_from((63, 64, 512, 1023, 1024, 2047, 4097)),
    dim=st.sampled_from((8, 24, 32, 40, 128)),
    seed=st.integers(0, 2**31),
)
def test_column_sums(
    workshop: Workshop, batch: int, heads: int, tokens: int, dim: int, seed: int
) -> None:
    kernels = workshop.kernels(DTYPES[seed % 3])
    check.check_column_sums(kernels, CPU, (batch, heads, tokens, dim), seed)
    check.check_mean_and_level(kernels, CPU, (batch, heads, tokens, dim), seed)


@pytest.mark.parametrize(
    "shape", [(2, 8, 37, 64), (1, 3, 8, 24), (1, 1, 1, 8), (2, 5, 9, 40)], ids=str
)
def test_sinks(kernels: Kernels, shape: tuple[int, int, int, int], seed: int) -> None:
    check.check_sinks(kernels, CPU, shape, seed)


def test_a_cache_whose_sinks_kernels_move_is_that_of_torch(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels move them in place: what is appended, shared by arms or coded again is left alone."""
    x = torch.randn(2, 45, 2, 64)
    x[:, 20] = x[:, 0] + 0.1
    k, v = x.transpose(1, 2), x.transpose(1, 2).clone()
    arms = ("K3V2@fine=16", "K3V2", "K2V2@sink=0", "K2V2@sink=0@fine=8")
    given = [(parse(f"trellis:{arm}@found=1"), keys_and_values(2, 64)) for arm in arms]

    def decoded() -> list[Tensor]:
        store = KvStore.empty(given, 0, 1, mean_tokens=20)
        for start, stop in ((0, 30), (30, 31), (31, 45)):
            store = store.appended((k[:, :, start:stop], v[:, :, start:stop]))
        return [one for arm in range(len(arms)) for one in store.decoded(arm)]

    wanted = decoded()
    monkeypatch.setattr(sinks, "_kernels_for", lambda x: workshop.kernels(torch.float32))
    assert all(map(torch.equal, decoded(), wanted))


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_trellis_codec(workshop: Workshop, bits: int, seed: int) -> None:
    check.check_trellis_codec(workshop.kernels(torch.float32), CPU, bits, seed)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_half_numbers_find_codes_as_good(bits: int) -> None:
    """Of 512 vectors; measured on 8192: within 0.005 %."""
    code = trellis.Code(8, bits)
    u_DN, levels = check.draw(bits, 64, 512, device=CPU), code.levels(CPU)
    half, full = (
        (trellis._trellis_values(search(u_DN, levels, bits), code) - u_DN).square().mean()
        for search in (half_search, trellis.search)
    )
    assert abs(half / full - 1) < 0.001


def test_trellis_of_nonfinite_vectors(workshop: Workshop) -> None:
    check.check_trellis_nonfinite(workshop.kernels(torch.float16), CPU, 128)


@pytest.mark.parametrize(
    "vocabulary, arms", [(1, 2), (31, 0), (1000, 1), (8193, 4), (8192, 3), (17003, 6)]
)
def test_score(workshop: Workshop, vocabulary: int, arms: int, seed: int) -> None:
    check.check_score(workshop.kernels(torch.float32), CPU, 4, vocabulary, arms, seed)


def test_score_of_confident_rows(workshop: Workshop, seed: int) -> None:
    check.check_score_of_confident_rows(workshop.kernels(torch.float32), CPU, seed)


def test_score_at_edges(workshop: Workshop) -> None:
    check.check_score_edges(workshop.kernels(torch.float16), CPU)


def test_nothing_to_do_is_no_launch(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[str] = []
    monkeypatch.setattr(kernels, "_module", lambda name, dim=0: launched.append(name))
    none = torch.empty(0, 16, dtype=kernels.dtype)
    index = torch.empty(0, dtype=torch.int64)
    kernels.rms_norm(none, torch.ones(16, dtype=kernels.dtype), 1e-5, none, index)
    kernels.swiglu_(none)
    kernels.add_rows_(none, index, none, torch.empty(0))
    kernels.choose_experts(none, 2, over_chosen=False, normalize=True, scale=1.0, rounds=False)
    shares = torch.empty(0, 2)
    assert kernels.sort_by_expert(shares.int(), shares, 3)[2].tolist() == [0, 0, 0]
    assert launched == []


def test_kernels_need_a_gpu() -> None:
    with pytest.raises(KernelError, match="CUDA device"):
        load_kernels(CPU, torch.float16)
