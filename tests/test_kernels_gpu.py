"""The CUDA kernels on a real GPU, at the sizes of a full model, against torch on that GPU."""

from __future__ import annotations

import random
import threading
from types import ModuleType

import kernel_checks as check
import pytest
import router_checks
import torch
from capped_checks import check_capped
from format_checks import NAMES, check_format
from grouped_checks import check_gathered_rows, check_grouped, check_rows_are_their_own
from half_search import half_search

from layersweep.checkpoint.storage.ggml import DECODED
from layersweep.families.spec import Router
from layersweep.kernels import Kernels, load_kernels
from layersweep.kv import lloyd, trellis
from layersweep.kv.lloyd_tables import POSITIVE_LEVELS
from layersweep.kv.stream import Stream
from layersweep.model.attention import Rule
from layersweep.model.ops import CudaOps

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

DEVICE = torch.device("cuda:0")


@pytest.fixture(params=[torch.float16, torch.bfloat16, torch.float32], ids=str)
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return load_kernels(DEVICE, request.param)


@pytest.fixture
def seed() -> int:
    chosen = random.SystemRandom().randrange(2**31)
    print(f"seed {chosen}")
    return chosen


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("shape", [(4096, 14336), (1024, 4096), (33, 259), (1, 1)], ids=str)
def test_nf4(kernels: Kernels, shape: tuple[int, ...], nested: bool, seed: int) -> None:
    check.check_nf4(kernels, DEVICE, shape, seed, nested=nested)


@pytest.mark.parametrize("blocksize, offset_bytes", [(100, 0), (64, 1), (4096, 4), (8, 0)])
def test_nf4_of_any_block_size_and_alignment(
    kernels: Kernels, blocksize: int, offset_bytes: int, seed: int
) -> None:
    check.check_nf4(kernels, DEVICE, (100_003,), seed, blocksize, True, offset_bytes)


@pytest.mark.parametrize("parts", [16, 5, 40])
def test_nf4_of_weights_that_lie_alike(kernels: Kernels, parts: int, seed: int) -> None:
    check.check_nf4_alike(kernels, DEVICE, (1536, 2048), parts, seed)


@pytest.mark.parametrize("kind", DECODED)
def test_ggml(kernels: Kernels, kind: str, seed: int) -> None:
    check.check_ggml(kernels, DEVICE, kind, seed)
    check.check_ggml(kernels, DEVICE, kind, seed, head=8)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("rows", "columns"), [(1032, 4096), (8, 224)])
def test_format(kernels: Kernels, name: str, rows: int, columns: int, seed: int) -> None:
    check_format(kernels, DEVICE, name, rows, columns, seed)


@pytest.mark.parametrize("width", [256, 4096, 8])
def test_rms_norm(kernels: Kernels, width: int, seed: int) -> None:
    check.check_rms_norm(kernels, DEVICE, 51200, 12800, width, seed)


@pytest.mark.parametrize("count, inner", [(2048, 14336), (100, 384)])
def test_swiglu(kernels: Kernels, count: int, inner: int, seed: int) -> None:
    check.check_swiglu(kernels, DEVICE, count, inner, seed)


@pytest.mark.parametrize("count, inner", [(2048, 2880), (100, 384)])
def test_activations(kernels: Kernels, count: int, inner: int, seed: int) -> None:
    check.check_activations(kernels, DEVICE, count, inner, seed)


@pytest.mark.parametrize("width", [4096, 256, 8])
def test_add_rows(kernels: Kernels, width: int, seed: int) -> None:
    check.check_add_rows(kernels, DEVICE, 51200, 12800, width, seed)


@pytest.mark.parametrize("width", [2048, 8])
def test_add_places(kernels: Kernels, width: int, seed: int) -> None:
    check.check_add_places(kernels, DEVICE, 5120, 128, 8, width, seed)


@pytest.mark.parametrize("router", router_checks.ROUTERS, ids=str)
@pytest.mark.parametrize("experts", [8, 32, 60, 128, 512])
def test_choose_experts(kernels: Kernels, experts: int, router: Router, seed: int) -> None:
    router_checks.check_choose_experts(kernels, DEVICE, 5_003, experts, router, seed)


