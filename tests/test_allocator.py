"""The allocator switch takes effect on glibc, once, is harmless to repeat, and gives large pages where the kernel has them."""

import platform
from pathlib import Path

import pytest
import torch

from saelab.kernels.allocator import keep_freed_memory

_SWITCH = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def test_it_is_taken_on_glibc():
    assert keep_freed_memory() is (platform.libc_ver()[0] == "glibc")
    assert keep_freed_memory() == keep_freed_memory()


@pytest.mark.skipif(not _SWITCH.exists() or "[never]" in _SWITCH.read_text(), reason="this kernel gives no large pages")
def test_a_large_tensor_lies_in_large_pages():
    if not keep_freed_memory():
        pytest.skip("not glibc")
    x = torch.ones(1 << 24)  # 64 MB
    assert _large_page_bytes(x.data_ptr() + x.nbytes // 2) > x.nbytes / 2


def _large_page_bytes(address: int) -> int:
    """In large pages, of the mapping that holds an address."""
    here = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if not first.endswith(":"):
            start, _, end = first.partition("-")
            here = int(start, 16) <= address < int(end, 16)
        elif here and first == "AnonHugePages:":
            return 1024 * int(line.split()[1])
    return 0
