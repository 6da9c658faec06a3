"""`layersweep bench`: speeds of the engine against the ceilings of the machine it runs on.

Progress goes to stderr; the last line on stdout is one JSON object.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from layersweep.cli.bench_generation import batch, decode
from layersweep.cli.bench_line import load_for_bench, print_line, say
from layersweep.errors import InputError

if TYPE_CHECKING:
    from layersweep.bench.peers import PeerResult

CODEC_ARMS = (
    ",".join(
        f"{method}:{pair}{option}"
        for method, option in (
            *(("trellis", ""), ("trellis", "@states=1024"), ("voronoi", ""), ("turbo", "")),
            *(("lloyd", ""), ("e8", ""), ("kivi", "")),
        )
        for pair in ("K2V2", "K3V3", "K4V4")
    )
    + ",int2,int4,q4_0,q4_0@rotate=1,q8_0,fp8"
)

OF_VECTORS, OF_MODEL = ("dim", "vectors", "seed"), ("text", "segments", "prefix", "continuation")

bench = typer.Typer(
    name="bench", help="Speeds against the ceilings of this machine, and what codecs lose.",
    no_args_is_help=True, rich_markup_mode=None,
)  # fmt: skip

bench.command("decode")(decode)
bench.command("batch")(batch)

Checkpoint = Annotated[str, typer.Argument(metavar="MODEL", help="Folder; see `synth`.")]
Vram = Annotated[str, typer.Option(help="Device budget, enforced in torch's allocator.")]
Ram = Annotated[str, typer.Option(help="Host budget.")]
Device = Annotated[str, typer.Option(help="cuda or cuda:N.")]
Capability = Annotated[
    str | None, typer.Option(help="Use the code paths of an older GPU, for example 7.5.")
]


@bench.command("study")
def study(
    model: Checkpoint,
    kv: Annotated[str, typer.Option(help="Arms besides `exact`.")] = "K3V2,K4V2",
    tasks: Annotated[
        str, typer.Option(help="ppl, niah, or both, one after the other.")
    ] = "ppl,niah",
    segments: Annotated[int, typer.Option(help="Perplexity windows.", min=1)] = 80,
    niah_per_depth: Annotated[int, typer.Option(help="Needles per depth.", min=1)] = 6,
    evict: Annotated[
        bool, typer.Option("--evict", help="Drop the files from the page cache first.")
    ] = False,
    vram: Vram = "14GiB",
    ram: Ram = "auto",
    device: Annotated[str, typer.Option(help="cuda, cuda:N, or cuda:0,cuda:1.")] = "cuda",
    assume_capability: Capability = None,
) -> None:
    """The paired study at full size: wall time over floor, stalls, peak memory."""
    from layersweep.bench.study import bench_study
    from layersweep.tasks.settings import EvalSettings

    settings = EvalSettings(
        kv=kv, tasks=tuple(part.strip() for part in tasks.split(",")), segments=segments,
        niah_per_depth=niah_per_depth,
    )  # fmt: skip
    if "," in device:
        from layersweep.bench.devices import Place, bench_devices

        if evict:
            raise InputError(
                f"--evict: found several devices in --device {device}, needed one",
                hint="--device cuda:0: all devices share one disk",
            )
        rows = bench_devices(
            Place(model, vram, ram, assume_capability), device.split(","), settings, say
        )
        first = load_for_bench(model, vram, ram, device.split(",")[0], assume_capability)
        print_line("study", first, rows)
        return
    loaded = load_for_bench(model, vram, ram, device, assume_capability)
    print_line("study", loaded, bench_study(loaded, settings, cold=evict, say=say))


@bench.command("sweep")
def sweep(
    model: Checkpoint,
    vram: Vram = "14GiB",
    ram: Ram = "auto",
    device: Device = "cuda",
    assume_capability: Capability = None,
) -> None:
    """One sweep of 64 tokens, bound by the bus, and one of 204,800, bound by arithmetic."""
    from layersweep.bench.sweep import bench_sweep

    loaded = load_for_bench(model, vram, ram, device, assume_capability)
    print_line("sweep", loaded, bench_sweep(loaded, say=say))


@bench.command("peers")
def peers(
    model: Checkpoint,
    layers: Annotated[int, typer.Option(help="Full-size layers to run.", min=1)] = 4,
    tokens: Annotated[int, typer.Option(help="Tokens of a forward pass.", min=1)] = 1024,
    vram: Vram = "14GiB",
    device: Device = "cuda",
) -> None:
    """One forward pass as others do it, a few layers scaled to all, on this machine."""
    from layersweep.bench.peers import measure_cpu_offload, measure_sync_nf4
    from layersweep.sweep.choices import resolve_device
    from layersweep.units import parse_size

    loaded = load_for_bench(model, vram, "auto", device, None)
    place, cap = resolve_device(device), parse_size(vram, option="--vram")
    checkpoint = loaded.checkpoint

    def sync_nf4() -> PeerResult:
        return measure_sync_nf4(model, place, layers, tokens, cap)

    def cpu_offload() -> PeerResult:
        path = checkpoint.folder / "config.json"
        if not path.is_file():
            raise InputError(f"{checkpoint.folder}: found a GGUF file, needed a config.json")
        config = json.loads(path.read_text("utf-8"))
        return measure_cpu_offload(config, checkpoint.decoder, place, layers, tokens, cap)

    peers = {"per-layer synchronous NF4": sync_nf4, "transformers with CPU offload": cpu_offload}
    print_line("peers", loaded, [measured_peer(name, measure) for name, measure in peers.items()])


def measured_peer(name: str, measure: Callable[[], PeerResult]) -> dict[str, Any]:
    """A peer's row, or why it is left out."""
    from dataclasses import asdict

    say(name)
    try:
        result = measure()
    except InputError as why:
        say(f"left out: {why}")
        return {"job": name, "name": name, "left_out": str(why)}
    return {"job": result.name, **asdict(result)}


