"""`bench codec`: its line for packed, simulated and uncounted codecs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from layersweep.cli.app import run

OWN = Path(__file__).with_name("own_codec.py")


def test_one_row_per_arm_with_bits_of_real_bytes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "silent.py"
    silent = (
        OWN.read_text().replace("def nbytes", "def size").replace("class Rounded", "class Silent")
    )
    file.write_text(silent)
    arms = f"lloyd:K3V2,e8:K2V2,{OWN}:Rounded:K3V2,{file}:Silent:K3V2"
    assert run(["bench", "codec", "--kv", arms, "--vectors", "512", "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    rows = json.loads(out)["rows"]
    assert [row["bits_per_element"] for row in rows[:1] + rows[2:]] == [3 + 16 / 128, 8.25, None]
    assert [row["simulated"] for row in rows] == [False, True, False, True]
    assert rows[2]["mse"] == rows[3]["mse"]
    assert 0.032 < rows[0]["mse_before_gain"] < rows[0]["mse"] < 0.037
    assert all(row["key_kl"] > 0 and row["encode_vectors_per_s"] > 0 for row in rows)
    lines = [line.split() for line in err.splitlines() if "(sim.)" in line]
    assert lines[-1][-6] == "?"
