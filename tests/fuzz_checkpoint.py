"""Mutates small valid checkpoints: each must be read, or refused by name, and nothing else.

    python tests/fuzz_checkpoint.py --seconds 600 [--seed N] [--out DIR]

Coverage-guided: an input that reaches lines of `layersweep.checkpoint` or `layersweep.families`
which no other did is kept and mutated further. JSON (header, index, config, quant_state) is mutated
as a tree, so that most inputs stay JSON; bytes are flipped, cut and moved too. What is accepted is
read and decoded. Every finding is written to DIR as a checkpoint, with `why.txt`, to become a case
of the corpus.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
import transformers.models.auto.configuration_auto  # noqa: F401  its import is not what is timed
from checkpoint_builders import STATE, pack, tiny_config
from formats import FORMATS, TILE
from hostile_damages import CONFIG, FIRST, INDEX, SECOND, SINGLE, Shard
from hostile_gguf import mutated, valid
from safetensors.torch import save

import layersweep.checkpoint
import layersweep.families
from layersweep.checkpoint import Checkpoint, scan_checkpoint
from layersweep.errors import CheckpointError, InputError
from layersweep.problems import problems_error
from layersweep.stream.blocks import Block, block_specs
from layersweep.stream.reader import RunReader
from layersweep.stream.runs import runs_of

WATCHED = tuple(
    str(Path(package.__file__).parent) for package in (layersweep.checkpoint, layersweep.families)
)
SLOW_S, HANGS_S, LARGE_MB = 1.0, 5.0, 200.0
LONGEST_MESSAGE = 4000

Files = dict[str, bytes]
GGUF = "model.gguf"


# --- inputs --------------------------------------------------------------------------------------


def seeds() -> list[Files]:
    """A Mixtral of 23 tensors in one file and in two: bf16, one NF4 weight with nested scales and
    one with plain ones. A third with its experts fused, in NF4: 12 scales to two nested blocks. Two
    in the formats of other quantizers. A Llama as GGUF."""
    hidden, inner, vocab = 16, 16, 8
    config = tiny_config() | {
        "vocab_size": vocab, "hidden_size": hidden, "intermediate_size": inner,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
        "num_local_experts": 2, "num_experts_per_tok": 1,
    }  # fmt: skip
    layer, shapes = "model.layers.0", {}
    attention = {"q_proj": (16, 16), "k_proj": (8, 16), "v_proj": (8, 16), "o_proj": (16, 16)}
    shapes |= {f"{layer}.self_attn.{name}.weight": shape for name, shape in attention.items()}
    for norm in (f"{layer}.input_layernorm", f"{layer}.post_attention_layernorm", "model.norm"):
        shapes[f"{norm}.weight"] = (hidden,)
    moe = f"{layer}.block_sparse_moe"
    shapes |= {f"{moe}.gate.weight": (2, hidden), "lm_head.weight": (vocab, hidden)}
    shapes["model.embed_tokens.weight"] = (vocab, hidden)
    for expert in range(2):
        shapes |= {f"{moe}.experts.{expert}.{part}.weight": (16, 16) for part in ("w1", "w2", "w3")}
    tensors = {}
    for name, shape in shapes.items():
        weight = torch.linspace(-1, 1, shape[0] * shape[-1]).view(shape[0], -1)[:, : shape[-1]]
        if "q_proj" in name or "k_proj" in name:
            tensors |= pack(name, weight.view(shape), "q_proj" in name)
        else:
            tensors[name] = weight.reshape(-1)[: torch.Size(shape).numel()].view(shape).bfloat16()
    halves = [dict(list(tensors.items())[half::2]) for half in (0, 1)]
    weight_map = {
        name: shard for half, shard in zip(halves, (FIRST, SECOND), strict=True) for name in half
    }
    index = json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}).encode()
    small = {CONFIG: json.dumps(config).encode()}
    fused = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for name, rows, nested in (("gate_up_proj", 32, True), ("down_proj", 16, False)):
        stack = torch.linspace(-1, 1, 2 * rows * 16).view(2, rows, 16)
        fused |= pack(f"{moe}.experts.{name}", stack, nested)
    return [
        small | {SINGLE: save(tensors, {"format": "pt"})},
        small | {SINGLE: save(fused, {"format": "pt"})},
        small | {FIRST: save(halves[0]), SECOND: save(halves[1]), INDEX: index},
        {GGUF: valid().encode()},
        *(_packed(config, shapes, names) for names in (COMPRESSED, ("gptq-sorted",))),
    ]


COMPRESSED = ("int4-sorted", "fp8-blocks", "nvfp4-packed", "nvfp4-modelopt", "fp8-rows", "int4")


def _packed(
    config: dict[str, Any], shapes: dict[str, tuple[int, ...]], names: tuple[str, ...]
) -> Files:
    """The model with its linear layers in one format after the other, as the first one's config
    says."""
    rng, tensors = np.random.default_rng(0), dict[str, torch.Tensor]()
    linear = [name for name in shapes if "_proj" in name or ".experts." in name]
    for name, shape in shapes.items():
        if name not in linear:
            tensors[name] = torch.linspace(-1, 1, math.prod(shape)).view(shape).bfloat16()
            continue
        form = FORMATS[names[linear.index(name) % len(names)]]
        found, _ = form.draw(shape[0], shape[1], rng, False)
        module = name.removesuffix("weight")
        tensors |= {f"{module}{end}": part.contiguous() for end, part in found.items()}
    settings = {**FORMATS[names[0]].settings}
    if "config_groups" in settings:
        block = {"weights": {"num_bits": 8, "block_structure": [*TILE]}}
        settings["config_groups"] = {**settings["config_groups"], "group_1": block}
    fields = config | {"quantization_config": settings}
    return {CONFIG: json.dumps(fields).encode(), SINGLE: save(tensors, {"format": "pt"})}


# --- JSON with every key of an object, repeated ones too -----------------------------------------


class Pairs(list[tuple[str, Any]]):
    """An object of JSON."""


def dump(tree: Any) -> str:
    if isinstance(tree, Pairs):
        return "{" + ",".join(f"{json.dumps(key)}:{dump(value)}" for key, value in tree) + "}"
    if isinstance(tree, list):
        return "[" + ",".join(map(dump, tree)) + "]"
    return tree.text if isinstance(tree, Text) else json.dumps(tree)


@dataclass(frozen=True)
class Text:
    """Text that stands where a value would."""

    text: str


HOSTILE: tuple[Any, ...] = (
    *(0, -1, 1, 2, 3, 7, 63, 255, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 10**400),
    *(0.0, -0.0, 0.5, 1e-300, 1e39, 1e300, float("nan"), float("inf"), -float("inf"), True, False),
    *(None, "", "a", "F32", "BF16", "U8", "F64", "nf4", "fp4", "..", "../x", "\0", "\ud800", "é"),
    *(
        "a" * 300,
        "\ud800.safetensors",
        "a/b.safetensors",
        "é.safetensors",
        SINGLE,
        FIRST,
        SECOND,
        CONFIG,
        "/",
        "model.norm.weight",
        "mixtral",
        "default",
    ),
    *([], [[]], [0], [0, 0], [16], [16, 16], [-1], [2**63, 2**63], [2**62] * 70, [None], [1.0]),
    *(Pairs(), Pairs([("a", 1)]), Pairs([("a", 1), ("a", 2)]), Pairs([("shape", [1])])),
    *(Text("[" * 2000 + "]" * 2000), Text("[" * 30 + "]" * 30), Text("1e999"), Text("-")),
    *(
        Text("9" * 5000),
        Text("9" * 4000),
        Text(f"[{'9' * 4000},{'9' * 4000}]"),
        Text("01"),
        Text("{"),
        Text('"\\ud800"'),
        Text("\x7f"),
    ),
)


def mutate_tree(rng: random.Random, tree: Any) -> Any:
    """One change somewhere in `tree`: a value, a key, one more or one less."""
    containers = list(_containers(tree))
    if not containers or rng.random() < 0.02:
        return rng.choice(HOSTILE)
    place = rng.choice(containers)
    at = rng.randrange(len(place)) if place else 0
    kind = rng.random()
    if not place or kind < 0.15:
        item = _copied(rng, containers) if rng.random() < 0.5 else rng.choice(HOSTILE)
        key = place[at][0] if place and isinstance(place, Pairs) else "a"
        place.insert(at, (key, item) if isinstance(place, Pairs) else item)
    elif kind < 0.25:
        del place[at]
    elif isinstance(place, Pairs) and kind < 0.35:
        keys = [key for other in containers if isinstance(other, Pairs) for key, _ in other]
        place[at] = (rng.choice([*keys, "", "\ud800", "é" * 9, "a.absmax"]), place[at][1])
    else:
        old = place[at][1] if isinstance(place, Pairs) else place[at]
        new = _changed(rng, old, containers)
        place[at] = (place[at][0], new) if isinstance(place, Pairs) else new
    return tree


def _containers(tree: Any) -> Iterator[Any]:
    if isinstance(tree, list):
        yield tree
        for item in tree:
            yield from _containers(item[1] if isinstance(tree, Pairs) else item)


def _copied(rng: random.Random, containers: list[Any]) -> Any:
    """A value from elsewhere in the tree."""
    place = rng.choice([one for one in containers if one] or [[0]])
    chosen = rng.choice(place)
    return chosen[1] if isinstance(place, Pairs) else chosen


def _changed(rng: random.Random, old: Any, containers: list[Any]) -> Any:
    if type(old) is int and rng.random() < 0.6:
        near = (old + 1, old - 1, -old, old * 2, old // 2, old + 2**32, float(old))
        return rng.choice((*near, 0, 2**31 - 1, 2**62, 2**64, Text("9" * 4000)))
    if isinstance(old, str) and old and rng.random() < 0.3:
        at = rng.randrange(len(old))
        return old[:at] + rng.choice(("", "\0", "/", "é", old)) + old[at + rng.randrange(2) :]
    return _copied(rng, containers) if rng.random() < 0.3 else rng.choice(HOSTILE)


# --- mutations of files --------------------------------------------------------------------------


def mutate(rng: random.Random, files: Files) -> Files:
    """A few changes, most often one."""
    files = dict(files)
    while True:
        name = rng.choice(sorted(files))
        kind = rng.random()
        if name == GGUF:
            files[name] = mutated(rng, files[name])
        elif kind < 0.03:
            other = rng.choice(sorted(files))
            files[name], files[other] = files[other], files[name]
        elif kind < 0.05 and len(files) > 2:
            del files[name]
        elif kind < 0.2:
            files[name] = _mutate_bytes(rng, files[name])
        elif name.endswith(".json"):
            files[name] = _mutate_json(rng, files[name])
        elif kind < 0.4:
            files[name] = _mutate_state(rng, files[name])
        else:
            files[name] = _mutate_header(rng, files[name])
        if rng.random() < 0.6:
            return files


def _mutate_bytes(rng: random.Random, raw: bytes) -> bytes:
    changed = bytearray(raw)
    # the head is where lengths and JSON are
    at = rng.randrange(min(len(raw), rng.choice((9, 600, len(raw) or 1))) or 1)
    kind = rng.randrange(4)
    if kind == 0 and changed:
        changed[at] = rng.choice((rng.randrange(256), changed[at] ^ (1 << rng.randrange(8))))
    elif kind == 1:
        changed[at:at] = rng.choice((b"\0", b"\xff", b'"', b"{", b"[", raw[at : at + 99]))
    elif kind == 2:
        del changed[at : at + rng.choice((1, 2, 8, 100))]
    else:
        del changed[at:]
    return bytes(changed)


def _mutate_json(rng: random.Random, raw: bytes) -> bytes:
    try:
        tree = json.loads(raw, object_pairs_hook=Pairs)
        return dump(mutate_tree(rng, tree)).encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError, OverflowError):
        return _mutate_bytes(rng, raw)


def _mutate_header(rng: random.Random, raw: bytes) -> bytes:
    """The JSON behind the length, which is kept right."""
    start = 8 + int.from_bytes(raw[:8], "little")
    header = _mutate_json(rng, raw[8:start])
    return len(header).to_bytes(8, "little") + header + raw[start:]


def _mutate_state(rng: random.Random, raw: bytes) -> bytes:
    """The JSON of a quant_state, with the header kept right."""
    try:
        shard = Shard.parse(raw)
        names = [name for name in shard.header if name.endswith(STATE)]
        name = rng.choice(names)
        state = _mutate_json(rng, shard.tensor(name))
        shard.replace(name, state, "U8", [len(state)])
        return shard.encode()
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError):
        return _mutate_bytes(rng, raw)  # an earlier change has broken it


# --- running -------------------------------------------------------------------------------------


def meet(folder: Path) -> bool:
    """Whether the checkpoint is accepted; raises anything but a refusal."""
    try:
        file = folder / GGUF
        checkpoint, problems = scan_checkpoint(str(file if file.exists() else folder))
        if checkpoint is None:
            raise problems_error(problems)
        read_all(checkpoint)
    except InputError as refusal:
        message = f"{refusal} {refusal.hint}"
        assert len(message) < LONGEST_MESSAGE, f"a message of {len(message)} characters"
        assert message.isprintable(), "a message with control characters"
        assert isinstance(refusal, CheckpointError), "a refusal of another kind"
        return False
    return True


def read_all(checkpoint: Checkpoint) -> None:
    """Every weight, decoded. What was quantized is finite, since its scales were checked."""
    specs = block_specs(checkpoint)
    reader = RunReader(specs)
    try:
        for run in runs_of(specs):
            target = torch.zeros(run.nbytes, dtype=torch.uint8)
            for task in reader.tasks(run, target):
                task()
            reader.check(run, target)
            for number, start in zip(run.blocks, run.offsets, strict=True):
                block = Block(specs[number], target[start : start + specs[number].nbytes])
                for key, placed in block.spec.weights.items():
                    dense = block.dense(key, torch.float32)
                    assert not placed.packed or dense.isfinite().all(), f"{key} is not finite"
    finally:
        reader.close()


@dataclass
class Fuzzer:
    """Owns the inputs that reached something new, and the findings: place of failure -> why."""

    rng: random.Random
    out: Path | None = None
    lines: set[tuple[Any, int]] = field(default_factory=set)
    sound: list[Files] = field(default_factory=list)
    broken: list[Files] = field(default_factory=list)
    findings: dict[str, str] = field(default_factory=dict)
    executions: int = 0
    accepted: int = 0

    def run(self, more: Callable[[], bool]) -> None:
        """Mutate and meet while `more()`."""
        signal.signal(signal.SIGALRM, _hangs)
        self.sound = seeds()
        with tempfile.TemporaryDirectory() as folder:
            for files in self.sound:
                assert self.execute(files, Path(folder) / "model")
            while more():
                # a sound parent reaches deeper: most children of a broken one are refused as it is
                parents = self.sound if self.rng.random() < 0.7 or not self.broken else self.broken
                files = mutate(self.rng, self.rng.choice(parents))
                known = len(self.lines)
                accepted = self.execute(files, Path(folder) / "model")
                if len(self.lines) > known:
                    (self.sound if accepted else self.broken).append(files)

    def execute(self, files: Files, folder: Path) -> bool:
        """Whether it was accepted; what goes wrong becomes a finding."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for name, raw in files.items():
            (folder / name).write_bytes(raw)
        self.executions += 1
        started, peak_mb = time.process_time(), _peak_mb()
        before = sys.gettrace()
        signal.setitimer(signal.ITIMER_REAL, HANGS_S)
        try:
            sys.settrace(self._enter)
            accepted = meet(folder)
        except Exception as failure:
            sys.settrace(before)
            frames = traceback.extract_tb(failure.__traceback__)
            ours = [frame for frame in frames if frame.filename.startswith(WATCHED)] or frames
            where = f"{type(failure).__name__} at {Path(ours[-1].filename).name}:{ours[-1].lineno}"
            self._find(where, traceback.format_exc(), files)
            return False
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            sys.settrace(before)
        seconds, grown_mb = time.process_time() - started, _peak_mb() - peak_mb
        if seconds > SLOW_S:
            self._find("slow", f"{seconds:.1f} s", files)
        if grown_mb > LARGE_MB:
            self._find("large", f"{grown_mb:.0f} MB", files)
        self.accepted += accepted
        return accepted

    def _enter(self, frame: FrameType, event: str, argument: Any) -> Any:
        return self._line if frame.f_code.co_filename.startswith(WATCHED) else None

    def _line(self, frame: FrameType, event: str, argument: Any) -> Any:
        self.lines.add((frame.f_code, frame.f_lineno))
        return self._line

    def _find(self, where: str, why: str, files: Files) -> None:
        if where in self.findings:
            return
        self.findings[where] = why
        if self.out is not None:
            folder = self.out / f"{len(self.findings):03d}"
            folder.mkdir(parents=True)
            for name, raw in (files | {"why.txt": why.encode()}).items():
                (folder / name).write_bytes(raw)


def _hangs(number: int, frame: FrameType | None) -> None:
    raise TimeoutError(f"no answer in {HANGS_S} s")


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("fuzz-findings"))
    given = parser.parse_args()
    started = time.monotonic()
    fuzzer = Fuzzer(random.Random(given.seed), given.out)
    fuzzer.run(lambda: time.monotonic() - started < given.seconds)
    for where, why in fuzzer.findings.items():
        print(f"{where}\n{why}", file=sys.stderr)
    counts = {"fuzz": "checkpoint", "seed": given.seed, "executions": fuzzer.executions}
    refused = fuzzer.executions - fuzzer.accepted - len(fuzzer.findings)
    counts |= {"refused": refused, "accepted": fuzzer.accepted, "findings": len(fuzzer.findings)}
    counts |= {"lines": len(fuzzer.lines), "kept": len(fuzzer.sound + fuzzer.broken)}
    print(json.dumps(counts | {"seconds": round(time.monotonic() - started, 1)}))
    sys.exit(1 if fuzzer.findings else 0)


if __name__ == "__main__":
    main()
