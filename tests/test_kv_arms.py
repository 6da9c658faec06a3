"""The grammar of KV arms."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest
import torch

from layersweep.errors import InputError
from layersweep.kv import parse, parse_arms


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("K3V2", "trellis:K3V2@fit=1@found=1"),
        (" k3v2", "trellis:K3V2@fit=1@found=1"),
        ("K3V2@pb=2", "trellis:K3V2@fit=1@found=1@pb=2"),
        ("K3V2@window=64@pb=2", "trellis:K3V2@fit=1@found=1@pb=2@window=64"),
        ("K3V2@states=1024", "trellis:K3V2@states=1024@fit=1@found=1"),
        ("K3V2@fit=0@sink=0@found=0", "trellis:K3V2"),
        ("K3V2@sink=8", "trellis:K3V2@fit=1@found=1@sink=8"),
        ("K16V2", "trellis:K16V2@fit=1@found=1"),
        ("trellis:K3V2", "trellis:K3V2"),
        ("trellis:K3V2@sink=0", "trellis:K3V2"),
        (" E8:k4V2 ", "e8:K4V2"),
        ("e8:K3V2@v=0.5", "e8:K3V2@v=0.5"),
        ("e8:K3V2@v=0.6", "e8:K3V2"),
        ("lloyd:K3V2@window=128@PB=2", "lloyd:K3V2@pb=2@window=128"),
        ("e8:K3V2@sink=4@v=0.5@pb=0", "e8:K3V2@v=0.5@sink=4"),
        ("lloyd:K16V2", "lloyd:K16V2"),
        ("K16V16@pb=1", "exact"),
        ("exact", "exact"),
        ("Identity", "identity:trellis"),
        ("identity:e8", "identity:e8"),
        ("identity:Q4_0@rotate=1", "identity:q4_0@rotate=1"),
        ("INT4", "int4"),
        ("int4@group=64", "int4"),
        ("int2@pb=2@group=32", "int2@group=32@pb=2"),
        ("q4_0@rotate=1", "q4_0@rotate=1"),
        ("q8_0", "q8_0"),
        ("fp8@PB=2", "fp8@pb=2"),
        ("turbo:K3V2", "turbo:K3V2"),
        ("voronoi:K4V2@sink=4", "voronoi:K4V2@sink=4"),
        ("KIVI:k2v2@window=128", "kivi:K2V2@window=128"),
        ("K3V2@layers=7", "trellis:K3V2@fit=1@found=1@layers=7"),
        ("K3V16@sink=4@layers=00-07@pb=1", "trellis:K3V16@fit=1@found=1@pb=1@layers=0-7@sink=4"),
        ("int4@layers=3-3", "int4@layers=3"),
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
    assert (arm.simulated, arm.codec_version) == (True, "1")
    assert arm.encoder_on(torch.device("cpu")) == "torch"
    assert not parse("K4V2").simulated
    exact = parse("exact")
    assert (exact.codec, exact.simulated, exact.codec_version) == (None, False, None)


def test_a_bare_name_keeps_recent_tokens_in_better_shape_where_a_cache_grows() -> None:
    grown = "trellis:K2V2@fit=1@found=1@window=8@block=16@fine=96"
    assert parse("K2V2", growing=True).name == grown
    assert parse("K2V2@fine=0@block=0@window=0", growing=True).name == "trellis:K2V2@fit=1@found=1"
    names = [arm.name for arm in parse_arms("K2V2,trellis:K2V2,int4", growing=True)]
    assert names == [grown, "trellis:K2V2", "int4"]


@pytest.mark.parametrize(
    ("options", "tokens", "until"),
    [
        ("@sink=4", 3, 3),
        ("@sink=4@window=10", 12, 4),
        ("@sink=4@window=10", 50, 40),
        ("@block=16@window=8", 135, 0),  # 127 have left: less than a mean is taken from
        ("@block=16@window=8", 136, 128),
        ("@block=16@window=8@sink=1", 152, 129),
        ("@block=16@window=8@sink=1", 153, 145),
        ("@block=48", 150, 144),
    ],
)
def test_what_is_coded_follows_from_how_many_tokens_there_are(
    options: str, tokens: int, until: int
) -> None:
    assert parse(f"lloyd:K3V2{options}").coded_until(tokens) == until


def test_a_window_that_blocks_would_not_fill_stays_exact() -> None:
    arm = parse("lloyd:K3V2@block=16@window=8@sink=1")
    assert [arm.keeps_window(window) for window in (None, 153, 154)] == [False, True, False]
    assert not parse("lloyd:K3V2@window=8").keeps_window(4)


def test_protected_layers() -> None:
    arm = parse("K3V2@pb=2")
    assert [arm.is_exact_layer(i, 6) for i in range(6)] == [True, True, False, False, True, True]
    assert not any(parse("K3V2").is_exact_layer(i, 6) for i in range(6))
    assert all(parse("exact").is_exact_layer(i, 6) for i in range(6))


def test_layers_that_are_coded() -> None:
    def coded(text: str) -> list[int]:
        arm = parse(text)
        return [layer for layer in range(6) if not arm.is_exact_layer(layer, 6)]

    assert coded("K3V2@layers=3") == [3]
    assert coded("K3V2@layers=0-3@pb=1") == [1, 2, 3]
    parse("K3V2@layers=2-5").check_model(6)
    with pytest.raises(InputError, match="found @layers=2-5, needed layers from 0 to 4"):
        parse("K3V2@layers=2-5").check_model(5)


def test_lists_grids_and_duplicates() -> None:
    def names(text: str) -> list[str]:
        return [arm.name for arm in parse_arms(text)]

    assert names("Lloyd:K3V2, exact,lloyd:k3v2,e8:K4V2") == ["lloyd:K3V2", "e8:K4V2"]
    assert names("exact") == []
    assert len(names("K2-4V2-4")) == 9
    assert names("K2-3V2") == [
        "trellis:K2V2@fit=1@found=1",
        "trellis:K3V2@fit=1@found=1",
    ]
    assert names("trellis:K2-3V2") == ["trellis:K2V2", "trellis:K3V2"]
    bare = "trellis:K3V2@fit=1@found=1"
    assert names(f"K3V2,{bare},trellis:K3V2") == [bare, "trellis:K3V2"]
    assert {"trellis:K3V2@fit=1@found=1", "trellis:K4V2@fit=1@found=1"} < set(names("all"))
    assert "trellis:K3V2" not in names("all")
    assert names("e8:K6-16V2@pb=1") == ["e8:K6V2@pb=1", "e8:K8V2@pb=1", "e8:K16V2@pb=1"]
    assert {"e8:K3V2", "e8:K4V2", "lloyd:K3V2", "kivi:K4V2", "voronoi:K3V2"} < set(names("all"))
    assert {"int4", "int2", "q8_0", "q4_0", "fp8"} < set(names("all"))
    assert names("fp8,all")[0] == "fp8"
    assert len(names("fp8,all")) == len(names("all"))
    installed = importlib.util.find_spec("nexusquant") is not None
    assert ("nexusquant:K3V2" in names("all")) == installed


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("loyd:K3V2", "unknown method 'loyd', needed one of", "did you mean 'lloyd'?"),
        ("trubo:K3V2", "unknown method 'trubo'", "did you mean 'turbo'?"),
        ("itn4", "unknown name 'itn4'", "did you mean 'int4'?"),
        ("q4_1", "unknown name 'q4_1'", "did you mean 'q4_0'?"),
        ("int4:K3V2", "found bits after int4, needed int4 alone", "METHOD:K3V2"),
        ("int4@group=48", "found group=48, needed 64 or 32 or 128", ""),
        (
            "fp8@group=64",
            "unknown option of 'fp8' 'group', needed one of pb, layers, window, block,",
            "",
        ),
        ("e8:fp8", "unknown name 'fp8' after 'e8'", ""),
        ("all@pb=1", "'all' takes no options", ""),
        ("int4@fine=8", "found fine=8, needed one of trellis, e8, lloyd, turbo, voronoi", ""),
        ("kivi:K3V2@fine=8", "found fine=8, needed one of trellis", ""),
        ("lloyd:K3V2@found=1", "unknown option of 'lloyd' 'found'", ""),
        ("identity:e8@pb=1", "'identity' takes no pb", ""),
        ("x.py:Mine", "found a method without bits, needed x.py:Mine:K3V2", "FILE.py:CLASS"),
        ("x.py:Mine@pb=1", "found a method without bits, needed x.py:Mine:K3V2", ""),
        ("x.py:Lloyd:K3V2", "found a class with the name of 'lloyd'", ""),
        (
            "x.py:Mine:K3V2@v=1",
            "unknown option of 'mine' 'v', needed one of pb, layers, window, block,",
            "",
        ),
        ("exat", "unknown name 'exat'", "did you mean 'exact'?"),
        ("KV32", "unknown name 'kv32'", "METHOD:K3V2"),
        ("fp16", "unknown name 'fp16'", "exact, identity, all"),
        ("e8", "found a method without bits, needed e8:K3V2", "METHOD"),
        ("K7V2", "found 7 bits, needed one of 1, 2, 3, 4, 5, 6, 8, 16", "16 keeps"),
        ("K0V2", "found 0 bits", "16 keeps"),
        ("K4-2V2", "found the range 4-2", ""),
        ("lloyd:K3V2@windw=4", "unknown option of 'lloyd' 'windw'", "did you mean 'window'?"),
        (
            "lloyd:K3V2@v=0.5",
            "unknown option of 'lloyd' 'v', needed one of pb, layers, window, block,",
            "",
        ),
        ("e8:K3V2@v=0.7", "found v=0.7, needed 0.6 or 0.5", ""),
        ("K3V2@pb=-1", "found pb=-1, needed a whole number from 0", "@pb=2"),
        ("K3V2@pb", "option 'pb' has no value", ""),
        ("K3V2@pb=1@pb=2", "option 'pb' has it twice", ""),
        ("exact@pb=1", "'exact' takes no options", ""),
        ("K3V2@layers=3-1", "found layers=3-1, needed the smaller number first", "@layers=0-7"),
        ("K3V2@layers=a", "found layers=a, needed a layer or the first and the last", "@layers=0"),
        ("identity:e8@layers=1", "'identity' takes no layers", ""),
        ("identity:nf4", "unknown method 'nf4'", ""),
        ("lloyd:K2-4V2", "found 3 arms, needed one", "lloyd:K2V2"),
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


def test_a_file_of_one_s_own_keeps_its_case_and_its_signs() -> None:
    arm = parse("/Some/Where@home/Own.py:MyCodec:k3v2@PB=1")
    assert (arm.name, arm.method) == ("mycodec:K3V2@pb=1", "mycodec")
    assert arm.source == "/Some/Where@home/Own.py:MyCodec"
    with pytest.raises(InputError, match=r"found no file /Some/Where@home/Own\.py"):
        _ = arm.codec
    with pytest.raises(InputError, match="with the same name mine:K3V2, needed a name for each"):
        parse_arms("a.py:Mine:K3V2,b.py:Mine:K3V2")
    assert len(parse_arms("a.py:Mine:K3-4V2,a.py:Mine:K3V2")) == 2


@pytest.mark.skipif(importlib.util.find_spec("nexusquant") is not None, reason="is installed")
def test_a_package_that_is_missing_is_named() -> None:
    for text in ("nexusquant:K3V2", "identity:nexusquant"):
        with pytest.raises(InputError, match="found no package nexusquant-kv") as caught:
            parse(text)
        assert "pip install nexusquant-kv" in caught.value.hint


def test_an_arm_is_used_like_its_codec() -> None:
    import torch

    import layersweep
    from layersweep.kv import Stream

    arm = layersweep.kv.parse("lloyd:K3V2")
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
