"""`layersweep codec check`: does one's own KV codec keep the contract?"""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

codec = typer.Typer(name="codec", help="One's own KV codecs.", no_args_is_help=True,
                    rich_markup_mode=None)  # fmt: skip
WORDS = {True: Text("kept", "green"), False: Text("broken", "bold red"), None: Text("-", "yellow")}


@codec.callback()
def _group() -> None:
    """One's own KV codecs."""


@codec.command("check")
def check(
    name: Annotated[str, typer.Argument(metavar="FILE.py:CLASS", help="Or an entry point's name.")],
    bits: Annotated[str, typer.Option(help="Bits of keys and values.")] = "K3V2",
    dim: Annotated[int, typer.Option(help="Head size.", min=8)] = 128,
    seed: Annotated[int, typer.Option(help="Seed of the vectors.", min=0)] = 0,
) -> int:
    """Check a codec against every promise of the contract; exit 2 if one is broken."""
    from layersweep.kv.arms import parse
    from layersweep.kv.check import check as look

    arm = parse(f"{name}:{bits}")
    assert arm.codec is not None
    verdicts = look(arm.codec, dim=dim, seed=seed)
    table = Table(box=None, show_header=False, pad_edge=False)
    for verdict in verdicts:
        table.add_row(WORDS[verdict.kept], verdict.promise, Text(verdict.detail, "dim"))
    Console().print(table)
    broken = sum(verdict.kept is False for verdict in verdicts)
    Console().print(f"{arm.name}: {'contract kept' if not broken else f'{broken} promises broken'}")
    return 2 if broken else 0
