"""Attention that reads codes where they lie: its CUDA C as C++, against decoding first."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cuda_on_cpu.emulated import COMPILER, Emulated, build
from packed_checks import Case, asked, check_lengths, check_packed, grown, streams, turn_of

from layersweep.kernels import Kernels
from layersweep.kernels.kernels import LAYOUTS, SCALARS
from layersweep.kernels.packed import packed_refusal
from layersweep.kv.packed_attention import Frame, PackedPast, Turn, refusal
from layersweep.kv.stream import keys_and_values

pytestmark = pytest.mark.skipif(COMPILER is None, reason="g++ is not installed")

CPU = torch.device("cpu")
SMALL = Case(64, 2, 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("packed")


@pytest.fixture(scope="module")
def kernels(folder: Path) -> Kernels:
    return emulated(folder, 64)


def emulated(folder: Path, dim: int, dtype: torch.dtype = torch.float16) -> Kernels:
    library = Emulated(build(folder, "packed", SCALARS[dtype], dim), LAYOUTS["packed"])
    return Kernels(dtype, lambda name, dim=0: library)


@pytest.fixture
def seed() -> int:
    chosen = random.SystemRandom().randrange(2**31)
    print(f"seed {chosen}")
    return chosen


@pytest.mark.parametrize(
    ("case", "arm", "tokens"),
    [
        (SMALL, "K3V2", 241),
        (Case(64, 1, 4, 1, "interleaved"), "K4V2", 1151),  # two chunks, the last not full
        (Case(64, 3, 3, 1, "a half of the head"), "K2V3@fine=0", 150),  # heads of two octets
        (Case(64, 1, 18, 1, None), "K3V2@found=0@sink=0", 150),  # heads of several blocks
    ],
    ids=str,
)
def test_attention_over_codes(
    kernels: Kernels, case: Case, arm: str, tokens: int, seed: int
) -> None:
    check_packed(kernels, CPU, case, arm, tokens, seed)


def test_caps_sinks_and_values_that_nothing_predicts(kernels: Kernels, seed: int) -> None:
    case = replace(SMALL, batch=1)
    check_packed(kernels, CPU, case, "K3V2", 140, seed, softcap=5.0, sinks=True, predicted=False)


def test_sequences_of_other_lengths(kernels: Kernels, seed: int) -> None:
    check_lengths(kernels, CPU, SMALL, seed)


@pytest.mark.slow
@pytest.mark.parametrize("ratio", [1, 4, 8])
@pytest.mark.parametrize(("dim", "dtype"), [(128, torch.float16), (256, torch.bfloat16)], ids=str)
def test_other_head_sizes(
    folder: Path, dim: int, dtype: torch.dtype, ratio: int, seed: int
) -> None:
    kernels = emulated(folder, dim, dtype)
    for arm, tokens in (("K3V2", 700), ("K4V3", 241)):
        check_packed(kernels, CPU, Case(dim, 2, ratio), arm, tokens, seed)


def test_a_scale_that_is_not_a_number_shows(kernels: Kernels) -> None:
    of = streams(SMALL, 0, CPU)
    keys, values = grown("trellis:K3V2@found=1", of, SMALL, 90, 1, torch.float16, 2)
    for broken in (keys, values):
        assert broken.middle is not None and broken.middle.packed.scale is not None
        scale = broken.middle.packed.scale
        before, scale[1, 0, 77] = scale[1, 0, 77].clone(), 255
        past = PackedPast.of(keys, values, Frame.of(keys, values, turn_of(SMALL, 93, CPU)))
        q, k, v = asked(SMALL, 2, torch.float16, CPU)
        found = past.attend(kernels, q, (k, v), scale=0.125)
        assert found[0].isfinite().all() and not found[1, 0].isfinite().any()
        scale[1, 0, 77] = before


def test_what_cannot_be_read_says_why() -> None:
    of = keys_and_values(2, 64)

    def why(arm: str, tokens: int = 140, window: int | None = None) -> str | None:
        kept = [replace(one, window=window) for one in of]
        return refusal(*grown(arm, kept, SMALL, tokens, 0, torch.float16, 1))

    assert why("K3V2") is None
    assert why("e8:K3V2", 9) == "stream 'k' is not coded by trellis with 256 states"
    assert (
        why("trellis:K3V2@states=1024", 9) == "stream 'k' is not coded by trellis with 256 states"
    )
    assert why("trellis:K5V2", 9) == "stream 'k' has 5 bits"
    assert why("K3V2", 60) == "stream 'k' has no coded tokens, or some that nobody sees"
    assert why("trellis:K3V2", 9, 500) == "stream 'k' has a window"
    assert why("trellis:K3V2@fine=200", 9) == "all that is coded is coded finely"
    assert packed_refusal(CPU, 128, 3) == "kernels need a CUDA device, not cpu"


def test_turns_add_up() -> None:
    """What scores rest on: <q, R(t + j) k> = <R(-t) q, R(j) k>."""
    turn = turn_of(Case(64, 1, 1, rope="interleaved"), 2000, CPU)
    q, k = torch.randn(2, 1, 1, 1, 64).unbind()
    at = torch.tensor([[1777]])
    back = Turn(turn.cos, -turn.sin, turn.order, turn.near)
    both = (back.turned(q, at) * turn.turned(k, at * 0 + 20)).sum()
    assert torch.allclose(both, (turn.pairs(q) * turn.turned(k, at + 20)).sum(), atol=1e-3)
