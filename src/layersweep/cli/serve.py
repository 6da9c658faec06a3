"""`layersweep serve`: a model behind OpenAI's HTTP interface."""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from layersweep.errors import InputError
from layersweep.problems import printable
from layersweep.units import format_bytes, parse_duration, parse_size

if TYPE_CHECKING:
    from layersweep.generate.scheduler import Scheduler
    from layersweep.kv.arms import Arm

KEY = "LAYERSWEEP_API_KEY"


def serve(
    model: Annotated[str, typer.Argument(help="Folder, hub id, or demo.")],
    kv: Annotated[
        str, typer.Option(help="Caches that a request may choose; the first is the default.")
    ] = "exact",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(envvar=KEY, help="What clients must send as their key.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="What requests call the model.")] = None,
    max_length: Annotated[
        int | None, typer.Option(help="Tokens of prompt and answer; the model's by default.")
    ] = None,
    max_running: Annotated[int, typer.Option(help="Sequences that run at once.")] = 256,
    max_waiting: Annotated[int, typer.Option(help="Sequences that may wait; then 429.")] = 128,
    max_body: Annotated[str, typer.Option(help="Largest body of a request.")] = "4MiB",
    grace: Annotated[str, typer.Option(help="Time that a stop leaves running requests.")] = "30s",
    log_level: Annotated[str, typer.Option(help="info: a line per request; or warning.")] = "info",
    vram: Annotated[str, typer.Option(help="Device budget, for example 14GiB.")] = "auto",
    ram: Annotated[str, typer.Option(help="Host budget.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float16, bfloat16 or float32.")] = "auto",
    weights: Annotated[str, typer.Option(help="auto or native (as stored), or nf4.")] = "auto",
    revision: Annotated[str | None, typer.Option(help="Commit of a hub model.")] = None,
) -> None:
    """Serve completions and chats over HTTP, as OpenAI's clients ask for them."""
    _check_installed()
    from layersweep.kv.arms import parse

    # the cheapest refusals first: no torch yet
    arms = tuple(parse(item, growing=True) for item in kv.split(","))
    seconds = parse_duration(grace, option="--grace")
    _check(api_key, max_waiting, max_running, log_level)
    from layersweep.serve.guard import Limits
    from layersweep.serve.server import bind

    limits = Limits(max_waiting=max_waiting, max_body=parse_size(max_body, option="--max-body"))
    listener = bind(host, port)

    from layersweep.generate.scheduler import Scheduler
    from layersweep.serve.app import OPENAI, Offer, Service
    from layersweep.serve.server import serve as serve_until_signal
    from layersweep.study.study import with_reference
    from layersweep.sweep.model import load
    from layersweep.text.bos import resolve_bos
    from layersweep.text.tokenizer import TextTokenizer

    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    loaded = load(
        model, revision=revision, vram=vram, ram=ram, device=device, dtype=dtype, weights=weights
    )
    tokenizer = TextTokenizer.load(loaded.checkpoint.folder)
    for note in (*loaded.checkpoint.notes, *tokenizer.notes):
        console.print(f"note: {note}")
    for fallback in loaded.compute.fallbacks:
        console.print(f"fallback: {fallback}")
    loaded = with_reference(loaded, arms, tokenizer, resolve_bos(tokenizer, "auto"))
    with Scheduler(
        loaded, tokenizer, most=max_running, longest=max_length,
        say=lambda fallback: console.print(f"fallback: {fallback}"),
    ) as steps:  # fmt: skip
        own = steps.config.sampling
        offer = Offer(
            name or _name(model), tokenizer, arms, steps.room.longest,
            own if own.do_sample else OPENAI, limits, api_key,
        )  # fmt: skip
        service = Service(
            offer, steps,
            (lambda line: console.print(line)) if log_level == "info" else (lambda line: None),
            lambda: steps.counts.weight_bytes_read,
        )  # fmt: skip
        place, taken = listener.getsockname()[:2]
        for line in _opening(steps, offer.name, arms):
            console.print(line)
        if api_key is None and not ipaddress.ip_address(place).is_loopback:
            console.print(f"note: {place} can be reached from elsewhere, and there is no --api-key")
        address = f"[{place}]" if ":" in place else place
        listener.listen()  # who connects from now on is answered
        console.print(f"listening on http://{address}:{taken}/v1  (Ctrl-C stops)")
        serve_until_signal(service, listener, grace=seconds)


def _check_installed() -> None:
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as missing:
        raise InputError(
            f"serve: found no package {missing.name}, needed fastapi and uvicorn",
            hint="pip install layersweep[serve]",
        ) from missing


def _check(api_key: str | None, max_waiting: int, max_running: int, log_level: str) -> None:
    if api_key is not None and not api_key.strip():
        raise InputError(
            f"--api-key: found an empty key, perhaps in {KEY}, needed one that clients can send",
            hint=f"leave it out, or unset {KEY}, to ask for none",
        )
    for option, count in (("--max-waiting", max_waiting), ("--max-running", max_running)):
        if count < 1:
            raise InputError(f"{option}: found {count}, needed 1 or more")
    if log_level not in ("info", "warning"):
        raise InputError(f"--log-level: found '{log_level}', needed info or warning")


def _name(model: str) -> str:
    """What requests call it: a folder's last part, or the hub id."""
    from pathlib import Path

    folder = Path(model)
    return printable(folder.resolve().name if folder.exists() else model)


def _opening(steps: Scheduler, name: str, arms: tuple[Arm, ...]) -> list[str]:
    model, room = steps.model, steps.room
    paths, compute = model.paths, model.compute
    return [
        f"[model] {name}: {model.checkpoint.source}, weights {model.checkpoint.storage}, "
        f"{format_bytes(model.checkpoint.nbytes)}; cache {', '.join(arm.name for arm in arms)}",
        f"[paths] device {compute.device}, {str(compute.dtype).removeprefix('torch.')}; kernels: "
        f"{paths.kernels}; experts: {paths.experts}; attention: {paths.attention}",
        f"[budget] vram {format_bytes(model.vram.bytes)} ({model.vram.source}), ram "
        f"{format_bytes(model.ram.bytes)} ({model.ram.source}); "
        f"{format_bytes(room.kept_bytes)} for keys and values, {room.most} sequences at once, "
        f"{room.longest} tokens each at most",
    ]