@bench.command("codec")
def codec(
    context: typer.Context,
    kv: Annotated[
        str | None, typer.Option(help="Arms; of vectors, their key bits are measured.")
    ] = None,
    dim: Annotated[int, typer.Option(help="Head size.", min=8)] = 128,
    vectors: Annotated[int, typer.Option(help="Vectors per arm.", min=512)] = 16_384,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    seed: Annotated[int, typer.Option(help="Seed of the vectors.", min=0)] = 0,
    model: Annotated[str | None, typer.Option(help="Measure its keys and values instead.")] = None,
    text: Annotated[str | None, typer.Option(help="With --model: UTF-8 text.")] = None,
    segments: Annotated[int, typer.Option(help="With --model: windows.", min=1)] = 4,
    prefix: Annotated[int, typer.Option(help="With --model: tokens coded.", min=1)] = 1024,
    continuation: Annotated[int, typer.Option(help="With --model: tokens after.", min=2)] = 128,
) -> None:
    """What KV codecs lose at the bits that they store: error, logit KL, speed. No model needed;
    with one, what each stream of each layer costs alone."""
    other = OF_MODEL if model is None else OF_VECTORS
    for name in other:
        if (source := context.get_parameter_source(name)) and source.name == "COMMANDLINE":
            found = "no --model, needed one" if model is None else "--model, needed none"
            raise InputError(f"--{name}: found {found} with it", hint="see `bench codec --help`")
    if model is not None:
        from layersweep.bench.sensitivity import Sample
        from layersweep.cli.sensitivity import bench_model

        bench_model(model, kv or "K3V2", Sample(text, segments, prefix, continuation), device)
        return
    from layersweep.bench.codec import Bench, bench_codecs
    from layersweep.environment import device_facts, versions
    from layersweep.kv.arms import parse_arms
    from layersweep.sweep.choices import resolve_device

    place = resolve_device(device)
    rows = bench_codecs(parse_arms(kv or CODEC_ARMS), Bench(dim, vectors, seed, place), say)
    table = Table(box=None, pad_edge=False)
    for name in ("arm", "bits", "MSE", "before gain", "key KL", "encoded/s", "decoded/s"):
        table.add_column(name, justify="left" if name == "arm" else "right")
    for row in rows:
        simulated = " (sim.)" if row["simulated"] else ""
        bits = "?" if row["bits_per_element"] is None else f"{row['bits_per_element']:.3f}"
        table.add_row(
            row["job"] + simulated, bits, f"{row['mse']:.5f}",
            f"{row['mse_before_gain']:.5f}", f"{row['key_kl']:.4f}",
            f"{row['encode_vectors_per_s']:,.0f}", f"{row['decode_vectors_per_s']:,.0f}",
        )  # fmt: skip
    Console(stderr=True).print(table)
    line = {"bench": "codec", "dim": dim, "vectors": vectors, "seed": seed, "rows": rows,
            "device": device_facts(place), "versions": dict(versions())}  # fmt: skip
    typer.echo(json.dumps(line, allow_nan=False))
