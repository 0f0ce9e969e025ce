"""Defers Ctrl-C and SIGTERM to the end of a step, so that the saved state is one between two steps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_OWN = {signal.SIGINT: (signal.default_int_handler,), signal.SIGTERM: (signal.SIG_DFL, signal.default_int_handler)}
"""Handlers that may be replaced temporarily. Any other is the application's and is left alone."""


class Interrupt:
    """`asked` is True once SIGINT (Ctrl-C) or SIGTERM has arrived."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """The signal handler; a second signal interrupts at once."""
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


@contextmanager
def interrupt_between_steps() -> Iterator[Interrupt]:
    """Record SIGINT and SIGTERM instead of acting at once; if `asked`, the end of the block raises `KeyboardInterrupt`.

    Callers may check `asked` to stop earlier. Outside the main thread, which alone receives signals, nothing changes.
    """
    interrupt = Interrupt()
    before = {number: signal.getsignal(number) for number in _OWN}
    ours = [number for number, handlers in _OWN.items() if before[number] in handlers]
    if threading.current_thread() is not threading.main_thread():
        ours = []
    for number in ours:
        signal.signal(number, interrupt)
    try:
        yield interrupt
    finally:
        for number in ours:
            signal.signal(number, before[number])
    if interrupt.asked:
        raise KeyboardInterrupt
