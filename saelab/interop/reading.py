"""Reads an SAE of another library: files -> blueprint -> SAE, with a record of where it came from and what was assumed."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Mapping
from typing import Any

from saelab.errors import SaelabError
from saelab.interop.answers import Answers, revised
from saelab.interop.blueprint import Blueprint, build
from saelab.interop.formats import format_of
from saelab.interop.releases import Release, known
from saelab.interop.source import Source
from saelab.saes import SAE

log = logging.getLogger(__name__)

_UNREADABLE = (
    KeyError, IndexError, TypeError, AttributeError, ValueError, AssertionError, RuntimeError, ZeroDivisionError,
)  # fmt: skip
"""What code that reads files of a known form raises where they are of another."""


def read(source: Source, format: str | None = None, assume: Mapping[str, Any] | None = None) -> SAE:
    """The SAE in these files. Raises `SaelabError` naming the file and the fix, `ValueError` for unknown keys of `assume`."""
    plan = read_blueprint(source, format, assume)
    sae = build_from(plan, source.label)
    if assumed := plan.origin["imported"]["assumed"]:
        said = ", ".join(f"{key}={value!r}" for key, value in assumed.items())
        log.info("%s does not say %s: assumed. To change it: assume={...}.", source.label, said)
    return sae


def read_blueprint(source: Source, format: str | None = None, assume: Mapping[str, Any] | None = None) -> Blueprint:
    """What the files describe, with `origin["imported"]`: format, source, hash of the weights, what was assumed."""
    entry = known(source.label)
    answers = Answers(assume, {} if entry is None else {"scale": entry.scale})
    chosen = format_of(source, format or (entry.format if entry else None))
    try:
        plan = chosen.load(source, answers)
    except _UNREADABLE as error:
        if isinstance(error, ValueError) and "assume" in str(error):
            raise
        raise SaelabError(
            f"{source.label} does not hold what {chosen.name} files hold ({type(error).__name__}: {error}): check its config, or "
            "say another format=."
        ) from error
    plan = revised(_with_listed(plan, entry), answers.given)
    imported = {"format": chosen.name, **source.record, "weights_sha256": _weights_hash(source)}
    imported |= {"assumed": answers.assumed, "given": {key: _plain(value) for key, value in answers.given.items()}}
    return dataclasses.replace(plan, origin={**plan.origin, "imported": imported})


def _with_listed(plan: Blueprint, entry: Release | None) -> Blueprint:
    """With the model and the L0 of the list of releases, where the files name none."""
    if entry is None:
        return plan
    listed = {"model": {"name": entry.model}} | ({"claims": {"l0": entry.l0}} if entry.l0 else {})
    return dataclasses.replace(plan, origin=listed | dict(plan.origin))


def build_from(plan: Blueprint, label: str) -> SAE:
    """`build`, whose errors then name the source."""
    try:
        return build(plan)
    except (SaelabError, *_UNREADABLE) as error:
        raise SaelabError(f"{label}: {error}") from error


def _weights_hash(source: Source) -> str:
    """SHA-256 over the weight files that were read, in the order of their names."""
    digest = hashlib.sha256()
    for name in source.files_read:
        with source.fetch(name).open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    return value if isinstance(value, str | int | float | bool) or value is None else str(value)
