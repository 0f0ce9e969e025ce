"""Atomic file writing: temporary name, fsync, rename, fsync of the folder, so that no partial file is ever visible."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from saelab.errors import SaelabError

if TYPE_CHECKING:
    from torch import Tensor


LOCK = ".lock"


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path next to `path`; on a clean exit the file is flushed to disk and renamed to `path`.

    Raises `SaelabError` if that fails (disk full, no permission); whatever was at `path` before is then untouched.
    """
    path = Path(path)
    temporary = temporary_path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent, path.name)
        try:
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
            fsync_dir(path.parent)
        finally:
            with suppress(OSError):  # must not mask the original error
                temporary.unlink(missing_ok=True)


def check_writable(path: str | Path, name: str) -> None:
    """Raise `ValueError` if `path` is a folder, `SaelabError` if no file can be written there: before what takes long."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{name}={str(path)!r} is a folder; name a file, such as one in it.")
    with writing(path, "Nothing was done"):
        home = next(folder for folder in path.absolute().parents if os.path.lexists(folder))
        if not home.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "a file where a folder must be")
        if not os.access(home, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, "permission denied")


def temporary_path(path: Path, owner: int | None = None) -> Path:
    """Temporary path where this process, or the one with number `owner`, builds `path`."""
    machine, pid = divmod(process_number() if owner is None else owner, _PIDS)
    return path.with_name(f".{path.name}.tmp-{machine:08x}-{pid}")


_PIDS = 2**23  # Linux has at most 2**22 process ids
_ABANDONED = 24 * 60 * 60  # seconds after which files of another machine count as abandoned


def process_number() -> int:
    """A number for this process among those of all machines that may share a disk."""
    return zlib.crc32(socket.gethostname().encode()) * _PIDS + os.getpid()


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Remove temporary files that killed processes left in `folder` (only those of `name`, if it is given).

    Files of other machines on the same disk are removed only if untouched for a day: their processes cannot be checked here.
    """
    machine = f"{process_number() // _PIDS:08x}"
    for entry in folder.iterdir():
        match = re.fullmatch(r"\.(.+)\.tmp-(?:([0-9a-f]{8})-)?(\d+)", entry.name)
        if match is None or (name is not None and match[1] != name):
            continue
        is_elsewhere = match[2] not in (None, machine)  # the first version's names have no machine
        if _is_fresh(entry) if is_elsewhere else _is_running(int(match[3])):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)


def _is_fresh(entry: Path) -> bool:
    with suppress(FileNotFoundError):
        files = [entry, *entry.rglob("*")] if entry.is_dir() and not entry.is_symlink() else [entry]
        return time.time() - max(file.lstat().st_mtime for file in files) < _ABANDONED
    return True


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True


@contextmanager
def writing(path: str | Path, advice: str = "Everything written before is intact") -> Iterator[None]:
    """Turn operating-system errors on writing `path` into a `SaelabError` with the path, the cause and the fix."""
    try:
        yield
    except SaelabError:
        raise
    except Exception as error:
        in_text = re.search(r"os error (\d+)", str(error))  # from safetensors, in Rust's wording
        number = error.errno if isinstance(error, OSError) else int(in_text[1]) if in_text else None
        if number is None:
            raise
        fix = _FIXES.get(number, f"{path} cannot be written ({error})")
        raise SaelabError(f"{fix.format(path=path)}. {advice}.") from error


_FULL = "The disk is full while writing {path} (no space, quota or file-size limit): free some space and repeat the same call"
_FORBIDDEN = "{path} cannot be written, as permission is denied: choose a folder you can write to, or change its mode"
_BELOW_A_FILE = "{path} cannot be written, as there is a file where a folder must be: choose another path"
_FIXES = {
    **dict.fromkeys((errno.ENOSPC, errno.EFBIG, errno.EDQUOT), _FULL),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), _FORBIDDEN),
    **dict.fromkeys((errno.ENOTDIR, errno.EEXIST), _BELOW_A_FILE),
    errno.EBUSY: "{path} cannot be replaced, as it is a mount point or in use: choose a new folder inside it",
    errno.ENOTEMPTY: "{path} cannot be replaced, as there are files in it: choose an empty or new folder",
}


@contextmanager
def locked(folder: Path, busy: str, *, shared: bool = False) -> Iterator[None]:
    """Hold the lock of `folder`, released however the process ends; several may hold it `shared`. Raises `SaelabError(busy)` if
    another process holds it."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("ab")
    with file:
        if not _acquired(file, fcntl.LOCK_SH if shared else fcntl.LOCK_EX, _LOCK_ATTEMPTS):
            raise SaelabError(busy)
        yield


def is_locked(folder: Path) -> bool:
    """Whether a process on this machine holds the lock of `folder`."""
    try:
        with (folder / LOCK).open("rb") as file:
            return not _acquired(file, fcntl.LOCK_SH, 1)
    except OSError:
        return False


_LOCK_ATTEMPTS = 10  # in 0.2 s: `is_locked` holds the lock for a moment


def _acquired(file: IO[bytes], kind: int, attempts: int) -> bool:
    for attempt in range(attempts):
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.02 if attempt + 1 < attempts else 0)
        else:
            return True
    return False


def fsync_dir(path: str | Path) -> None:
    """Make a rename in the folder `path` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def atomic_write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8 to `path`, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def atomic_write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON to `path`, atomically. Raises `ValueError` for NaN, which JSON cannot represent."""
    atomic_write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def atomic_save_safetensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Save tensors (made contiguous) to `path`, atomically."""
    from safetensors.torch import save_file

    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        save_file(ready, temporary, dict(metadata) if metadata else None)


def read_json(path: str | Path) -> Any:
    """Read a JSON file. Raises `SaelabError` naming the file if it is missing or not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise SaelabError(f"{path} does not exist.") from error
    except OSError as error:
        raise SaelabError(f"{path} cannot be read ({error.strerror}).") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise SaelabError(
            f"{path} is not valid JSON ({error}). It was altered or truncated: create it again."
        ) from error


def sha256_file(path: str | Path) -> str:
    """SHA-256 of a file's bytes, as hex."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes, types and bytes of tensors, as hex."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def claim_folder(folder: str | Path, marker: str, kind: str) -> Path:
    """Create `folder` for a `kind` ("cache", "SAE", "feature store"), or accept one that already holds the file `marker`.

    Raises `ValueError` if the folder holds something else, so that a wrong `out_dir` never leads to mixed files.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out_dir={str(folder)!r} is a file; choose a folder for the {kind}.")
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
    home = (folder / marker).parent  # left by a claim interrupted before its marker was written
    begun = {home} if home != folder and home.is_dir() and not _lasting(home) else set()
    others = _lasting(folder) - begun
    if others and not (folder / marker).is_file():
        names = ", ".join(sorted(entry.name for entry in others)[:3])
        raise ValueError(
            f"out_dir={str(folder)!r} already holds something else ({names}) and no {marker}; "
            f"choose an empty or new folder for the {kind}."
        )
    return folder


def _lasting(folder: Path) -> set[Path]:
    """Entries of a folder besides temporary files and locks."""
    return {entry for entry in folder.iterdir() if ".tmp-" not in entry.name and entry.name != LOCK}
