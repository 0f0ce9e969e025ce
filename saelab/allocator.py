"""Keep freed memory for the next tensor instead of handing it back to the kernel (glibc only).

glibc maps every large block anew and the kernel zeroes its pages on first touch; a model's forward pass and a training
step make dozens of such blocks. Reusing them made SmolLM2 a quarter faster and a TopK step a tenth (2 cores).
"""

from __future__ import annotations

import ctypes
import functools
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h
_KEEP_BYTES = 2**31 - 1


@functools.cache
def keep_freed_memory() -> bool:
    """Ask glibc to serve large blocks from its heap and to keep up to 2 GB of it free; once a process.

    True when it did; elsewhere nothing happens. Numbers do not change, only where they are stored.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, _KEEP_BYTES))
