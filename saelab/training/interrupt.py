"""Ctrl-C that waits for the end of a step, so that what is saved then is the state between two steps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupt:
    """`asked` is True once Ctrl-C was pressed."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """The signal handler; a second Ctrl-C does not wait."""
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


@contextmanager
def interrupt_between_steps() -> Iterator[Interrupt]:
    """Note Ctrl-C instead of raising it at once; whoever reads `asked` raises `KeyboardInterrupt`, at the latest the end.

    Only the main thread gets signals, and a handler that is not Python's own (an application's) stays in place.
    """
    interrupt = Interrupt()
    own = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not own or threading.current_thread() is not threading.main_thread():
        yield interrupt
        return
    signal.signal(signal.SIGINT, interrupt)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if interrupt.asked:
        raise KeyboardInterrupt
