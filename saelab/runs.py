"""The layout of a RUN folder: `cache/`, and `sae/`, `features/` and `report.json`, or `sae-NAME/` etc. for several SAEs."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from saelab.errors import SaelabError


class SaeRun(NamedTuple):
    """One SAE of a RUN and where its results go."""

    name: str
    """"sae", or "sae-NAME"."""
    sae_dir: Path
    features_dir: Path
    report_path: Path


def sae_run(sae_dir: str | Path) -> SaeRun:
    """The results that belong to one SAE folder: `sae-x` has `features-x` and `report-x.json` beside it."""
    sae_dir = Path(sae_dir)
    suffix = sae_dir.name.removeprefix("sae")
    return SaeRun(sae_dir.name, sae_dir, sae_dir.parent / f"features{suffix}", sae_dir.parent / f"report{suffix}.json")


def find_saes(run: str | Path) -> list[SaeRun]:
    """The SAEs of a RUN, or the one SAE if `run` is an SAE folder. Raises `SaelabError` if there is none."""
    run = Path(run)
    if (run / "sae.json").exists():
        return [sae_run(run)]
    found = sorted(entry for entry in run.glob("sae*") if _is_sae(entry)) if run.is_dir() else []
    if not found:
        raise SaelabError(f"{run} {_what_is_missing(run)}")
    return [sae_run(entry) for entry in found]


def only_run(folder: str | Path) -> Path:
    """The one RUN with an SAE in `folder`. Raises `SaelabError` if there is none, or several to choose from."""
    found = []
    for entry in sorted(Path(folder).glob("*/")):
        with suppress(SaelabError):
            find_saes(entry)
            found.append(entry)
    if not found:
        raise SaelabError(f"{folder}/ holds no RUN with an SAE: name one, or make one with saelab demo.")
    if len(found) > 1:
        raise SaelabError(f"{folder}/ holds {len(found)} RUNs; name one of {', '.join(map(str, found))}.")
    return found[0]


def _what_is_missing(run: Path) -> str:
    """Why there is no SAE, and the next command."""
    if not run.exists():
        return "holds no SAE, as it does not exist: saelab demo creates runs/demo, saelab harvest starts your own RUN."
    if (run / "cache").is_dir():
        return f"holds no SAE yet: saelab train {run} --d-sae 4096 --k 32 --n-tokens 2_000_000"
    return "holds no SAE: pass a RUN folder (with sae/ or sae-NAME/ in it) or one SAE folder."


def _is_sae(entry: Path) -> bool:
    named = entry.name == "sae" or entry.name.startswith("sae-")
    begun = entry / "checkpoints" / "run.json"  # a refused training run leaves a folder without it
    return named and ((entry / "sae.json").exists() or begun.exists())
