"""How the training of an SAE went, or goes: its curves from `metrics.jsonl`, and whether it is running."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from saelab.errors import SaelabError
from saelab.files import is_locked, read_json
from saelab.runs import SaeRun

METRICS = "metrics.jsonl"
MAX_POINTS = 400
_TAIL = 16_384


class Training(NamedTuple):
    """How far the training of one SAE is."""

    state: str
    """"running", "stopped" (it was interrupted) or "ended"."""
    tokens: int
    n_tokens: int | None
    """How many it is to see in all, if that is known."""
    tokens_per_second: float | None
    seconds: float | None
    """Since the last line was logged."""


def training(sae: SaeRun) -> Training:
    """How far the training of an SAE is."""
    path = sae.sae_dir / METRICS
    last = _last(path)
    seconds = None
    with suppress(OSError):
        seconds = time.time() - path.stat().st_mtime
    state = "running" if is_locked(sae.sae_dir / "checkpoints") else "stopped"
    if (sae.sae_dir / "sae.json").exists():
        state = "ended"
    rate = last.get("tokens_per_second")
    tokens = int(last["tokens"]) if _is_finite(last, "tokens") else 0
    return Training(state, tokens, _asked(sae), float(rate) if isinstance(rate, int | float) else None, seconds)


def read_metrics(path: Path, at_most: int = MAX_POINTS) -> list[dict[str, Any]]:
    """Up to `at_most` (2 or more) evenly spread points of a metrics file, first and last included, without truncated lines."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    while lines and not _point(lines[-1]):  # being written
        lines.pop()
    n = min(len(lines), at_most)
    chosen = (lines[round(i * (len(lines) - 1) / max(n - 1, 1))] for i in range(n))
    return [point for line in chosen if (point := _point(line))]


def curve(points: Sequence[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    """(training tokens, value) of one quantity, without what is not finite."""
    return [(line["tokens"], line[key]) for line in points if _is_finite(line, key) and _is_finite(line, "tokens")]


def _last(path: Path) -> dict[str, Any]:
    """The last whole line of a metrics file; {} without one."""
    with suppress(OSError), path.open("rb") as file:
        file.seek(max(file.seek(0, os.SEEK_END) - _TAIL, 0))
        for line in reversed(file.read(_TAIL).decode("utf-8", "replace").splitlines()):
            if point := _point(line):
                return point
    return {}


def _point(line: str) -> dict[str, Any]:
    with suppress(json.JSONDecodeError):
        value = json.loads(line)
        return value if isinstance(value, dict) else {}
    return {}


def _is_finite(line: dict[str, Any], key: str) -> bool:
    value = line.get(key)
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _asked(sae: SaeRun) -> int | None:
    with suppress(SaelabError, TypeError, KeyError, ValueError, AttributeError):
        return int(str(read_json(sae.sae_dir / "checkpoints" / "run.json")["train"]["n_tokens"]).replace("_", ""))
    return None
