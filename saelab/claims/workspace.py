"""Where experiments keep what several of them read, such as harvests: in the folder of a `saelab bench claims`, so that the next
call finds it; elsewhere in a temporary folder that the process removes when it ends."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path

_FOLDER: ContextVar[Path | None] = ContextVar("folder", default=None)


@contextmanager
def kept_in(folder: Path) -> Iterator[None]:
    """While active, experiments keep their harvests in `folder`."""
    token = _FOLDER.set(folder)
    try:
        yield
    finally:
        _FOLDER.reset(token)


def workspace() -> Path:
    """The folder to keep things in."""
    return _FOLDER.get() or _temporary()


@cache
def _temporary() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="saelab-claims-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
