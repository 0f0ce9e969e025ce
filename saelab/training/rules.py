"""Training rules: a run that an earlier version of saelab started keeps its rules to the end, so that it resumes bit for bit.

`run.json` records their number; if it has none, they are rules 1, those of the first version. Code that later rules changed
checks `StepInfo.rules`, or the run's.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from saelab.distributed import Ranks
from saelab.errors import TrainingError
from saelab.files import read_json
from saelab.saes.step import RULES
from saelab.training.checkpoint import RUN_FILE

FIRST = 1


def rules_of(folders: Iterable[Path | None], ranks: Ranks, device: torch.device) -> int:
    """The rules of the unfinished runs in `folders`, which share their batches; `RULES` if none was started.

    Raises `TrainingError` if they differ.
    """
    found = {folder: _begun_by(folder) for folder in folders if folder is not None and _is_unfinished(folder)}
    if len(set(found.values())) > 1:
        said = ", ".join(f"{folder} under rules {rules}" for folder, rules in found.items())
        raise TrainingError(
            f"These runs were started by different versions of saelab ({said}): finish each separately."
        )
    rules = torch.tensor(next(iter(found.values()), RULES), device=device)
    ranks.broadcast_([rules])
    return int(rules)


def _is_unfinished(folder: Path) -> bool:
    return (folder / RUN_FILE).is_file() and not (folder / "sae.json").exists()


def _begun_by(folder: Path) -> int:
    noted = read_json(folder / RUN_FILE)
    rules = noted.get("rules", FIRST) if isinstance(noted, dict) else FIRST
    if not isinstance(rules, int) or not FIRST <= rules <= RULES:
        raise TrainingError(
            f"{folder / RUN_FILE} follows training rules {rules!r}; this saelab supports {FIRST} to {RULES}: update saelab."
        )
    return rules
