"""A table of released SAEs (`releases.parquet`): repository, path, format, model and claimed L0, for use without a network.

The facts are those of the list that comes with SAELens 6.54 (MIT), for the formats that saelab reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from saelab.interop.names import model_id

_TABLE = Path(__file__).with_name("releases.parquet")


class Release(NamedTuple):
    """One released SAE."""

    release: str
    """Name of the release in SAELens."""
    repo: str
    path: str
    """Folder or file in the repository."""
    format: str
    model: str
    """Hugging Face id."""
    l0: float | None
    """Features per token, as its authors measured."""
    scale: float | None
    """What its input is multiplied by, where the files do not say."""

    @property
    def source(self) -> str:
        """What `load_sae` takes."""
        return f"{self.repo}/{self.path}"


@cache
def releases() -> tuple[Release, ...]:
    """All known SAEs."""
    import pyarrow.parquet

    rows = pyarrow.parquet.read_table(_TABLE).to_pylist()
    return tuple(Release(**{**row, "model": model_id(row["model"])}) for row in rows)


def search(words: Sequence[str]) -> list[Release]:
    """The SAEs in whose release, repository, path, format or model every word occurs, without regard to case."""
    wanted = [word.lower() for word in words]
    return [one for one in releases() if all(word in " ".join(map(str, one[:5])).lower() for word in wanted)]


def known(source: str) -> Release | None:
    """The entry of a hub id, or None."""
    if Path(source).is_absolute():
        return None
    return next((one for one in releases() if one.source == source), None)
