"""The allocator switch takes effect on glibc, once, is harmless to repeat, and gives large pages where the kernel has some."""

import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from saelab.kernels import allocator
from saelab.kernels.allocator import keep_freed_memory

_SWITCH = Path("/sys/kernel/mm/transparent_hugepage/enabled")

# A process of its own: in a worker of the suite the heap is full of what other tests left, and a block may lie anywhere.
# The control is memory that asks the kernel directly; what the control is refused, nobody can be promised.
_PROCESS = """
import ctypes, json, mmap, runpy, sys
N = 1 << 26  # 64 MB

def large_page_bytes(address):
    here = False
    for line in open("/proc/self/smaps"):
        first = line.split()[0]
        if not first.endswith(":"):
            start, _, end = first.partition("-")
            here = int(start, 16) <= address < int(end, 16)
        elif here and first == "AnonHugePages:":
            return 1024 * int(line.split()[1])
    return 0

if sys.argv[2] == "asked":
    assert runpy.run_path(sys.argv[1])["keep_freed_memory"]()
libc = ctypes.CDLL(None)
libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
block = libc.malloc(N)
ctypes.memset(block, 1, N)
control = mmap.mmap(-1, N, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
control.madvise(mmap.MADV_HUGEPAGE)
address = ctypes.addressof(ctypes.c_char.from_buffer(control))
ctypes.memset(address, 1, N)
print(json.dumps({"block": large_page_bytes(block + N // 2) / N, "control": large_page_bytes(address + N // 2) / N}))
"""


def shares_in_large_pages(mode):
    done = subprocess.run(
        [sys.executable, "-c", _PROCESS, allocator.__file__, mode],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return json.loads(done.stdout)


def test_it_is_taken_on_glibc():
    assert keep_freed_memory() is (platform.libc_ver()[0] == "glibc")
    assert keep_freed_memory() == keep_freed_memory()


@pytest.mark.skipif(
    not _SWITCH.exists() or "[madvise]" not in _SWITCH.read_text(), reason="large pages are not by request here"
)
def test_a_large_block_lies_in_large_pages():
    if not keep_freed_memory():
        pytest.skip("not glibc")
    assert shares_in_large_pages("not asked")["block"] == 0
    share = shares_in_large_pages("asked")
    if share["control"] < 0.9:
        pytest.skip(
            f"the kernel has few large pages now: memory that asks for them lies in them to {share['control']:.0%}"
        )
    assert share["block"] > 0.5
