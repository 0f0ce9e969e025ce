"""The errors saelab raises besides `ValueError`: each message names the value, what was expected, and the fix. And how any error
reads in one line."""

from __future__ import annotations

import sys
from traceback import walk_tb


class SaelabError(Exception):
    """Base of all errors that saelab raises deliberately, except those for bad argument values."""


class ModelError(SaelabError):
    """A language model could not be fetched, read or run."""


class CacheError(SaelabError):
    """An activation cache is damaged, not a saelab cache, or does not match the call."""


class TrainingError(SaelabError):
    """Training failed: non-finite numbers, too little memory, a lost rank, or a folder that holds another run."""


class SteeringError(SaelabError):
    """An edit applied to nothing, so that what looks steered is not."""


class StoreError(SaelabError):
    """A feature store is missing, damaged, or belongs to another SAE."""


def explain(error: Exception) -> str | None:
    """One line for an error the user can fix: from saelab, the system, or another library. None for a bug in saelab, which
    needs its traceback.
    """
    if isinstance(error, ValueError | SaelabError) and not _is_foreign(error):
        return str(error)
    kind = type(error).__name__
    if isinstance(error, ImportError):
        return f"{error}: install that package (pip install 'saelab[wandb,notebook]' installs the optional ones)."
    if isinstance(error, OSError | MemoryError) or kind == "OutOfMemoryError":
        return f"{kind}: {error}. Check the path, free disk space and free memory."
    if _is_foreign(error):
        return f"{_raised_in(error)} raised {kind}: {error}. Set SAELAB_DEBUG=1 for the traceback."
    return None


def _is_foreign(error: Exception) -> bool:
    return _raised_in(error) not in ("saelab", *sys.stdlib_module_names)


def _raised_in(error: Exception) -> str:
    """The package whose code raised the error; standard-library frames count as their caller's."""
    packages = [frame.f_globals.get("__name__", "").partition(".")[0] for frame, _ in walk_tb(error.__traceback__)]
    return next((name for name in reversed(packages) if name not in sys.stdlib_module_names), "saelab")
