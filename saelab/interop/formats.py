"""The formats that saelab reads besides its own, and how the format of some files is found out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from saelab.errors import SaelabError
from saelab.interop import (
    dictionary_learning,
    gemma_scope,
    gemma_scope_2,
    goodfire,
    llama_scope,
    llamascopium,
    mntss,
    mwhanna,
    openai,
    qwen_scope,
    sae_lens,
    sparsify,
)
from saelab.interop.answers import Answers
from saelab.interop.blueprint import Blueprint
from saelab.interop.source import Source


class Format(NamedTuple):
    """What each file of a format defines, as NAME, WANTS, `matches` and `load`."""

    name: str
    wants: str
    """The files it consists of."""
    matches: Callable[[Source], bool]
    load: Callable[[Source, Answers], Blueprint]
    """Reads them. Raises `SaelabError` for what is missing, damaged or not supported."""
    save: Callable[[Blueprint, Path], None] | None = None
    """Writes a folder, where saelab writes this format. Raises `SaelabError` for what it cannot hold."""


_MODULES: tuple[Any, ...] = (
    sae_lens, dictionary_learning, sparsify, gemma_scope, gemma_scope_2, llama_scope, llamascopium, openai, goodfire, qwen_scope,
    mwhanna, mntss,
)  # fmt: skip
FORMATS: dict[str, Format] = {
    one.NAME: Format(one.NAME, one.WANTS, one.matches, one.load, getattr(one, "save", None)) for one in _MODULES
}
"""By name."""


def format_of(source: Source, name: str | None = None) -> Format:
    """The format `name`, or the one that matches. Raises `SaelabError` if none does, or several do."""
    if name is not None:
        return FORMATS[name]
    found = [one for one in FORMATS.values() if one.matches(source)]
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(one.name for one in found)
        raise SaelabError(f"{source.label} matches several formats ({names}): say which, format={found[0].name!r}.")
    if several := _holds(source):
        raise SaelabError(
            f"{source.label} holds {len(several)} SAEs: name one, such as {source.label}/{several[0]} (others: "
            f"{', '.join(several[1:4])}{' ...' if len(several) > 4 else ''})."
        )
    seen = ", ".join(source.names[:8]) or "no file"
    wanted = "; ".join(f"{one.name}: {one.wants}" for one in FORMATS.values())
    raise SaelabError(
        f"{source.label} is of no format that saelab reads. It holds {seen}{' ...' if len(source.names) > 8 else ''}. Wanted are "
        f"sae.json for saelab's own; {wanted}."
    )


def _holds(source: Source) -> list[str]:
    """Folders below that look like SAEs, if there are several."""
    marks = ("sae.json", "cfg.json", "params.npz", "params.safetensors", "ae.pt", "hyperparams.json")
    return sorted({name.rpartition("/")[0] for name in source.names if name.rpartition("/")[2] in marks} - {""})
