"""Ctrl-C and SIGTERM that wait for the end of a step, so that what is saved then is the state between two steps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_OWN = {signal.SIGINT: (signal.default_int_handler,), signal.SIGTERM: (signal.SIG_DFL, signal.default_int_handler)}
"""Handlers that may be replaced for a while. Any other is an application's, and stays."""


class Interrupt:
    """`asked` is True once Ctrl-C was pressed, or SIGTERM sent."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """The signal handler; a second signal does not wait."""
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


@contextmanager
def interrupt_between_steps() -> Iterator[Interrupt]:
    """Note SIGINT and SIGTERM instead of acting at once; whoever reads `asked` raises `KeyboardInterrupt`, at the latest the end.

    Only the main thread gets signals.
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
