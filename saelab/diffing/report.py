"""A diff report: what a crosscoder's features tell of the difference between two sources, as JSON beside the SAE."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from saelab.diffing.judged import DiffFeature, Interval, Judged, Related
from saelab.diffing.report_html import card, save_html
from saelab.errors import SaelabError
from saelab.files import atomic_write_json, read_json
from saelab.runs import SaeRun, sae_run

FORMAT, VERSION = "saelab diff", 1


class DiffReport(Judged):
    """The features that were judged, shown as a card in a notebook and kept as JSON and HTML."""

    def data(self) -> dict[str, Any]:
        """Everything as plain values, which JSON can hold."""
        return {"format": FORMAT, "version": VERSION, **_plain(self.about), "conclusions": self.conclusions(),
                "features": [_plain(one._asdict()) for one in self.features], "cloud": _plain(self.cloud)}  # fmt: skip

    def save(self, path: str | Path) -> Path:
        """Write the JSON, which `load_diff` reads; returns its path."""
        atomic_write_json(path, self.data())
        return Path(path)

    def save_html(self, path: str | Path) -> Path:
        """Write one HTML file that stands on its own; returns its path."""
        return save_html(self, path)

    def _repr_html_(self) -> str:
        return card(self)


def diff_path(run: SaeRun | str | Path) -> Path:
    """Where the report of an SAE is kept: `diff.json` beside `sae/`, `diff-x.json` beside `sae-x/`."""
    found = run if isinstance(run, SaeRun) else sae_run(run)
    return found.report_path.with_name(found.report_path.name.replace("report", "diff", 1))


def load_diff(path: str | Path) -> DiffReport:
    """The report that `save` wrote. Raises `SaelabError` for anything else."""
    data = read_json(path)
    if not isinstance(data, dict) or data.get("format") != FORMAT or data.get("version") != VERSION:
        raise SaelabError(f"{path} is no diff report of this version: make it again with `saelab diff`.")
    try:
        features = tuple(_feature(row) for row in data["features"])
        about = {
            name: one
            for name, one in data.items()
            if name not in ("features", "cloud", "conclusions", "format", "version")
        }
        cloud = {name: [math.nan if one is None else one for one in values] for name, values in data["cloud"].items()}
        report = DiffReport(about, features, cloud)
        report.conclusions()
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SaelabError(f"{path} is damaged ({error!r}): make it again with `saelab diff`.") from error
    return report


def _feature(row: dict[str, Any]) -> DiffFeature:
    intervals = {name: _interval(row[name]) for name in ("density", "nu_error", "nu_reconstruction")}
    related = row["related"]
    if related is not None:
        related = Related(**{**related, "difference": _interval(related["difference"])})
    known = {"reasons": tuple(row["reasons"]), "tokens": tuple(row["tokens"]), "cosine": _number(row["cosine"])}
    return DiffFeature(**{**row, **intervals, **known, "related": related})


def _interval(values: Sequence[float | None]) -> Interval:
    return Interval(*map(_number, values))


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _plain(value: Any) -> Any:
    """Named tuples as dicts, other tuples as lists, numbers that JSON lacks as None."""
    if isinstance(value, Related):
        return _plain(value._asdict())
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
