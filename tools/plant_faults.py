"""Which faults of a model the gate refuses: damaged copies of the bundled one, with its card and as
a stranger's model, which has none.

    python tools/plant_faults.py        about a minute; a JSON line per fault

`with_card` and `without_card` hold the exit code (2 damaged input, 3 the gate, 0 not noticed) and
the message of `layersweep eval FOLDER --gate only`.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import layersweep.demo
from layersweep.cli.app import run

DEMO = Path(layersweep.demo.__path__[0])
LAYERS = 6
TEXT_CHARACTERS = 20_000  # the gate reads the first 256 tokens

Fault = Callable[[Path], None]


def copy_demo(folder: Path, *, card: bool = True) -> Path:
    """The bundled model in `folder`, to be damaged."""
    shutil.copytree(DEMO / "model", folder)
    if not card:
        (folder / "card.json").unlink()
    return folder


def rewrite(
    folder: Path,
    change: Callable[[str, Tensor], Tensor] = lambda name, tensor: tensor,
    rename: Callable[[str], str] = lambda name: name,
) -> None:
    """Write every shard and the index anew, each tensor under `rename(name)`."""
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        changed = {rename(name): change(name, tensor) for name, tensor in tensors.items()}
        save_file(changed, file, metadata={"format": "pt"})
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] = {rename(name): file for name, file in index["weight_map"].items()}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def tensor(name: str, change: Callable[[Tensor], Tensor]) -> Fault:
    """`change` the tensors whose names end in `name`."""

    def plant(folder: Path) -> None:
        rewrite(folder, lambda found, old: change(old) if found.endswith(name) else old)

    return plant


def first_nan(old: Tensor) -> Tensor:
    return torch.cat((torch.full_like(old[:1], torch.nan), old[1:]))


def packed_zeros(old: Tensor) -> Tensor:
    return torch.full_like(old, 0x77)  # code 7 of NF4 is 0.0, and a byte holds two


def swap_w1_w3(pattern: str) -> Fault:
    """Gate and up projections exchanged in the experts of the layers that match `pattern`."""

    def other(name: str) -> str:
        if not re.search(rf"\.layers\.{pattern}\..*\.experts\.", name):
            return name
        return re.sub(r"\.w([13])\.", lambda found: f".w{4 - int(found[1])}.", name)

    return lambda folder: rewrite(folder, rename=other)


def rope_theta(theta: float) -> Fault:
    def plant(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config["rope_parameters"]["rope_theta"] = theta
        (folder / "config.json").write_text(json.dumps(config))

    return plant


def norm_of(name: str, source: str) -> Fault:
    """One norm's weight in the place of another's."""

    def plant(folder: Path) -> None:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        with safe_open(folder / index["weight_map"][source], framework="pt") as stored:
            weight = stored.get_tensor(source)
        tensor(name, lambda old: weight)(folder)

    return plant


WRONG_NORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "ones": torch.ones_like,
    "zeros": torch.zeros_like,
    "times 3": lambda old: 3 * old,
}
FINAL_NORM = "model.norm.weight"
EXPERTS = "block_sparse_moe.experts"

FAULTS: dict[str, Fault] = {
    "a NaN scale in layer 4": tensor(f"4.{EXPERTS}.3.w2.weight.nested_absmax", first_nan),
    "w1 and w3 swapped in all layers": swap_w1_w3(r"\d+"),
    **{f"rope_theta {theta:g}": rope_theta(theta) for theta in (1e2, 1e4, 1e5, 1e7, 1e8)},
    **{f"last norm {how}": tensor(FINAL_NORM, change) for how, change in WRONG_NORMS.items()},
    "last norm a layer's": norm_of(FINAL_NORM, "model.layers.0.input_layernorm.weight"),
    **{
        f"router of layer {layer} zero": tensor(
            f"{layer}.block_sparse_moe.gate.weight", packed_zeros
        )
        for layer in range(LAYERS)
    },
    **{f"w1 and w3 swapped in layer {layer}": swap_w1_w3(str(layer)) for layer in range(LAYERS)},
    **{
        f"{kind} norm of layer {layer} {how}": tensor(f"{layer}.{stored}.weight", change)
        for kind, stored in (
            ("attention", "input_layernorm"),
            ("expert", "post_attention_layernorm"),
        )
        for how, change in WRONG_NORMS.items()
        for layer in range(LAYERS)
    },
}  # fmt: skip


def gate(folder: Path) -> tuple[int, str]:
    """Exit code and message of the gate on the model in `folder`."""
    text = folder / "text.txt"
    text.write_text((DEMO / "text/heldout.txt").read_text("utf-8")[:TEXT_CHARACTERS], "utf-8")
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        code = run(["eval", str(folder), "--gate", "only", "--device", "cpu", "--text", str(text)])
    return code, "".join(re.findall(r"^error: (.*)", said.getvalue(), re.MULTILINE))


def main() -> None:
    torch.set_num_threads(1)  # short products: where cores are shared, threads wait for each other
    for name, plant in FAULTS.items():
        line: dict[str, object] = {"fault": name}
        for key, card in (("with_card", True), ("without_card", False)):
            with tempfile.TemporaryDirectory() as empty:
                folder = copy_demo(Path(empty) / "model", card=card)
                plant(folder)
                line[key] = gate(folder)
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
