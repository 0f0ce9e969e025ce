"""What a RUN offers to steer with: its presets, and the stores and SAEs in which a plan's features are found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from saelab.errors import SaelabError, explain
from saelab.features import load_features
from saelab.features.schema import MANIFEST
from saelab.io import load_sae
from saelab.runs import find_saes
from saelab.serving.refused import Refused
from saelab.steering import Plan

PRESETS = Path("steering") / "presets"
"""Under a RUN: `NAME.json`, each written by `Plan.save`."""


class Plans:
    """The plans of a RUN. Raises `SaelabError` where it holds no SAE."""

    def __init__(self, run: str | Path) -> None:
        found = find_saes(run)
        self.folder = found[0].sae_dir.parent / PRESETS
        self.sources = [_source(one) for one in found if (one.sae_dir / "sae.json").exists()]  # not those in training

    @property
    def names(self) -> list[str]:
        """Of the presets, those added since the server was started too."""
        return sorted(path.stem for path in self.folder.glob("*.json") if path.is_file())

    def preset(self, name: str) -> Plan | None:
        """The plan with this name; None without one. Raises `Refused` for a file that holds no plan."""
        if name not in self.names:
            return None
        try:
            return self._plan((self.folder / f"{name}.json").read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, Refused) as error:
            raise Refused(f"The preset {name!r} cannot be used: {error}", param="model") from error

    def of_request(self, told: Any) -> Plan:
        """The plan in a request: an object, or a text with its JSON. Raises `Refused` for what is no plan, saying why."""
        return self._plan(told if isinstance(told, str) else json.dumps(told))

    def _plan(self, text: str) -> Plan:
        try:
            return Plan.from_json(text, self.sources)
        except Exception as error:  # whatever a stranger's JSON sets off
            said = explain(error) or f"it is no plan ({type(error).__name__})."
            raise Refused(f"steering: {said}", param="steering") from error


def _source(found: Any) -> Any:
    """The feature store of an SAE; without one the SAE, whose features have no p99 to steer in units of."""
    collected = (found.features_dir / MANIFEST).exists()
    return load_features(found.features_dir) if collected else load_sae(found.sae_dir)


def model_name(plans: Plans) -> str:
    """The one language model of a RUN. Raises `SaelabError` where it records none or several."""
    names = set[str | None]()
    for source in plans.sources:
        if hasattr(source, "manifest"):
            names.add(source.manifest["model"]["name"])
        else:
            origin = source.provenance.origin
            names |= {one.get("name") for one in (origin.get("models") or {"": origin.get("model") or {}}).values()}
    if len(names) != 1 or None in names:
        told = ", ".join(sorted(str(name) for name in names))
        raise SaelabError(
            f"The SAEs of this RUN were trained on {told}: name the language model to serve with --model."
        )
    return str(names.pop())
