"""What a user may choose of a machine, and what that comes to on this one."""

from __future__ import annotations

import torch

from layersweep.errors import InputError

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def resolve_device(device: str) -> str:
    """ "cuda:0" or "cpu" for a --device argument; raises InputError for what is not there."""
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        return "cuda:0" if available else "cpu"
    if device == "cpu":
        return device
    if "," in device:
        raise InputError(
            f"--device {device}: found several devices, needed one for one process",
            hint="`layersweep eval --device cuda:0,cuda:1` starts a process for each",
        )
    kind, _, index = device.partition(":")
    if kind != "cuda" or not (index or "0").isdigit():
        raise InputError(
            f"--device: found '{device}', needed auto, cpu, cuda or cuda:N",
            hint="--device auto takes a GPU if there is one",
        )
    if int(index or 0) >= available:
        raise InputError(
            f"--device {device}: found {available} CUDA devices, needed number {index or 0}",
            hint="--device cpu, or see `layersweep doctor`",
        )
    return f"cuda:{int(index or 0)}"


def resolve_dtype(dtype: str, device: str) -> torch.dtype:
    """float16 on a GPU and float32 on the CPU, unless a GPU is told otherwise."""
    one_of("--dtype", dtype, ("auto", *DTYPES))
    if device == "cpu":
        if dtype not in ("auto", "float32"):
            raise InputError(
                f"--dtype {dtype}: found device cpu, which computes in float32 alone",
                hint="--dtype float32 (or auto)",
            )
        return torch.float32
    return DTYPES["float16" if dtype == "auto" else dtype]


def generation_dtype(dtype: str, device: str) -> str:
    """What --dtype auto means where texts are made: bfloat16 on GPUs that compute with it (sm_80+),
    since a text that goes on must not overflow. Studies compute in float16, see resolve_dtype."""
    place = resolve_device(device)
    if dtype != "auto" or place == "cpu":
        return dtype
    return "bfloat16" if torch.cuda.get_device_capability(place) >= (8, 0) else "float16"


def resolve_capability(text: str | None, device: str) -> tuple[int, int] | None:
    """(7, 5) of "7.5". Raises InputError for a CPU, and for more than the device has."""
    if text is None:
        return None
    if device == "cpu":
        raise InputError(
            f"--assume-capability {text}: found device cpu, needed a GPU",
            hint="leave it out: the CPU has one path",
        )
    found = torch.cuda.get_device_capability(device)
    major, dot, minor = text.partition(".")
    if not (major.isdigit() and dot and minor.isdigit()) or (int(major), int(minor)) > found:
        raise InputError(
            f"--assume-capability: found '{text}', needed a capability up to this device's "
            f"{found[0]}.{found[1]}",
            hint="--assume-capability 7.5 takes the paths of a T4",
        )
    return int(major), int(minor)


def one_of(option: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InputError(
            f"{option}: found '{value}', needed one of {', '.join(allowed)}",
            hint=f"{option} {allowed[0]}",
        )
