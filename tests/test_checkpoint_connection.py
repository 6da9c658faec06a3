"""Settings with which the hub's HTTP client cannot be made: as without a network, and named."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from checkpoint_builders import tiny_checkpoint
from huggingface_hub import constants

from layersweep.checkpoint import open_checkpoint, scan_checkpoint
from layersweep.errors import CheckpointError, InputError
from layersweep.text import source

COMMIT = "0123456789abcdef0123456789abcdef01234567"
# variable, value, what the client's construction raises, what is said of it
SETTINGS = [
    ("ALL_PROXY", "socks://127.0.0.1:7890", "Unknown scheme for proxy URL"),
    ("all_proxy", "socks5://127.0.0.1:7890", "'socksio' package is not installed"),
    ("HTTPS_PROXY", "http://proxy:port", "Invalid port"),
    ("SSL_CERT_FILE", "/nonexistent", "No such file or directory"),
    ("SSL_CERT_FILE", __file__, "no certificate or crl found"),
    ("HF_TOKEN", "hf_é", "a character that is not ASCII"),
]
NETWORK_VARIABLES = [
    *("ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY", "all_proxy", "https_proxy", "http_proxy"),
    *("SSL_CERT_FILE", "SSL_CERT_DIR", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"),
]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty hub cache, no settings of the network, and no client that was made before."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    for name in NETWORK_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    huggingface_hub.close_session()
    yield tmp_path / "hub"
    huggingface_hub.close_session()


def cached(cache: Path, kind: str, name: str) -> Path:
    """The snapshot folder of a repository in the cache."""
    repository = cache / f"{kind}--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    return snapshot


@pytest.mark.parametrize(("variable", "value", "says"), SETTINGS)
def test_the_copy_in_the_cache_is_used_and_said(
    cache: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, says: str
) -> None:
    snapshot = tiny_checkpoint(cached(cache, "models", "some/mixtral"))
    monkeypatch.setenv(variable, value)
    checkpoint = open_checkpoint("some/mixtral")
    scanned, problems = scan_checkpoint("some/mixtral")
    assert (checkpoint.folder, problems) == (snapshot, [])
    assert scanned == checkpoint
    note = next(note for note in checkpoint.notes if "copy in the cache" in note)
    assert note.startswith(f"no connection to the hub ({variable}: ")
    assert says in note


@pytest.mark.parametrize(("variable", "value", "says"), SETTINGS)
def test_without_a_copy_the_refusal_names_the_variable(
    cache: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, says: str
) -> None:
    monkeypatch.setenv(variable, value)
    for ask in (open_checkpoint, scan_checkpoint):
        with pytest.raises(CheckpointError) as caught:
            ask("some/mixtral")
        assert "found neither the hub nor a copy in the cache" in str(caught.value)
        assert f"({variable}: " in str(caught.value)
        assert says in str(caught.value)
        assert f"correct or unset {variable}" in caught.value.hint


def test_an_incomplete_copy_is_refused_with_both_reasons(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tiny_checkpoint(cached(cache, "models", "some/mixtral"), shards=2)
    (snapshot / "model-00002-of-00002.safetensors").unlink()
    monkeypatch.setenv("ALL_PROXY", "socks://127.0.0.1:7890")
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002.*no such file") as caught:
        open_checkpoint("some/mixtral")
    assert "(no connection to the hub: ALL_PROXY: " in str(caught.value)
    assert "correct or unset ALL_PROXY" in caught.value.hint


def test_a_password_in_a_proxy_is_not_repeated(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://user:se/cret@proxy:8080")
    with pytest.raises(CheckpointError, match="HTTPS_PROXY: unusable") as caught:
        open_checkpoint("some/mixtral")
    assert "'se'" not in str(caught.value)


def test_an_endpoint_that_is_no_address(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://hub:port")
    monkeypatch.setattr(
        "layersweep.checkpoint.hub.HfApi", lambda: huggingface_hub.HfApi("http://hub:port")
    )
    with pytest.raises(CheckpointError, match=r"copy in the cache, needed one \(Invalid port"):
        open_checkpoint("some/mixtral")


@pytest.mark.parametrize(("variable", "value", "says"), SETTINGS)
def test_wikitext_comes_from_the_cache_or_the_refusal_names_the_variable(
    cache: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, says: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(InputError) as caught:
        source._wikitext_path()
    assert f"a way to the hub ({variable}: " in str(caught.value)
    assert says in str(caught.value)
    assert f"correct or unset {variable}" in caught.value.hint
    file = cached(cache, "datasets", source.WIKITEXT_REPOSITORY) / source.WIKITEXT_FILE
    file.parent.mkdir()
    file.write_bytes(b"")
    assert source._wikitext_path() == str(file)
