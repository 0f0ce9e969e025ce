"""The layout of a RUN folder: `cache/`, and `sae/`, `features/` and `report.json`, or `sae-NAME/` etc. for several SAEs.

Snapshots of a training run are in its SAE's folder, `sae/snapshots/step-00000250/`, each with its own `features-step-00000250/`.
"""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from saelab.errors import SaelabError

SNAPSHOTS = "snapshots"
_STEP = re.compile(r"step-(\d{8,})")


class SaeRun(NamedTuple):
    """One SAE of a RUN and where its results go."""

    name: str
    """"sae", or "sae-NAME"; of a snapshot "sae/step-00000250"."""
    sae_dir: Path
    features_dir: Path
    report_path: Path


def sae_run(sae_dir: str | Path) -> SaeRun:
    """The results that belong to one SAE folder: `sae-x` has `features-x` and `report-x.json` beside it."""
    sae_dir = Path(sae_dir)
    if step_of(sae_dir) is not None:
        return _snapshot(sae_dir)
    suffix = sae_dir.name.removeprefix("sae")
    return SaeRun(sae_dir.name, sae_dir, sae_dir.parent / f"features{suffix}", sae_dir.parent / f"report{suffix}.json")


def named_sae(run: Path, name: str | None, unnamed: str = "sae") -> Path:
    """The folder of an SAE that is called `name`, or of the one without a name. Raises `ValueError` for a name that would not be
    part of a file name."""
    if name is None:
        return run / unnamed
    if not re.fullmatch(r"\w[\w.+-]*", name):
        raise ValueError(f"--name {name!r} must be letters, digits and '_', '.', '+' or '-', such as wide-2.")
    return run / f"sae-{name}"


def find_saes(run: str | Path) -> list[SaeRun]:
    """The SAEs of a RUN, or the one SAE if `run` is an SAE folder. Raises `SaelabError` if there is none."""
    run = Path(run)
    if (run / "sae.json").exists():
        return [sae_run(run)]
    found = sorted(entry for entry in run.glob("sae*") if _is_sae(entry)) if run.is_dir() else []
    if not found:
        raise SaelabError(f"{run} {_what_is_missing(run)}")
    return [sae_run(entry) for entry in found]


def find_snapshots(sae_dir: str | Path) -> list[SaeRun]:
    """The snapshots of an SAE (`TrainConfig.snapshot_every`), from the earliest step on; [] if there are none."""
    found = (entry for entry in (Path(sae_dir) / SNAPSHOTS).glob("step-*") if step_of(entry) is not None)
    return [_snapshot(entry) for entry in sorted(found) if (entry / "sae.json").exists()]


def snapshot_folder(sae_dir: str | Path, step: int) -> Path:
    """Where the snapshot before step `step` of a training run is kept."""
    return Path(sae_dir) / SNAPSHOTS / f"step-{step:08d}"


def step_of(sae_dir: str | Path) -> int | None:
    """The step of a snapshot's folder, None for any other."""
    sae_dir = Path(sae_dir)
    match = _STEP.fullmatch(sae_dir.name)
    return int(match[1]) if match and sae_dir.parent.name == SNAPSHOTS else None


def follows(first: SaeRun, second: SaeRun) -> bool:
    """Whether the first is a snapshot, and the second a later one of the same training, or its end."""
    begun, ended = step_of(first.sae_dir), step_of(second.sae_dir)
    home = second.sae_dir if ended is None else second.sae_dir.parent.parent
    return begun is not None and first.sae_dir.parent.parent == home and (ended is None or begun < ended)


def _snapshot(folder: Path) -> SaeRun:
    """Results of a snapshot stand beside it: `features-step-00000250`, `report-step-00000250.json`."""
    above, name = folder.parent, folder.name
    return SaeRun(f"{above.parent.name}/{name}", folder, above / f"features-{name}", above / f"report-{name}.json")


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
        return f"holds no SAE yet: {_how_to_train(run)}"
    return "holds no SAE: pass a RUN folder (with sae/ or sae-NAME/ in it) or one SAE folder."


def _how_to_train(run: Path) -> str:
    from saelab.hints.next_commands import trainings

    try:
        return " or ".join(trainings(run))
    except SaelabError as error:
        return str(error)  # an unfinished cache


def _is_sae(entry: Path) -> bool:
    named = entry.name == "sae" or entry.name.startswith("sae-")
    begun = entry / "checkpoints" / "run.json"  # a refused training run leaves a folder without it
    return named and ((entry / "sae.json").exists() or begun.exists())
