"""Keep freed memory, in huge pages, for the next tensor instead of returning it to the operating system (glibc only).

By default glibc maps a fresh region for every large block, and the kernel zeroes its pages on first touch; a model's
forward pass and a training step allocate dozens of such blocks. Reusing them made SmolLM2 about 25 % and a TopK step about
10 % faster (2 cores). Row gathers are then bound by TLB misses; 2 MB pages instead of 4 KB made them about 25 % faster.
"""

from __future__ import annotations

import ctypes
import functools
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h
_KEEP_BYTES = 2**31 - 1
_MADV_HUGEPAGE, _PAGE = 14, 4096  # sys/mman.h
_RESERVED_BYTES = 2**31 - 2**26  # below _KEEP_BYTES, so that freeing it does not trim the heap


@functools.cache
def keep_freed_memory() -> bool:
    """Ask glibc to serve large blocks from its heap and to keep up to 2 GB of it free; once per process.

    Returns whether glibc accepted; without glibc it does nothing and returns False. Numerical results do not change.
    """
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return False
    kept = bool(libc.mallopt(_M_MMAP_MAX, 0)) and bool(libc.mallopt(_M_TRIM_THRESHOLD, _KEEP_BYTES))
    if kept:
        _ask_for_large_pages(libc)
    return kept


def _ask_for_large_pages(libc: ctypes.CDLL) -> None:
    """Reserve heap addresses (memory is committed on first use), mark them for huge pages, and free them for later tensors."""
    libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    block = libc.malloc(_RESERVED_BYTES)
    if block is None:
        return
    start = -(-block // _PAGE) * _PAGE
    # If the kernel refuses, pages stay small.
    libc.madvise(start, (block + _RESERVED_BYTES - start) // _PAGE * _PAGE, _MADV_HUGEPAGE)
    libc.free(block)