def test_choose_experts_at_edges(kernels: Kernels) -> None:
    router_checks.check_choose_experts_at_edges(kernels, DEVICE, 40)


@pytest.mark.parametrize(
    "rows, experts, per_token", [(41_779, 128, 8), (41_779, 32, 4), (12_801, 8, 2), (700, 512, 16)]
)
def test_sort_by_expert(
    kernels: Kernels, rows: int, experts: int, per_token: int, seed: int
) -> None:
    router_checks.check_sort_by_expert(kernels, DEVICE, rows, experts, per_token, seed)


@pytest.mark.parametrize("width", [4096, 256, 8])
def test_leave_layer(kernels: Kernels, width: int, seed: int) -> None:
    check.check_leave_layer(kernels, DEVICE, 51200, width, seed)


@pytest.mark.parametrize("shape", [(8, 32, 513, 128), (2, 8, 100, 80), (2, 3, 50, 24)], ids=str)
def test_rope(kernels: Kernels, shape: tuple[int, int, int, int], seed: int) -> None:
    check.check_rope(kernels, DEVICE, shape, seed)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
def test_capped_attention(
    kernels: Kernels, dim: int, window: int | None, masked: bool, seed: int
) -> None:
    rule = Rule(0.1, None if masked else window, 4.0)
    check_capped(kernels, DEVICE, (2, 8, 2, 300, 701, dim), rule, seed, masked)


half_precision = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
needs_sm_80 = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0), reason="sm_75"
)


@needs_sm_80
@half_precision
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    "width, depth", [(1536, 2048), (2048, 768), (2880, 2880), (1000, 200), (72, 8)], ids=str
)
def test_grouped_products(
    width: int, depth: int, biased: bool, dtype: torch.dtype, seed: int
) -> None:
    check_grouped(DEVICE, dtype, (0, 1, 17, 3200, 128, 0, 129), width, depth, seed, biased)
    check_grouped(DEVICE, dtype, (32,) * 20, width, depth, seed, biased)


@needs_sm_80
@half_precision
def test_rows_of_grouped_products_are_their_own(dtype: torch.dtype, seed: int) -> None:
    check_rows_are_their_own(DEVICE, dtype, seed)


@needs_sm_80
@half_precision
@pytest.mark.parametrize("width, depth", [(1536, 2048), (2880, 2880), (1000, 200), (72, 8)])
def test_grouped_products_gather_rows(
    width: int, depth: int, dtype: torch.dtype, seed: int
) -> None:
    check_gathered_rows(DEVICE, dtype, (0, 1, 17, 3200, 128, 0, 129), width, depth, seed)
    check_gathered_rows(DEVICE, dtype, (32,) * 20, width, depth, seed)


@pytest.mark.parametrize("bits", POSITIVE_LEVELS)
@pytest.mark.parametrize("dim", [128, 64, 80, 120, 256])
def test_lloyd(kernels: Kernels, dim: int, bits: int, seed: int) -> None:
    check.check_lloyd(kernels, DEVICE, 20_011, dim, bits, seed)


def test_lloyd_of_nonfinite_vectors(kernels: Kernels) -> None:
    check.check_lloyd_nonfinite(kernels, DEVICE, 128)


@pytest.mark.parametrize("window", [8, 10])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("dim", [128, 64, 80, 96, 256])
def test_trellis(kernels: Kernels, dim: int, bits: int, window: int, seed: int) -> None:
    check.check_trellis(kernels, DEVICE, 1001, dim, bits, window, seed)
    check.check_trellis(kernels, DEVICE, 101, dim, bits, window, seed, ties=True)


@pytest.mark.parametrize("dim", [128, 64, 80, 96, 256])
def test_trellis_scale(kernels: Kernels, dim: int, seed: int) -> None:
    check.check_trellis_scale(kernels, DEVICE, dim, seed)


@pytest.mark.parametrize("tokens", [1, 63, 1020, 1024, 4091, 65537])
def test_column_sums(kernels: Kernels, tokens: int, seed: int) -> None:
    check.check_column_sums(kernels, DEVICE, (3, 8, tokens, 128), seed)
    check.check_column_sums(kernels, DEVICE, (1, 2, tokens, 80), seed)
    for dim in (128, 80, 256):
        check.check_mean_and_level(kernels, DEVICE, (3, 8, tokens, dim), seed)


