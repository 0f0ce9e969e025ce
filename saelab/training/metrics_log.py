"""`metrics.jsonl`: one JSON object per logged step, appended; a resumed run first drops the lines after its checkpoint."""

from __future__ import annotations

import importlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from saelab.files import atomic_write_text, writing


class MetricsLog:
    """Appends to `folder/metrics.jsonl`, and to wandb when `project` is given (the optional extra)."""

    def __init__(self, folder: Path | None, first_step: int, wandb_project: str | None = None) -> None:
        self.path = folder / "metrics.jsonl" if folder else None
        if self.path is not None:
            kept = [line for line in read_lines(self.path) if line["step"] < first_step]
            atomic_write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self._wandb = None
        if wandb_project is not None:
            try:
                wandb: Any = importlib.import_module("wandb")
            except ImportError as error:
                raise ValueError(
                    "wandb_project is given but wandb is not installed: pip install 'saelab[wandb]'."
                ) from error
            self._wandb = wandb.init(project=wandb_project, name=folder.name if folder else None)

    def write(self, line: dict[str, Any]) -> None:
        """Append one line; it holds at least `step`."""
        if self.path is not None:
            with writing(self.path), self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        if self._wandb is not None:
            self._wandb.log(line, step=int(line["step"]))

    def close(self) -> None:
        """Finish the wandb run, if there is one."""
        if self._wandb is not None:
            self._wandb.finish()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; invalid ones (truncated, altered) are skipped."""
    if not path.exists():
        return []
    lines = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(json.JSONDecodeError):
            value = json.loads(line)
            if isinstance(value, dict) and isinstance(value.get("step"), int):
                lines.append(value)
    return lines
