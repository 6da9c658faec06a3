"""Which files of a folder may be read: shards, hub snapshots, links, and what never is."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from checkpoint_builders import tiny_checkpoint

from layersweep.checkpoint import open_checkpoint, scan_checkpoint
from layersweep.errors import CheckpointError

INDEX = "model.safetensors.index.json"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(folder))
    assert caught.value.exit_code == 2
    assert caught.value.hint
    return str(caught.value)


def as_snapshot(folder: Path, cache: Path) -> Path:
    """Lay the files out as the hub's cache does: snapshots/COMMIT/name -> ../../blobs/hash."""
    blobs = cache / "models--org--name" / "blobs"
    snapshot = cache / "models--org--name" / "snapshots" / COMMIT
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(folder.iterdir())):
        shutil.copyfile(file, blobs / f"hash{number}")
        (snapshot / file.name).symlink_to(f"../../blobs/hash{number}")
    return snapshot


def test_hub_snapshot_of_links_is_read(tmp_path: Path) -> None:
    plain = tiny_checkpoint(tmp_path / "plain", shards=3)
    snapshot = as_snapshot(plain, tmp_path / "cache")
    checkpoint = open_checkpoint(str(snapshot))
    assert checkpoint.revision == COMMIT
    assert checkpoint.fingerprint == open_checkpoint(str(plain)).fingerprint
    assert [file.name for file in checkpoint.files] == [
        f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)
    ]


def test_a_link_to_the_folder_and_links_inside_it_are_followed(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "real")
    (folder / "model.safetensors").rename(folder / "weights.bin")
    (folder / "model.safetensors").symlink_to("weights.bin")
    (tmp_path / "link").symlink_to(folder)
    assert open_checkpoint(str(tmp_path / "link")).weights_kind == "nf4"


@pytest.mark.parametrize("snapshot", [False, True])
def test_a_link_that_leaves_the_folder_is_refused(tmp_path: Path, snapshot: bool) -> None:
    folder = tiny_checkpoint(tmp_path / "real")
    if snapshot:
        folder = as_snapshot(folder, tmp_path / "cache")
        (folder / "model.safetensors").unlink()
        outside = tmp_path / "real" / "model.safetensors"
    else:
        outside = tmp_path / "elsewhere.safetensors"
        (folder / "model.safetensors").rename(outside)
    (folder / "model.safetensors").symlink_to(outside)
    message = refusal(folder)
    assert f"model.safetensors: found a link to {outside}" in message
    assert f"needed a file inside {folder}" in message


def test_another_models_blobs_are_refused(tmp_path: Path) -> None:
    folder = as_snapshot(tiny_checkpoint(tmp_path / "real"), tmp_path / "cache")
    other = tmp_path / "cache" / "models--org--other" / "blobs"
    other.mkdir(parents=True)
    shutil.copyfile(tmp_path / "real" / "model.safetensors", other / "hash")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(other / "hash")
    assert "found a link to" in refusal(folder)


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors",
        "/etc/passwd",
        "sub/model.safetensors",
        "..",
        "a\\b.safetensors",
        "model.bin",
        "",
    ],
)
def test_index_may_only_name_plain_safetensors_files(tmp_path: Path, name: str) -> None:
    folder = tiny_checkpoint(tmp_path / "m", shards=2)
    shutil.copyfile(folder / "model-00001-of-00002.safetensors", tmp_path / "outside.safetensors")
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = name
    (folder / INDEX).write_text(json.dumps(index))
    _, problems = scan_checkpoint(str(folder))
    assert problems[0].tensor == "lm_head.weight"
    assert problems[0].found == f"shard {name!r}"
    assert problems[0].needed == "the plain name of a .safetensors file in the same folder"
    assert "lm_head.weight" in refusal(folder)


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": {}}', '{"weight_map": [1]}', "{}"])
def test_a_broken_index_is_refused(tmp_path: Path, content: str) -> None:
    folder = tiny_checkpoint(tmp_path, shards=2)
    (folder / INDEX).write_text(content)
    assert INDEX in refusal(folder)


def test_missing_shard(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    _, problems = scan_checkpoint(str(folder))
    assert len(problems) == 1
    assert "model-00002-of-00003.safetensors: found no such file" in refusal(folder)


def test_truncated_shard(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, shards=2)
    shard = folder / "model-00002-of-00002.safetensors"
    size = shard.stat().st_size
    os.truncate(shard, size - 5)
    message = refusal(folder)
    assert f"found {size - 5} bytes in the file (truncated), needed {size}" in message
    assert shard.name in message


def test_index_and_shard_disagree(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, shards=2)
    index = json.loads((folder / INDEX).read_text())
    owner = index["weight_map"]["lm_head.weight"]
    wrong = ({f"model-0000{n}-of-00002.safetensors" for n in (1, 2)} - {owner}).pop()
    index["weight_map"]["lm_head.weight"] = wrong
    (folder / INDEX).write_text(json.dumps(index))
    assert f"{wrong}: lm_head.weight: found no such tensor" in refusal(folder)


def test_several_files_without_an_index(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, shards=2)
    (folder / INDEX).unlink()
    assert "found 2 safetensors files without an index" in refusal(folder)


def test_the_same_tensor_in_two_shards(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, shards=2)
    index = json.loads((folder / INDEX).read_text())
    copy = "model-00003-of-00003.safetensors"
    shutil.copyfile(folder / "model-00001-of-00002.safetensors", folder / copy)
    index["weight_map"]["extra"] = copy
    (folder / INDEX).write_text(json.dumps(index))
    assert "found the same tensor as in model-00001-of-00002.safetensors" in refusal(folder)


def test_pickles_are_refused(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "found only pytorch_model.bin, a format that can run code" in refusal(folder)


@pytest.mark.parametrize("kind", ["missing", "file", "empty", "no config"])
def test_no_checkpoint_at_all(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "m"
    if kind == "file":
        folder.write_text("x")
        assert "found a file, needed the folder" in refusal(folder)
    elif kind == "missing":
        assert "found nothing, needed a folder" in refusal(folder)
    elif kind == "empty":
        folder.mkdir()
        assert "config.json: found no such file" in refusal(folder)
    else:
        (tiny_checkpoint(folder) / "config.json").unlink()
        assert "config.json: found no such file" in refusal(folder)


def test_a_folder_in_a_shards_place(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    assert "found something that is no readable regular file" in refusal(folder)


def test_a_pipe_is_refused_without_blocking(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path)
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    assert "no readable regular file" in refusal(folder)


def test_config_that_links_outside_is_refused(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "m")
    (folder / "config.json").rename(tmp_path / "config.json")
    (folder / "config.json").symlink_to(tmp_path / "config.json")
    assert "config.json: found a link to" in refusal(folder)
