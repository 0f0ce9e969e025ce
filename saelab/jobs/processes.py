"""Which process does a job: its number and when it started, so that another one that got the same number later is never taken
for it, let alone killed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple


class Process(NamedTuple):
    """A process of one machine."""

    host: str
    pid: int
    started: str
    """When: in clock ticks after which boot; elsewhere than on Linux, as `ps` writes it."""

    @property
    def is_here(self) -> bool:
        return self.host == socket.gethostname()

    @property
    def is_running(self) -> bool:
        """Whether it runs on this machine."""
        return self.is_here and self.pid > 0 and _started(self.pid) == self.started

    def send(self, number: signal.Signals) -> bool:
        """Send a signal to this very process; returns whether it was there."""
        if not hasattr(os, "pidfd_open"):
            if running := self.is_running:
                os.kill(self.pid, number)
            return running
        try:
            handle = os.pidfd_open(self.pid)  # stays with the process, whoever gets its number afterwards
        except (OSError, OverflowError):
            return False
        try:
            if not self.is_running:
                return False
            signal.pidfd_send_signal(handle, number)
        except ProcessLookupError:
            return False
        finally:
            os.close(handle)
        return True


def this_process() -> Process:
    """The process that asks."""
    return Process(socket.gethostname(), os.getpid(), _started(os.getpid()) or "")


def _started(pid: int) -> str | None:
    """When the process with this number started; None if there is none, or it has ended."""
    if not Path("/proc/self/stat").exists():
        found = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True)
        return found.stdout.strip() or None
    with suppress(OSError, IndexError):
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        if fields[0] not in "ZX":  # ended, but not yet collected by its parent
            return f"{fields[19]} after {Path('/proc/sys/kernel/random/boot_id').read_text().strip()}"
    return None
