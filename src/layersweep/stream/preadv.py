"""The system's preadv, called with an array of addresses.

os.preadv wants a memoryview for each place, made anew wherever a run lands in its ring, while the
thread that launches kernels waits. ctypes passes one address for all of them, and lets other
threads run while it reads. Both functions exist on the same systems: Linux, and macOS from 11.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable
from functools import cache

import numpy as np
from numpy.typing import NDArray

# [n, 2], as struct iovec: an address (below 2**63 in any process), and how many bytes go there
Vectors = NDArray[np.int64]
MOST_VECTORS = 1024  # of one call: IOV_MAX of every system


def preadv(handle: int, vectors: Vectors, offset: int) -> int:
    """Fill memory from byte `offset` of a file on; the bytes that it took.

    Fewer than asked for where the file ends, for more than MOST_VECTORS, or as the system likes.
    The memory must stay until this returns. Raises OSError.
    """
    address, count = vectors.__array_interface__["data"][0], min(len(vectors), MOST_VECTORS)
    while (done := _function()(handle, address, count, offset)) < 0:
        number = ctypes.get_errno()
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))
    return done


def remaining(vectors: Vectors, count: int) -> Vectors:
    """What is still to be filled once the first `count` bytes are."""
    ends = np.cumsum(vectors[:, 1])
    first = int(np.searchsorted(ends, count, side="right"))
    rest = vectors[first:].copy()
    if len(rest):
        begun = count - (ends[first] - rest[0, 1])
        rest[0] += (begun, -begun)
    return rest


@cache
def _function() -> Callable[[int, int, int, int], int]:
    function = ctypes.CDLL(None, use_errno=True).preadv
    # off_t has 64 bits on all systems that torch is built for
    function.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_int64)
    function.restype = ctypes.c_ssize_t
    return function
