"""Going on with less memory: somebody else has taken some, or a plan was too tight.

Tiles are fixed by the protocol, so what shrinks is the number of them that ride on one sweep.
"""

from __future__ import annotations

import errno
from dataclasses import replace

import torch

from layersweep.environment import Budget, ram_budget, vram_budget
from layersweep.errors import BudgetError, Fallback, MachineError
from layersweep.study.study import Study
from layersweep.units import format_bytes

# Of RuntimeErrors; torch.OutOfMemoryError is one class for all GPUs, the CPU has none.
_HOST_WORDS = ("can't allocate memory", "not enough memory", "can't start new thread")
_WORDS = (*_HOST_WORDS, "CUBLAS_STATUS_ALLOC_FAILED", "CUDA error: out of memory")
KEPT = "with --out finished sweeps are kept: --resume continues after them once memory is free"


def out_of_memory(failure: BaseException) -> bool:
    """Whether an allocation failed, of the device or of the host."""
    if isinstance(failure, (torch.OutOfMemoryError, MemoryError)):
        return True
    if isinstance(failure, OSError):
        return failure.errno == errno.ENOMEM
    return isinstance(failure, RuntimeError) and any(word in str(failure) for word in _WORDS)


def of_the_host(failure: BaseException) -> bool:
    """Whether it was host memory that was not to be had, which fewer tiles do not help on a GPU."""
    host = isinstance(failure, (MemoryError, OSError))
    return host or any(word in str(failure) for word in _HOST_WORDS)


def shrink(study: Study, why: str) -> Fallback:
    """Plan what is left of `study` with half of the tiles in a sweep, within what is free now.

    The memory of the old plan has been given back. Raises MachineError where one tile at a time
    is too much, too.
    """
    model, old = study.model, study.plan
    units = None if study.sweeping or not study.generation else study.generation.units
    parts = len(old.sweeps if units is None else units)
    if units and parts == len(study.to_generate):
        raise MachineError(
            f"the device ran out of memory ({why}), and tiles are generated one at a time already",
            hint=f"a smaller --niah-context, or --niah-mode teacher; {KEPT}",
        )
    device = str(model.compute.device)
    where = "host" if model.cpu else "device"
    if not model.cpu:
        torch.cuda.empty_cache()
    try:
        host = ram_budget("auto")
        free = vram_budget("auto", device, host=host)
        room = min(model.vram.bytes, old.device_bytes - 1, free.bytes + model.context_bytes)
        ram = model.ram if model.ram.bytes <= host.bytes else host
        study.model = replace(model, vram=Budget(room, f"what is free now ({why})"), ram=ram)
        study.plan_rest(at_least=2 * parts)
    except BudgetError as failure:
        raise MachineError(
            f"the {where} ran out of memory ({why}), and no smaller plan fits: {failure}",
            hint=KEPT,
        ) from failure
    return Fallback(
        f"{where} memory",
        f"{format_bytes(old.device_bytes)} in {len(old.sweeps)} sweep(s)",
        f"{format_bytes(study.plan.device_bytes)} in {len(study.plan.sweeps)} more",
        why,
    )
