"""Any Hugging Face safetensors folder -> the same model in NF4, as bitsandbytes publishes it.

Headers are read first and everything is planned: names, shards, sizes. Then threads take a tensor
each, in pieces. Memory does not grow with the model: a thread holds one piece, and the scales of
one weight.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from layersweep.checkpoint.header import FLOAT_NAMES
from layersweep.checkpoint.linear import FLOATS, Planned, plan_tensors, unpacked_modules
from layersweep.checkpoint.packing import Format, Job, copy, pack
from layersweep.checkpoint.shard_file import ShardFile
from layersweep.checkpoint.shards import INDEX, SINGLE
from layersweep.checkpoint.storage.bitsandbytes import BLOCKSIZES
from layersweep.checkpoint.unquantized import CONFIG, Source, copy_beside, open_source
from layersweep.checkpoint.writer import REPORT_EVERY_S, make_folder
from layersweep.errors import InputError, MachineError

SHARD_BYTES = 4_900_000_000
MEGABYTE = 10**6

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Quantized:
    """Bytes of all weights before and after, the number of packed ones, names of the others."""

    before: int
    after: int
    packed: int
    kept: tuple[str, ...]


def quantize(
    source: Path, destination: Path, *, blocksize: int = 64, nested: bool = True,
    shard_bytes: int = SHARD_BYTES, threads: int | None = None,
    progress: Progress = lambda phase, done, total: None,
) -> Quantized:  # fmt: skip
    """Write the model of folder `source` as NF4 into folder `destination`, which must be empty.

    `nested`: double quantization. `progress` hears of megabytes read. config.json comes last, so
    a folder that was left early opens nowhere; if it fails, what it wrote is taken away again.
    Raises InputError for arguments, a source or a destination that cannot be used, MachineError
    where the disk fails on the way.
    """
    if blocksize not in BLOCKSIZES:
        raise InputError(f"--blocksize: found {blocksize}, needed one of "
                         f"{', '.join(map(str, BLOCKSIZES))}", hint="--blocksize 64")  # fmt: skip
    opened, form = open_source(source), Format(blocksize, nested)
    planned = list(plan_tensors(opened.tensors))
    if not any(tensor.linear for tensor in planned):
        raise InputError(f"{source}: found no weight of a linear layer, needed one to pack",
                         hint="give the folder of a language model")  # fmt: skip
    jobs = [Job.of(tensor, form) for tensor in planned]
    make_folder(destination, sum(job.nbytes for job in jobs), "name a folder on a larger disk")
    total = sum(tensor.stored.nbytes for tensor in planned)
    with _nothing_left(destination) as made:
        after = _write_shards(destination, _shards(jobs, shard_bytes), made, _Work(
            form, total, threads or os.cpu_count() or 1, progress))  # fmt: skip
        copy_beside(opened, destination, made)
        _write_json(destination / CONFIG, _config(opened, planned, form), made)
    kept = tuple(tensor.name for tensor in planned if not tensor.linear)
    return Quantized(total, after, len(planned) - len(kept), kept)


@contextmanager
def _nothing_left(folder: Path) -> Iterator[list[Path]]:
    """A list for the files that are made: they are removed again if what follows fails."""
    made: list[Path] = []
    try:
        yield made
    except BaseException as failure:
        for path in made:
            path.unlink(missing_ok=True)
        if isinstance(failure, OSError):
            raise MachineError(f"{failure.filename or folder}: {failure.strerror}",
                               hint="name a folder on a larger disk") from failure  # fmt: skip
        raise


def _shards(jobs: Sequence[Job], shard_bytes: int) -> dict[str, list[Job]]:
    """Consecutive tensors per file, each with all its parts, under the names that the hub uses."""
    shards: list[list[Job]] = [[]]
    held = 0
    for job in jobs:
        if held and held + job.nbytes > shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append(job)
        held += job.nbytes
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    numbered = (
        f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)
    )
    return dict(zip(numbered, shards, strict=True))


@dataclass
class _Work:
    """How tensors are packed, how many bytes were read of each, and whether to stop."""

    form: Format
    total: int
    threads: int
    progress: Progress
    done: dict[str, int] = field(default_factory=dict)
    stop: threading.Event = field(default_factory=threading.Event)

    def report(self) -> None:
        self.progress("MB read", sum(self.done.values()) // MEGABYTE, self.total // MEGABYTE)


class _Stopped(Exception):
    """Another thread failed; nobody looks at this one's failure."""


def _write_shards(
    folder: Path, shards: Mapping[str, Sequence[Job]], made: list[Path], work: _Work
) -> int:
    """File after file, and the index of several; returns the bytes of all tensors."""
    weight_map: dict[str, str] = {}
    after = 0
    for name, jobs in shards.items():
        rows = (row for job in jobs for row in job.rows)
        states = (job.state for job in jobs if job.state)
        with closing(ShardFile(folder / name, rows, states)) as shard:
            made.append(shard.path)
            shard.finish(_write_tensors(shard, jobs, work))
        weight_map |= dict.fromkeys(shard.tensors, name)
        after += shard.nbytes
    if len(shards) > 1:
        index = {"metadata": {"total_size": after}, "weight_map": weight_map}
        _write_json(folder / INDEX, index, made)
    return after


def _write_tensors(shard: ShardFile, jobs: Sequence[Job], work: _Work) -> dict[str, bytes]:
    """Several tensors at once; returns the states, whose sizes were not known before."""
    states: dict[str, bytes] = {}

    def write(job: Job) -> None:
        name = job.tensor.name

        def advance(nbytes: int) -> None:
            if work.stop.is_set():
                raise _Stopped
            work.done[name] = work.done.get(name, 0) + nbytes

        with job.tensor.stored.file.open("rb", buffering=0) as file:
            if job.state is None:
                copy(job, file.fileno(), shard, advance)
            else:
                states[job.state] = pack(job, file.fileno(), shard, work.form, advance)

    with ThreadPoolExecutor(work.threads) as pool:
        running = {pool.submit(write, job) for job in jobs}
        try:
            while running:
                done, running = wait(running, REPORT_EVERY_S, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
                work.report()
        except BaseException:
            work.stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    return states


def _config(source: Source, planned: Sequence[Planned], form: Format) -> dict[str, object]:
    """config.json with the settings that transformers' BitsAndBytesConfig writes."""
    sizes = dict.fromkeys(FLOATS, 0)
    for tensor in planned:
        if tensor.linear:
            sizes[tensor.stored.dtype] += tensor.stored.nbytes
    settings = {
        "quant_method": "bitsandbytes",
        "_load_in_8bit": False,
        "_load_in_4bit": True,
        "llm_int8_threshold": 6.0,
        "llm_int8_skip_modules": unpacked_modules(planned),
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": form.nested,
        "bnb_4bit_compute_dtype": FLOAT_NAMES[max(FLOATS, key=lambda dtype: sizes[dtype])],
        "bnb_4bit_quant_storage": "uint8",
        "load_in_4bit": True,
        "load_in_8bit": False,
    }
    return {**source.config, "quantization_config": settings}


def _write_json(path: Path, fields: Mapping[str, object], made: list[Path]) -> None:
    made.append(path)
    path.write_text(json.dumps(fields, indent=2) + "\n", "utf-8")
