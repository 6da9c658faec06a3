"""Hub ids, against a small server that speaks the hub's two routes and counts bytes."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
from checkpoint_builders import tiny_checkpoint
from huggingface_hub import constants

from layersweep.checkpoint import hub, open_checkpoint, scan_checkpoint
from layersweep.errors import CheckpointError

COMMIT = "89abcdef0123456789abcdef0123456789abcdef"


class Hub(ThreadingHTTPServer):
    """One public repository `org/tiny`; `org/gated` and everything else is refused."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.sent, self.requests = folder, {}, []  # type: ignore[var-annotated]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        self.server.requests.append((self.command, path, self.headers.get("Range")))
        if "org/gated" in path:
            self.answer(403, b"", {"X-Error-Code": "GatedRepo"})
        elif path.startswith("/api/models/org/tiny"):
            revision = path.removeprefix("/api/models/org/tiny").removeprefix("/revision/")
            if revision not in ("", "main", COMMIT) and not revision.startswith("/tree"):
                self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
            else:
                self.api(path)
        elif path.startswith(f"/org/tiny/resolve/{COMMIT}/"):
            self.file(self.server.folder / path.rsplit("/", 1)[1])
        else:
            self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})

    def api(self, path: str) -> None:
        files = sorted(self.server.folder.iterdir())
        if "/tree/" in path:
            entries = [
                {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": etag(f)}
                for f in files
            ]
            self.answer(200, json.dumps(entries).encode())
            return
        siblings = [{"rfilename": f.name, "size": f.stat().st_size} for f in files]
        info = {"id": "org/tiny", "sha": COMMIT, "siblings": siblings}
        self.answer(200, json.dumps(info).encode())

    def file(self, file: Path) -> None:
        data, span = file.read_bytes(), self.headers.get("Range")
        headers = {"ETag": f'"{etag(file)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if span is None:
            self.answer(200, data, headers, file.name)
            return
        first, last = span.removeprefix("bytes=").split("-")
        stop = min(int(last) if last else len(data) - 1, len(data) - 1)
        headers["Content-Range"] = f"bytes {first}-{stop}/{len(data)}"
        self.answer(206, data[int(first) : stop + 1], headers, file.name)

    def answer(
        self, status: int, body: bytes, headers: dict[str, str] | None = None, name: str = ""
    ) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)
            self.server.sent[name] = self.server.sent.get(name, 0) + len(body)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


def etag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    folder = tiny_checkpoint(tmp_path / "org-tiny", shards=2)
    (folder / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}, "added_tokens": []}')
    (folder / "pytorch_model.bin").write_bytes(b"never fetched")
    started = Hub(folder)
    thread = threading.Thread(target=started.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", started.url)
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        started.url + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(hub, "HfApi", lambda: huggingface_hub.HfApi(endpoint=started.url))
    monkeypatch.setattr(hub, "snapshot_download", _downloader(started.url, tmp_path / "cache"))
    yield started
    started.shutdown()
    started.server_close()


def _downloader(url: str, cache: Path) -> object:
    def download(name: str, **options: object) -> str:
        return huggingface_hub.snapshot_download(
            name,
            endpoint=url,
            cache_dir=cache,
            **options,  # type: ignore[call-overload]
        )

    return download


def test_scanning_a_hub_id_reads_only_headers(server: Hub) -> None:
    checkpoint, problems = scan_checkpoint("org/tiny")
    assert problems == []
    assert checkpoint is not None
    local = open_checkpoint(str(server.folder))
    assert checkpoint.revision == COMMIT
    assert checkpoint.fingerprint == local.fingerprint
    assert checkpoint.nbytes == local.nbytes
    assert {n: w.describe() for n, w in checkpoint.weights.items()} == {
        n: w.describe() for n, w in local.weights.items()
    }
    assert any("headers only" in note for note in checkpoint.notes)
    assert checkpoint.unused_files == ("pytorch_model.bin",)
    for shard in local.files:
        length = int.from_bytes(shard.read_bytes()[:8], "little")
        assert server.sent[shard.name] == 8 + length
        assert server.sent[shard.name] < shard.stat().st_size
    assert "pytorch_model.bin" not in server.sent


def test_problems_are_found_before_the_download(server: Hub) -> None:
    shard = server.folder / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match=r"org/tiny/model-00002.*truncated"):
        open_checkpoint("org/tiny")
    assert server.sent["model-00001-of-00002.safetensors"] < 100_000


def test_download_then_cache(server: Hub, tmp_path: Path) -> None:
    checkpoint = open_checkpoint("org/tiny")
    assert checkpoint.folder.parent.name == "snapshots"
    assert checkpoint.revision == COMMIT
    assert checkpoint.fingerprint == open_checkpoint(str(server.folder)).fingerprint
    names = {file.name for file in checkpoint.folder.iterdir()}
    assert "tokenizer.json" in names
    assert "pytorch_model.bin" not in names
    server.sent.clear()
    assert open_checkpoint("org/tiny", revision=COMMIT).fingerprint == checkpoint.fingerprint
    assert not any(name.endswith(".safetensors") for name in server.sent)


def test_offline_uses_the_cache_or_says_so(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    open_checkpoint("org/tiny", revision=COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()  # a session reads the setting when it is made
    try:
        assert open_checkpoint("org/tiny", revision=COMMIT).revision == COMMIT
        assert scan_checkpoint("org/tiny", COMMIT)[0] is not None
        with pytest.raises(CheckpointError, match="neither the hub nor a copy in the cache"):
            open_checkpoint("org/other")
    finally:
        huggingface_hub.close_session()


@pytest.mark.parametrize(
    ("name", "revision", "found", "hint"),
    [
        ("org/gated", None, "found a gated model", "hf auth login"),
        ("org/absent", None, "found neither a local folder nor such a model", "spelling"),
        ("org/tiny", "no-such-branch", "found no revision 'no-such-branch'", "--revision"),
    ],
)
def test_refusals(server: Hub, name: str, revision: str | None, found: str, hint: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(name, revision)
    assert found in str(caught.value)
    assert hint in caught.value.hint
    assert caught.value.exit_code == 2


def test_no_connection_and_no_cache(server: Hub) -> None:
    server.shutdown()
    server.server_close()
    with pytest.raises(CheckpointError, match="neither the hub nor a copy in the cache"):
        open_checkpoint("org/tiny")
