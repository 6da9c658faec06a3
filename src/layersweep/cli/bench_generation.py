"""`layersweep bench decode` and `bench batch`: tokens per second over the floor of the same run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from layersweep.cli.bench_line import load_for_bench, print_line, say
from layersweep.units import format_bytes

if TYPE_CHECKING:
    from layersweep.bench.generation import Load

Json = dict[str, Any]
LEAST_SHOWN_MS = 0.01

Source = Annotated[str, typer.Argument(metavar="MODEL", help="Folder or file; see `synth`.")]
Arms = Annotated[str, typer.Option(help="The caches, measured one after the other.")]
Prompt = Annotated[int, typer.Option(help="Tokens of a prompt, random ones.", min=1)]
Peers = Annotated[
    bool, typer.Option("--peers", help="Beside it: transformers, its CPU offload, llama.cpp.")
]
Vram = Annotated[str, typer.Option(help="Device budget, enforced in torch's allocator.")]
Ram = Annotated[str, typer.Option(help="Host budget.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[str, typer.Option(help="auto, float16, bfloat16 or float32.")]
Capability = Annotated[
    str | None, typer.Option(help="Use the code paths of an older GPU, for example 7.5.")
]


def decode(
    model: Source,
    kv: Arms = "exact,K4V2",
    prompt_tokens: Prompt = 256,
    new_tokens: Annotated[int, typer.Option(help="Tokens of the answer.", min=2)] = 64,
    peers: Peers = False,
    vram: Vram = "auto",
    ram: Ram = "auto",
    device: Device = "auto",
    dtype: Dtype = "auto",
    assume_capability: Capability = None,
) -> None:
    """One stream: tokens per second over 1 / (missed bytes / bus + read bytes / memory)."""
    from layersweep.bench.generation import Load

    load = Load(1, prompt_tokens, new_tokens)
    _bench("decode", model, kv, load, peers, (vram, ram, device, assume_capability), dtype)


def batch(
    model: Source,
    streams: Annotated[int, typer.Option(help="Texts at once.", min=2)] = 256,
    kv: Arms = "exact,K4V2",
    prompt_tokens: Prompt = 256,
    new_tokens: Annotated[int, typer.Option(help="Tokens of an answer.", min=2)] = 128,
    peers: Peers = False,
    vram: Vram = "auto",
    ram: Ram = "auto",
    device: Device = "auto",
    dtype: Dtype = "auto",
    assume_capability: Capability = None,
) -> None:
    """Many streams, all submitted at once: reading and decoding over their floors, beside one."""
    from layersweep.bench.generation import Load

    load = Load(streams, prompt_tokens, new_tokens)
    _bench("batch", model, kv, load, peers, (vram, ram, device, assume_capability), dtype)


def _bench(
    name: str, source: str, kv: str, load: Load, with_peers: bool,
    place: tuple[str, str, str, str | None], dtype: str,
) -> None:  # fmt: skip
    from layersweep.bench.generate_peers import Peers as Others
    from layersweep.bench.generation import bench_generation
    from layersweep.kv.arms import EXACT, parse_arms

    arms = [EXACT] if "exact" in kv.lower().split(",") else []
    arms += parse_arms(kv, growing=True)
    model = load_for_bench(source, *place, on_cpu=True, dtype=dtype)
    rows = bench_generation(model, arms, load, say)
    if with_peers:
        rows += Others(model, load).measured(say)
    print_line(name, model, rows, _table(rows))


def _table(rows: list[Json]) -> Table:
    """Ours, with the parts of a walk below, and peers."""
    table = Table(box=None, pad_edge=False)
    for name in ("", "tokens/s", "of floor", "a walk", "hits", "read/s", "of floor"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for row in rows:
        if "left_out" in row:
            table.add_row(row["job"], "left out")
        elif "decode" not in row:
            table.add_row(row["job"], f"{row['tokens_per_s']:.2f}")
        else:
            _add(table, row)
    return table


def _add(table: Table, row: Json) -> None:
    made, read, peak = row["decode"], row["prefill"], row["peak_device_bytes"]
    walk = f"{1e3 * made['wall_s'] / made['walks']:.2f} ms"
    table.add_row(row["requested"], *_rate(made), walk, f"{made['hit_rate']:.1%}", *_rate(read))
    for part, spent in sorted(made["ms_per_walk"].items(), key=lambda of: -of[1]):
        if spent >= LEAST_SHOWN_MS:
            table.add_row(f"  {part}", "", "", f"{spent:.2f} ms")
    if "one_stream" in row:
        faster = f"{row['over_one_stream']:.1f} x"
        table.add_row("  one stream", *_rate(row["one_stream"]), "all over it", faster)
    planned = format_bytes(row["planned_device_bytes"])
    table.add_row(
        "  planned" if peak is None else "  peak, planned",
        *([] if peak is None else [format_bytes(peak)]),
        planned,
    )


def _rate(walks: Json) -> tuple[str, str]:
    return f"{walks['tokens_per_s']:.2f}", f"{walks['share_of_floor']:.1%}"
