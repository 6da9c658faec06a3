"""`layersweep serve`: a model behind OpenAI's HTTP interface."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from layersweep.cli.job import MachineOptions
from layersweep.cli.steps import SamplingOptions, prepare, scheduled
from layersweep.errors import InputError
from layersweep.problems import printable
from layersweep.units import parse_duration, parse_size

KEY = "LAYERSWEEP_API_KEY"
LEVELS = ("info", "warning")


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
    max_running: Annotated[int, typer.Option(help="Texts at once, at most.", min=1)] = 256,
    max_waiting: Annotated[int, typer.Option(help="Texts that wait, then 429.", min=1)] = 128,
    max_length: Annotated[
        int | None, typer.Option(help="Tokens of a text; the model's limit by default.")
    ] = None,
    max_body: Annotated[str, typer.Option(help="Largest body of a request.")] = "4MiB",
    grace: Annotated[str, typer.Option(help="What a stop leaves running requests.")] = "30s",
    log_level: Annotated[str, typer.Option(help="info: a line per request; or warning.")] = "info",
    vram: Annotated[str, typer.Option(help="Device budget, for example 14GiB.")] = "auto",
    ram: Annotated[str, typer.Option(help="Host budget.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float16, bfloat16 or float32.")] = "auto",
    weights: Annotated[str, typer.Option(help="auto or native (as stored), or nf4.")] = "auto",
    router_dtype: Annotated[str, typer.Option(help="float32 or hidden.")] = "float32",
    revision: Annotated[str | None, typer.Option(help="Commit of a hub model.")] = None,
) -> None:
    """Answer completions and chats over HTTP, as OpenAI's clients ask for them. Ctrl-C lets running
    requests finish; again, it ends at once."""
    from layersweep.kv.arms import parse

    # the cheapest refusals first: no torch yet
    arms = tuple(parse(item, growing=True) for item in kv.split(","))
    seconds, largest = (
        parse_duration(grace, option="--grace"),
        parse_size(max_body, option="--max-body"),
    )
    _check(api_key, log_level)
    _check_installed()

    from layersweep.serve.guard import Limits
    from layersweep.serve.server import bind
    from layersweep.serve.server import serve as serve_until_signal

    listener = bind(host, port)
    machine = MachineOptions(revision, vram, ram, device, dtype, weights, router_dtype, None)
    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)

    from layersweep.generate.request import Request, Sampling
    from layersweep.serve.app import OPENAI, Offer, Service

    ready = prepare(model, machine, SamplingOptions())
    with scheduled(ready, arms, console, most=max_running, longest=max_length) as scheduler:
        for arm in arms:
            scheduler.check(Request("arm", (0,), Sampling(), arm))
        offer = Offer(
            name or _name(model), ready.tokenizer, arms, scheduler.room.longest,
            ready.sampling if ready.sampling.do_sample else OPENAI,
            Limits(max_waiting=max_waiting, max_body=largest), api_key,
        )  # fmt: skip
        service = Service(
            offer, scheduler,
            say=console.print if log_level == "info" else _say_nothing,
            weight_bytes=lambda: scheduler.counts.weight_bytes_read,
        )  # fmt: skip
        place, taken = listener.getsockname()[:2]
        if api_key is None and not ipaddress.ip_address(place).is_loopback:
            console.print(f"note: {place} can be reached from elsewhere, and there is no --api-key")
        listener.listen()  # who connects from now on is answered
        address = f"[{place}]" if ":" in place else place
        console.print(
            f"serving {offer.name} at http://{address}:{taken}/v1, cache "
            + " or ".join(arm.name for arm in arms)
        )
        serve_until_signal(service, listener, grace=seconds)


def _say_nothing(line: str) -> None:
    pass


def _check(api_key: str | None, log_level: str) -> None:
    if api_key is not None and not api_key.strip():
        raise InputError(
            f"--api-key: found an empty key, perhaps in {KEY}, needed one that clients can send",
            hint=f"leave it out, or unset {KEY}, to ask for none",
        )
    if log_level not in LEVELS:
        raise InputError(f"--log-level: found '{log_level}', needed {' or '.join(LEVELS)}")


def _check_installed() -> None:
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as missing:
        raise InputError(
            f"serve: found no package {missing.name}, needed fastapi and uvicorn",
            hint="pip install layersweep[serve]",
        ) from missing


def _name(model: str) -> str:
    """What requests call it: a folder's last part, or the hub id."""
    folder = Path(model)
    return printable(folder.resolve().name if folder.exists() else model)
