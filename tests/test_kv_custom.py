"""A codec of one's own: loaded from a file, checked, and measured like any other."""

from __future__ import annotations

import doctest
from pathlib import Path

import own_codec
import pytest
import torch

from layersweep.cli.app import run
from layersweep.errors import InputError
from layersweep.kv import parse
from layersweep.kv.check import check
from layersweep.kv.custom import CustomCodec, build

OWN = Path(__file__).with_name("own_codec.py")
BROKEN = """
import torch
class Forgetful:  # batch dependent, not deterministic, grows what it forgets
    def __init__(self, key_bits, value_bits): pass
    def encode(self, x, stream, positions, mean=None): return x + torch.rand(1)
    def decode(self, packed, positions): return (packed - packed.mean(0)).nan_to_num(0.5)
    def append(self, packed, x, positions): return x
    def nbytes(self, packed): return 1
class NoDecode:
    def __init__(self, key_bits, value_bits): pass
    def encode(self, x, stream, positions, mean=None): return x
class Silent:
    def __init__(self, key_bits, value_bits): pass
    def encode(self, x, stream, positions, mean=None): return x.half()
    def decode(self, packed, positions): return packed.float()
class NeedsMore:
    def __init__(self, one): pass
"""


def test_the_example_is_thirty_lines_and_a_doctest() -> None:
    found = doctest.testmod(own_codec)
    assert (found.attempted, found.failed) == (5, 0)
    code = OWN.read_text().split("import torch\n\n\n")[1]
    assert len([line for line in code.splitlines() if line.strip()]) <= 30


def test_the_example_keeps_the_contract(capsys: pytest.CaptureFixture[str]) -> None:
    verdicts = check(build(f"{OWN}:Rounded", 3, 2))
    assert {v.promise: v.detail for v in verdicts if v.kept is False} == {}
    assert run(["codec", "check", f"{OWN}:Rounded", "--dim", "64"]) == 0
    assert "contract kept" in capsys.readouterr().out


def test_broken_promises_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "broken.py"
    file.write_text(BROKEN)
    broken = {v.promise for v in check(build(f"{file}:Forgetful", 3, 2)) if v.kept is False}
    assert {promise.removeprefix("keys: ") for promise in broken if promise.startswith("keys")} == {
        "the same input gives the same result",
        "a sequence does not depend on its batch",
        "appended in pieces equals encoded at once",
        "nbytes is what is stored",
        "an infinity or NaN does not decode to a number",
    }
    assert run(["codec", "check", f"{file}:Forgetful"]) == 2
    assert "15 promises broken" in capsys.readouterr().out


def test_without_nbytes_a_codec_is_simulated_and_its_bits_unknown(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(BROKEN)
    codec = build(f"{file}:Silent", 3, 2)
    assert codec.simulated and isinstance(codec, CustomCodec)
    assert {v.kept for v in check(codec) if "nbytes" in v.promise or "append" in v.promise} == {
        None
    }


@pytest.mark.parametrize(
    ("name", "message"),
    [("NoDecode", "no method `decode`"), ("NeedsMore", "cannot make one"), ("Absent", "no class")],
)
def test_what_cannot_be_a_codec_is_refused(tmp_path: Path, name: str, message: str) -> None:
    file = tmp_path / "mine.py"
    file.write_text(BROKEN)
    with pytest.raises(InputError, match=message):
        build(f"{file}:{name}", 3, 2)
    with pytest.raises(InputError, match="no file"):
        build(f"{tmp_path / 'absent.py'}:X", 3, 2)


def test_an_arm_of_a_file_is_an_arm_like_any_other(capsys: pytest.CaptureFixture[str]) -> None:
    arm = parse(f"{OWN}:Rounded:K3V2@pb=1")
    assert (arm.name, arm.method) == ("rounded:K3V2@pb=1", "rounded")
    assert arm.codec_version is not None and len(arm.codec_version) == 12
    x = torch.randn(1, 2, 9, 64)
    from layersweep.kv.stream import Stream

    packed = arm.encode(x, Stream("k", 2, 64, role="key", rope=True), torch.arange(9)[None])
    assert arm.decode(packed, torch.arange(9)[None]).shape == x.shape
    settings = ["--tasks", "ppl", "--segments", "2", "--prefix", "64", "--continuation", "32"]
    assert run(["eval", "demo", "--kv", f"{OWN}:Rounded:K3V2", *settings]) == 0
    assert "rounded:K3V2" in capsys.readouterr().out
