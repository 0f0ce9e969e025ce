"""Shows the library's log on the command line: on standard output, or on standard error for model loading and where standard
output is reserved for JSON."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_LOG = logging.getLogger("saelab")


class Shown(logging.Handler):
    """Prints each message unformatted to the current `sys.stdout` or `sys.stderr`."""

    on_stderr = False

    def emit(self, record: logging.LogRecord) -> None:
        """Print one message."""
        from saelab.features.visible import visible_lines

        to_stderr = Shown.on_stderr or record.name == "saelab.models"
        print(visible_lines(record.getMessage()), file=sys.stderr if to_stderr else sys.stdout, flush=True)


_handler, _blocks, _lock = Shown(), list[int](), threading.Lock()


@contextmanager
def shown() -> Iterator[None]:
    """Show the library's messages inside a `with` block; nested use has no effect."""
    with _lock:
        level = _blocks[0] if _blocks else _LOG.level  # the logger's own, before any block
        if _handler not in _LOG.handlers:
            _LOG.addHandler(_handler)
            _LOG.setLevel(logging.INFO)
        _blocks.append(level)
    try:
        yield
    finally:
        with _lock:  # the last block to end, in whichever thread
            level = _blocks.pop()
            if not _blocks:
                _LOG.removeHandler(_handler)
                _LOG.setLevel(level)


@contextmanager
def on_stderr() -> Iterator[None]:
    """Send messages to standard error inside a `with` block."""
    Shown.on_stderr = True
    try:
        yield
    finally:
        Shown.on_stderr = False
