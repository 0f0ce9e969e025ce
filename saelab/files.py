"""Writing files so that nothing half-written is ever visible: temporary name, fsync, rename, fsync of the folder."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saelab.errors import SaelabError

if TYPE_CHECKING:
    from torch import Tensor


LOCK = ".lock"


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Give a temporary name beside `path`; on a clean exit it is flushed to disk and renamed to `path`.

    Raises `SaelabError` when the disk is full; whatever stood at `path` before is then untouched.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        fsync_dir(path.parent)
    except OSError as error:
        raise_if_disk_full(error, path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def raise_if_disk_full(error: Exception, path: Path) -> None:
    """Turn "no space left" (disk, quota or file-size limit) into a `SaelabError` that says what to do."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
    if full or "No space left" in str(error) or "File too large" in str(error):
        raise SaelabError(
            f"The disk is full while writing {path}. Everything written before is intact: make room and repeat the same call."
        ) from error


def fsync_dir(path: str | Path) -> None:
    """Make a rename in the folder `path` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def atomic_write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8 to `path`, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def atomic_write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON to `path`, whole or not at all. NaN is refused (`ValueError`): JSON has none."""
    atomic_write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def atomic_save_safetensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Save tensors (made contiguous) to `path`, whole or not at all."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        try:
            save_file(ready, temporary, dict(metadata) if metadata else None)
        except SafetensorError as error:
            raise_if_disk_full(error, Path(path))
            raise


def read_json(path: str | Path) -> Any:
    """Read a JSON file; a `SaelabError` names the file when it is missing or not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise SaelabError(f"{path} does not exist.") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise SaelabError(f"{path} is not valid JSON ({error}). It was altered or truncated: make it anew.") from error


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


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """One "key: old -> new" for each value that differs, "a.b" for those inside dicts; hashes are cut short."""
    before, now = _flat(old), _flat(new)
    keys = [key for key in {**before, **now} if before.get(key, _ABSENT) != now.get(key, _ABSENT)]
    return [f"{key}: {_short(before.get(key, _ABSENT))} -> {_short(now.get(key, _ABSENT))}" for key in keys]


_ABSENT = "(none)"


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _short(value: Any) -> str:
    text = re.sub(r"\b([0-9a-f]{12})[0-9a-f]{52}\b", r"\1...", str(value))
    return text if len(text) <= 80 else f"{text[:80]}..."


def claim_folder(folder: str | Path, marker: str, kind: str) -> Path:
    """Make `folder` for a `kind` ("cache", "SAE", "feature store"), or accept one that already holds the file `marker`.

    Raises `ValueError` when the folder holds something else, so that a bad `out_dir` never mixes with other work.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out_dir={str(folder)!r} is a file; give a folder for the {kind}.")
    folder.mkdir(parents=True, exist_ok=True)
    home = (folder / marker).parent  # of a claim that was cut off before its marker was written
    begun = {home} if home != folder and home.is_dir() and not _lasting(home) else set()
    others = _lasting(folder) - begun
    if others and not (folder / marker).is_file():
        names = ", ".join(sorted(entry.name for entry in others)[:3])
        raise ValueError(
            f"out_dir={str(folder)!r} already holds something else ({names}) and no {marker}; "
            f"give an empty or new folder for the {kind}."
        )
    return folder


def _lasting(folder: Path) -> set[Path]:
    """What a folder holds beside temporaries and locks."""
    return {entry for entry in folder.iterdir() if ".tmp-" not in entry.name and entry.name != LOCK}
