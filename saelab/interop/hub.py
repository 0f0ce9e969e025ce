"""SAEs on the Hugging Face hub: "org/repo/path/of/the/sae", read at one commit, which `sae.json` records."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

from saelab.errors import SaelabError
from saelab.interop.source import Source

_ID = re.compile(r"[\w.-]+/[\w.-]+(?:/.*)?")


class HubPath(NamedTuple):
    """A repository and the folder or file in it."""

    repo: str
    inside: str

    @property
    def label(self) -> str:
        return f"{self.repo}/{self.inside}".rstrip("/")


def parse(source: str) -> HubPath | None:
    """ "org/repo/path"; None for what cannot be a hub id."""
    if not _ID.fullmatch(source) or source.startswith((".", "/")) or "//" in source:
        return None
    owner, repo, *inside = source.strip("/").split("/")
    return HubPath(f"{owner}/{repo}", "/".join(inside))


class HubSource(Source):
    """Files of a repository at one commit; each is downloaded when it is read, and resumed if that was interrupted."""

    def __init__(self, where: HubPath, revision: str | None = None) -> None:
        self.where = where
        self.commit, self.all_names = _listing(where, revision)
        names, only = _below(where, self.all_names)
        super().__init__(where.label, names, only)
        self.folder = where.inside if only is None else where.inside.rpartition("/")[0]

    def fetch(self, name: str) -> Path:
        return self._download(f"{self.folder}/{name}".lstrip("/"))

    def above(self, name: str) -> Path | None:
        path = f"{self.folder.rpartition('/')[0]}/{name}".lstrip("/")
        return self._download(path) if self.folder and path in self.all_names else None

    def _download(self, path: str) -> Path:
        from huggingface_hub import hf_hub_download

        if path not in self.all_names:
            raise SaelabError(f"{self.where.repo} has no {path}.")
        try:
            return Path(hf_hub_download(self.where.repo, path, revision=self.commit))
        except Exception as error:
            raise SaelabError(_why(self.where, self.commit, error)) from error

    @property
    def record(self) -> dict[str, Any]:
        return {"source": self.label, "revision": self.commit}


def _listing(where: HubPath, revision: str | None) -> tuple[str, tuple[str, ...]]:
    """The commit and all files of the repository; offline, those of the cache."""
    from huggingface_hub import HfApi, constants

    try:
        if constants.HF_HUB_OFFLINE:
            return _cached(where, revision)
        info = HfApi().model_info(where.repo, revision=revision)
    except Exception as error:  # the hub's library has many, and its network libraries others
        raise SaelabError(_why(where, revision, error)) from error
    return str(info.sha), tuple(file.rfilename for file in info.siblings or ())


def _cached(where: HubPath, revision: str | None) -> tuple[str, tuple[str, ...]]:
    """The commit asked for, or the one downloaded last, and what the cache has of it."""
    from huggingface_hub import scan_cache_dir

    kept = [one for repo in scan_cache_dir().repos if repo.repo_id == where.repo for one in repo.revisions]
    fitting = [one for one in kept if revision in (None, one.commit_hash, *one.refs)]
    if not fitting:
        raise FileNotFoundError(f"{len(kept)} commits are cached")
    latest = max(fitting, key=lambda one: one.last_modified)
    return latest.commit_hash, tuple(
        file.file_path.relative_to(latest.snapshot_path).as_posix() for file in latest.files
    )


def _below(where: HubPath, names: tuple[str, ...]) -> tuple[list[str], str | None]:
    """The files below the folder, as relative paths, and the file if `where` is one. Raises `SaelabError` if it is neither."""
    folder, only = where.inside, None
    if where.inside in names:
        folder, _, only = where.inside.rpartition("/")
    prefix = f"{folder}/" if folder else ""
    found = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
    if not found:
        near = sorted({name.rpartition("/")[0] for name in names} - {""})
        raise SaelabError(
            f"{where.repo} has no {where.inside}; it has {', '.join(near[:5]) or 'no folders'}{' ...' if len(near) > 5 else ''}."
        )
    return found, only


def _why(where: HubPath, revision: str | None, error: Exception) -> str:
    from huggingface_hub import constants, errors

    at = f" at revision {revision!r}" if revision else ""
    if constants.HF_HUB_OFFLINE:
        return f"{where.label}{at} is not in the cache, and HF_HUB_OFFLINE is set: unset it to download ({type(error).__name__})."
    if isinstance(error, errors.GatedRepoError):
        return f"{where.repo} is gated: ask for access on its page, then log in (hf auth login, or set HF_TOKEN)."
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{where.repo} has no revision {revision!r}: name a branch, tag or commit of it."
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"{where.label} is no path here, and there is no repository {where.repo} that you may read: check the name; for a "
            "private one log in (hf auth login, or set HF_TOKEN)."
        )
    return (
        f"{where.label}{at} could not be read from the hub ({type(error).__name__}: {str(error).splitlines()[0]}): check the "
        "network and HF_ENDPOINT, or download it once and set HF_HUB_OFFLINE=1."
    )
