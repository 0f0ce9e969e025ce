"""What the library logs, as the command line shows it: on standard output; on standard error where that holds JSON, and what
is said of a model being loaded."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_LOG = logging.getLogger("saelab")


class Shown(logging.Handler):
    """Prints each message, as it is, to the stream that is current then."""

    on_stderr = False

    def emit(self, record: logging.LogRecord) -> None:
        """One line."""
        to_stderr = Shown.on_stderr or record.name == "saelab.models"
        print(record.getMessage(), file=sys.stderr if to_stderr else sys.stdout, flush=True)


@contextmanager
def shown() -> Iterator[None]:
    """Show the library's messages inside a `with`; where they are shown already nothing changes."""
    if any(isinstance(handler, Shown) for handler in _LOG.handlers):
        yield
        return
    handler, level = Shown(), _LOG.level
    _LOG.addHandler(handler)
    _LOG.setLevel(logging.INFO)
    try:
        yield
    finally:
        _LOG.removeHandler(handler)
        _LOG.setLevel(level)


@contextmanager
def on_stderr() -> Iterator[None]:
    """Inside a `with` standard output is left to others."""
    Shown.on_stderr = True
    try:
        yield
    finally:
        Shown.on_stderr = False
