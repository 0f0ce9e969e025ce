"""One row per SAE of a RUN: what it is, from `sae.json`, and what it scored, from its report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from saelab.errors import SaelabError
from saelab.files import read_json
from saelab.runs import SaeRun

_SPARSITY = (("target_l0", "target L0"), ("k", "k"), ("l1_coefficient", "l1"), ("sparsity_coefficient", "sparsity"))
"""Settings that say how sparse an SAE is, the first that is set counts; and how they are written."""


class Summary(NamedTuple):
    """What is known of one SAE; None where it is not. Shares are 0 to 1, KL in nats per token."""

    name: str
    variant: str | None
    d_sae: int | None
    sparsity: tuple[str, float] | None
    """The setting and its value: ("k", 32)."""
    hook_name: str | None
    model: str | None
    fvu: float | None
    l0: float | None
    dead_fraction: float | None
    ce_loss_recovered: float | None
    kl: float | None
    n_tokens: int | None
    """Tokens that the report scored."""
    config: dict[str, Any]
    """`sae.json`; while it is trained, what `checkpoints/run.json` says of it."""
    report: dict[str, Any]
    faults: tuple[str, ...]
    """Files that were altered."""


def summary(sae: SaeRun) -> Summary:
    """The row of one SAE. A file that was altered is left out, and said in `faults`."""
    faults: list[str] = []
    config, report = _read(sae.sae_dir / "sae.json", faults), _read(sae.report_path, faults)
    if not (sae.sae_dir / "sae.json").exists():
        config = _read(sae.sae_dir / "checkpoints" / "run.json", faults)
    settings = _object(config.get("config"))
    return Summary(
        sae.name,
        _text(config.get("variant")),
        _integer(config.get("d_sae")) or _integer(settings.get("d_sae")),
        _sparsity(settings),
        _text(report.get("hook_name")) or _text(config.get("hook_name")) or _hook_of(config),
        _model(config),
        fvu=_number(report.get("fvu")),
        l0=_number(report.get("l0")),
        dead_fraction=_number(report.get("dead_fraction")),
        ce_loss_recovered=_number(report.get("ce_loss_recovered")),
        kl=_number(report.get("kl")),
        n_tokens=_integer(report.get("n_tokens")),
        config=config,
        report=report,
        faults=tuple(faults),
    )


def ordered(rows: Sequence[Summary], by: str, descending: bool = False) -> list[Summary]:
    """Rows by one of the columns; those without a value come last. Raises `ValueError` for an unknown column."""
    if by not in Summary._fields[: Summary._fields.index("config")]:
        raise ValueError(f"by={by!r} is no column; there are {', '.join(Summary._fields[:-3])}.")
    known = [row for row in rows if getattr(row, by) is not None]
    return sorted(known, key=lambda row: getattr(row, by), reverse=descending) + [
        row for row in rows if getattr(row, by) is None
    ]


def scored_apart(rows: Sequence[Summary]) -> list[int]:
    """The numbers of tokens that the rows were scored on, smallest first, if they differ; else []."""
    found = sorted({row.n_tokens for row in rows if row.n_tokens is not None})
    return found if len(found) > 1 else []


def _read(path: Path, faults: list[str]) -> dict[str, Any]:
    try:
        value = read_json(path) if path.exists() else {}
        if isinstance(value, dict):
            return value
        faults.append(
            f"{path} holds a {type(value).__name__}, expected an object: the file was altered; write it again."
        )
    except SaelabError as error:
        faults.append(str(error))
    return {}


def _sparsity(settings: dict[str, Any]) -> tuple[str, float] | None:
    hidden = "k" if settings.get("sparsity") == "l1" else ""  # a crosscoder's config has both
    for name, said in _SPARSITY:
        value = _number(settings.get(name))
        if value is not None and name != hidden:
            return said, value
    return None


def _model(config: dict[str, Any]) -> str | None:
    many = _object(config.get("models")).values()
    names = [_object(one).get("name") for one in (many or [config.get("model")])]
    return ", ".join(str(name) for name in names if name) or None


def _hook_of(config: dict[str, Any]) -> str | None:
    """The hook that a run is trained on, which its `data` ends with ("cache HASH HOOK")."""
    words = str(config.get("data") or "").split()
    return words[2] if len(words) > 2 and words[0] == "cache" else None


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _integer(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