@pytest.mark.parametrize(
    "shape", [(5, 8, 1020, 128), (3, 4, 77, 80), (2, 64, 9, 128), (1, 1, 1, 8)], ids=str
)
def test_sinks(kernels: Kernels, shape: tuple[int, int, int, int], seed: int) -> None:
    check.check_sinks(kernels, DEVICE, shape, seed)


def test_trellis_of_nonfinite_vectors(kernels: Kernels) -> None:
    check.check_trellis_nonfinite(kernels, DEVICE, 128)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("module", [lloyd, trellis])
def test_the_codec_uses_the_kernels_and_changes_nothing(
    module: ModuleType, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(2, 8, 1024, 128, device=DEVICE).to(dtype)
    positions = torch.arange(1024, device=DEVICE)
    codec = module.Lloyd(3, 2) if module is lloyd else module.Trellis(3, 2)
    stream, calls = Stream("key", 8, 128, "key", True), []
    real = module._kernels
    monkeypatch.setattr(module, "_kernels", lambda *key: calls.append(real(*key)) or calls[-1])
    fast = codec.encode(x.transpose(1, 2).contiguous().transpose(1, 2), stream, positions)
    decoded = codec.decode(fast, positions)
    assert len(calls) == 2 and None not in calls
    monkeypatch.setattr(module, "_kernels", lambda *key: None)
    monkeypatch.setattr(trellis, "search", half_search)
    slow = codec.encode(x, stream, positions)
    assert fast.scale is not None and slow.scale is not None
    assert torch.equal(fast.codes, slow.codes) and torch.equal(fast.scale, slow.scale)
    assert torch.equal(decoded, codec.decode(slow, positions))


@pytest.mark.parametrize("tokens, vocabulary, arms", [(511, 32000, 3), (64, 4097, 6)])
def test_score(kernels: Kernels, tokens: int, vocabulary: int, arms: int, seed: int) -> None:
    check.check_score(kernels, DEVICE, tokens, vocabulary, arms, seed)


def test_score_of_confident_rows(kernels: Kernels, seed: int) -> None:
    check.check_score_of_confident_rows(kernels, DEVICE, seed)


def test_a_bias_is_added_before_the_only_rounding(kernels: Kernels) -> None:
    """2049 + 1: with two roundings float16 makes it 2048, bfloat16 2048 either way."""
    weight = torch.full((16, 64), 32, dtype=kernels.dtype, device=DEVICE)
    weight[:, 0] = 33
    x, bias = torch.ones_like(weight[:1]).expand(40, 64).contiguous(), torch.ones_like(weight[:, 0])
    memory = x.new_empty(40, 16)
    for rows in (40, 1):
        own = memory[:rows]
        found = CudaOps(kernels, DEVICE).linear(x[:rows], weight, own, bias)
        assert found.data_ptr() == memory.data_ptr()
        assert found.eq(2048 if kernels.dtype == torch.bfloat16 else 2050).all()


def test_score_at_edges(kernels: Kernels) -> None:
    check.check_score_edges(kernels, DEVICE)


def test_a_new_thread_and_a_side_stream_may_launch(kernels: Kernels, seed: int) -> None:
    failures: list[BaseException] = []

    def work() -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream(DEVICE)):
                check.check_add_rows(kernels, DEVICE, 4096, 1024, 4096, seed)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_a_thread_without_a_context_may_launch(kernels: Kernels) -> None:
    update = torch.zeros(2, 8, dtype=kernels.dtype, device=DEVICE)
    y, rows = torch.ones_like(update), torch.arange(2, device=DEVICE)
    args = (update, rows, y, torch.ones(2, device=DEVICE))
    thread = threading.Thread(target=kernels.add_rows_, args=args)
    thread.start()
    thread.join()
    assert torch.equal(update, y)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_another_device_may_be_current(kernels: Kernels, seed: int) -> None:
    with torch.cuda.device(1):
        check.check_add_rows(kernels, DEVICE, 64, 16, 4096, seed)
        assert torch.cuda.current_device() == 1
    other = torch.device("cuda:1")
    check.check_add_rows(load_kernels(other, kernels.dtype), other, 64, 16, 4096, seed)
