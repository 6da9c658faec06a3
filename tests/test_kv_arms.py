"""The grammar of KV arms."""

from __future__ import annotations

import subprocess
import sys

import pytest

from layersweep.errors import InputError
from layersweep.kv import parse, parse_arms


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("K3V2", "lloyd:K3V2"),
        ("k3v2", "lloyd:K3V2"),
        (" E8:k4V2 ", "e8:K4V2"),
        ("e8:K3V2@v=0.5", "e8:K3V2@v=0.5"),
        ("e8:K3V2@v=0.6", "e8:K3V2"),
        ("K3V2@window=128@PB=2", "lloyd:K3V2@pb=2@window=128"),
        ("e8:K3V2@sink=4@v=0.5@pb=0", "e8:K3V2@v=0.5@sink=4"),
        ("K16V2", "lloyd:K16V2"),
        ("K16V16@pb=1", "exact"),
        ("exact", "exact"),
        ("Identity", "identity:lloyd"),
        ("identity:e8", "identity:e8"),
    ],
)
def test_resolved_names(text: str, name: str) -> None:
    arm = parse(text)
    assert arm.name == name
    assert arm.requested == text.strip()
    assert parse(arm.name).name == name


def test_fields() -> None:
    arm = parse("e8:K4V2@v=0.5@pb=2@window=128@sink=4")
    assert (arm.method, arm.key_bits, arm.value_bits) == ("e8", 4, 2)
    assert (arm.protect, arm.window, arm.sink) == (2, 128, 4)
    assert arm.codec is not None
    assert arm.codec.sharing_key.__self__.v == "0.5"  # type: ignore[attr-defined]
    assert (arm.simulated, arm.codec_version, arm.encoder) == (True, "1", "torch")
    assert not parse("K4V2").simulated
    exact = parse("exact")
    assert (exact.codec, exact.simulated, exact.codec_version) == (None, False, None)


def test_protected_layers() -> None:
    arm = parse("K3V2@pb=2")
    assert [arm.is_exact_layer(i, 6) for i in range(6)] == [True, True, False, False, True, True]
    assert not any(parse("K3V2").is_exact_layer(i, 6) for i in range(6))
    assert all(parse("exact").is_exact_layer(i, 6) for i in range(6))


def test_lists_grids_and_duplicates() -> None:
    def names(text: str) -> list[str]:
        return [arm.name for arm in parse_arms(text)]

    assert names("K3V2, exact,lloyd:k3v2,e8:K4V2") == ["lloyd:K3V2", "e8:K4V2"]
    assert names("exact") == []
    assert len(names("K2-4V2-4")) == 9
    assert names("e8:K6-16V2@pb=1") == ["e8:K6V2@pb=1", "e8:K8V2@pb=1", "e8:K16V2@pb=1"]
    assert names("all") == ["e8:K3V2", "e8:K4V2", "lloyd:K3V2", "lloyd:K4V2"]
    assert names("K4V2,all")[0] == "lloyd:K4V2"
    assert len(names("K4V2,all")) == 4


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("loyd:K3V2", "unknown method 'loyd', needed one of e8, lloyd", "did you mean 'lloyd'?"),
        ("exat", "unknown name 'exat'", "did you mean 'exact'?"),
        ("KV32", "unknown name 'kv32'", "METHOD:K3V2"),
        ("fp8", "unknown name 'fp8'", "exact, identity, all"),
        ("e8", "found a method without bits, needed e8:K3V2", "METHOD"),
        ("K7V2", "found 7 bits, needed one of 1, 2, 3, 4, 5, 6, 8, 16", "16 keeps"),
        ("K0V2", "found 0 bits", "16 keeps"),
        ("K4-2V2", "found the range 4-2", ""),
        ("K3V2@windw=4", "unknown option of 'lloyd' 'windw'", "did you mean 'window'?"),
        ("K3V2@v=0.5", "unknown option of 'lloyd' 'v', needed one of pb, window, sink", ""),
        ("e8:K3V2@v=0.7", "found v=0.7, needed 0.6 or 0.5", ""),
        ("K3V2@pb=-1", "found pb=-1, needed a whole number from 0", "@pb=2"),
        ("K3V2@pb", "option 'pb' has no value", ""),
        ("K3V2@pb=1@pb=2", "option 'pb' has it twice", ""),
        ("exact@pb=1", "'exact' takes no options", ""),
        ("identity:kivi", "unknown method 'kivi'", ""),
        ("mine.py:Mine:K3V2", "unknown method 'mine.py:mine', needed one of e8, lloyd", ""),
        ("K2-4V2", "found 3 arms, needed one", "lloyd:K2V2"),
        ("", "found an empty name", "exact"),
    ],
)
def test_refusals(text: str, message: str, hint: str) -> None:
    with pytest.raises(InputError) as caught:
        parse(text)
    assert message in str(caught.value)
    assert hint in caught.value.hint


def test_an_empty_item_of_a_list_is_refused() -> None:
    with pytest.raises(InputError, match="empty name"):
        parse_arms("K3V2,,K4V2")


def test_the_grammar_needs_no_torch() -> None:
    code = "import sys, layersweep.kv as kv; kv.parse_arms('all,identity'); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = done.stdout.split()
    assert "layersweep.kv.arms" in modules
    assert "torch" not in modules


def test_an_arm_is_used_like_its_codec() -> None:
    import torch

    import layersweep
    from layersweep.kv import Stream

    arm = layersweep.kv.parse("K3V2")
    x = torch.randn(2, 2, 10, 64, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(10).expand(2, 10)
    keys = Stream("k", 2, 64, role="key", rope=True)
    packed = arm.encode(x, keys, positions)
    assert arm.nbytes(packed) == 2 * 2 * 10 * (64 * 3 // 8 + 2)
    assert arm.decode(packed, positions).shape == x.shape
    start = arm.encode(x[:, :, :4], keys, positions[:, :4])
    joined = arm.append(start, x[:, :, 4:], positions[:, 4:])
    assert torch.equal(arm.decode(joined, positions), arm.decode(packed, positions))
    with pytest.raises(InputError, match="found the exact cache"):
        layersweep.kv.parse("exact").encode(x, keys, positions)
