"""The allocator switch takes effect on glibc, once, and is harmless to repeat."""

import platform

from saelab.allocator import keep_freed_memory


def test_it_is_taken_on_glibc():
    assert keep_freed_memory() is (platform.libc_ver()[0] == "glibc")
    assert keep_freed_memory() == keep_freed_memory()
