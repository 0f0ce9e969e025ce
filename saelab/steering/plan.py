"""`Plan`: edits with their options, as one object that `lm.steer` takes and that is saved as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from saelab.edits.direction import Direction, VectorEdit
from saelab.edits.feature_edit import FeatureEdit
from saelab.edits.feature_handle import FeatureHandle
from saelab.edits.gate import DirectionGate, FeatureGate
from saelab.files import atomic_write_text
from saelab.models import Steering
from saelab.validation import check_integer

VERSION = 1
MOST_EDITS = 64
_OPTIONS = ("on", "positions", "window", "keep_norm", "cap")
_TAKES = {
    "add": {"value", "unit"},
    "clamp": {"value", "unit", "where"},
    "scale": {"value"},
    "cap": {"min", "max", "unit"},
    "project_out": set(),
    "above": {"value", "unit"},
}
"""What each kind of edit, and a gate (above), is given."""
_FEATURE, _DIRECTION = {"feature", "do", "end", "sign", "hook_name", "sae"}, {"direction", "do", "hook_name"}


class Plan(Steering):
    """Edits and the options of `lm.steer`, which moves between notebook, dashboard, command line and server:
    `with lm.steer(Plan([feature * 2.0], on="generated"))`.

    A feature is saved as its index, strength and unit, and the hash of its SAE; a direction as its numbers.
    """

    def to_json(self) -> str:
        """As JSON. Raises `ValueError` for an edit that is neither of a feature nor of a direction."""
        told = {"saelab_plan": VERSION, "edits": [_told(edit) for edit in self.edits]}
        options = {name: getattr(self, name) for name in _OPTIONS}
        told |= {name: value for name, value in options.items() if value not in (None, False, "both")}
        if self.gate is not None:
            told["gate"] = _told(self.gate)
        return json.dumps(told, allow_nan=False)

    @classmethod
    def from_json(cls, text: str, source: Any = None) -> Plan:
        """The plan in `text`. Features are those of `source`: a feature store, an SAE, or a list of these, found by hash.

        Raises `ValueError` for text that is no plan, naming what is wrong, and for a feature of an SAE that is not in `source`.
        """
        told = _parsed(text)
        sources = _by_hash(source)
        options = {name: told[name] for name in _OPTIONS if name in told}
        if "gate" in told:
            options["gate"] = _built(told["gate"], sources, gates=True)
        return cls(tuple(_built(entry, sources) for entry in told["edits"]), **options)

    def save(self, path: str | Path) -> Path:
        """Write `to_json` to a file; returns its path."""
        atomic_write_text(path, self.to_json() + "\n")
        return Path(path)

    @classmethod
    def load(cls, path: str | Path, source: Any = None) -> Plan:
        """The plan in a file, as `from_json`. Raises `ValueError` for a path at which there is no file."""
        if not Path(path).is_file():
            raise ValueError(f"{path} is no plan file: write one with plan.save(path), or saelab steer --save-plan.")
        return cls.from_json(Path(path).read_text(encoding="utf-8"), source)


def _told(edit: Any) -> dict[str, Any]:
    """An edit or gate in the words of a plan."""
    if isinstance(edit, FeatureEdit | FeatureGate | VectorEdit) and edit.asked:
        if not is_as_asked(edit):
            raise ValueError(
                f"{edit!r} is no longer what was asked of its feature, {_words(edit.asked)}, which a plan would save: make it "
                "again with feature.add, clamp, scale or cap instead of changing its fields."
            )
        return {**edit.asked, "hook_name": edit.hook_name, "sae": _sae(edit).hash}
    if not isinstance(edit, VectorEdit | DirectionGate):
        raise ValueError(f"{edit!r} cannot be saved in a plan: only edits and gates of features and directions can.")
    at = {"hook_name": edit.hook_name, "direction": edit.vector.tolist()}
    if isinstance(edit, DirectionGate):
        return {"do": "above", "value": edit.bound, **at}
    if edit.mode in ("raw", "resid_norm"):
        return {"do": "add", "value": edit.strength, "unit": edit.mode, **at}
    if edit.mode == "cap":
        low, high = (bound if abs(bound) != float("inf") else None for bound in edit.bounds)
        return {"do": "cap", "min": low, "max": high, **at}
    return {"do": edit.mode, **({} if edit.mode == "ablate" else {"value": edit.strength}), **at}


def is_as_asked(edit: FeatureEdit | FeatureGate | VectorEdit) -> bool:
    """Whether its feature would make the same edit or gate again: `dataclasses.replace` changes what is applied alone."""
    asked, units = edit.asked, getattr(edit, "units", {"p99": edit.asked.get("sign", 1)})
    given = {name: asked[name] for name in _TAKES[asked["do"]] if name in asked}
    names = [one.name for one in fields(edit) if one.name not in ("asked", "units", "sae")]
    sources = [
        one for one in _sae(edit).provenance.origin.get("hook_names") or () if one.endswith(f"/{edit.hook_name}")
    ]
    for hook_name in sources or [edit.hook_name]:  # "MODEL/HOOK" for an SAE of several models
        made = _make(
            FeatureHandle(_sae(edit), asked["feature"], hook_name, units, end=asked["end"]), asked["do"], given
        )
        if type(made) is type(edit) and all(_close(getattr(edit, one), getattr(made, one), edit) for one in names):
            return True
    return False


def _sae(edit: FeatureEdit | FeatureGate | VectorEdit) -> Any:
    return edit.asked["sae"] if isinstance(edit, VectorEdit) else edit.sae


def _close(value: Any, wanted: Any, edit: Any) -> bool:
    """Equal, but for the rounding of products whose factors came in another order. A direction that is removed has no sign."""
    if isinstance(value, torch.Tensor) != isinstance(wanted, torch.Tensor):
        return False
    if isinstance(value, torch.Tensor):
        signs = (1, -1) if getattr(edit, "mode", None) == "ablate" else (1,)
        return value.shape == wanted.shape and any(torch.allclose(value, sign * wanted, 1e-5, 0.0) for sign in signs)
    if isinstance(value, tuple):
        return all(_close(one, other, edit) for one, other in zip(value, wanted, strict=True))
    if isinstance(value, float) and isinstance(wanted, float):
        return math.isclose(value, wanted, rel_tol=1e-6)
    return bool(value == wanted)


def _words(asked: Mapping[str, Any]) -> str:
    return str({name: value for name, value in asked.items() if name != "sae"})[:120]


def _make(maker: Any, do: str, given: dict[str, Any]) -> Any:
    """What a handle or direction makes of a plan's words."""
    given = {name: _tensor(value) if isinstance(value, list) else value for name, value in given.items()}
    return getattr(maker, do)(**({"factor": given["value"]} if do == "scale" and "value" in given else given))


def _parsed(text: str) -> dict[str, Any]:
    try:
        told = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_once)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"This is no plan, because it is no JSON ({error}): {text[:80]!r}.") from error
    version = told.get("saelab_plan") if isinstance(told, dict) else None
    if not isinstance(told, dict) or not isinstance(version, int) or isinstance(version, bool) or version != VERSION:
        raise ValueError(
            f"This is no plan of version {VERSION} (saelab_plan={version!r}); write one with plan.save(path)."
        )
    if unknown := sorted(set(told) - {"saelab_plan", "edits", "gate", *_OPTIONS}):
        raise ValueError(
            f"The plan has {unknown[0]!r}, which is unknown; it may have edits, gate, {', '.join(_OPTIONS)}."
        )
    edits = told.get("edits")
    if not isinstance(edits, list) or not 0 < len(edits) <= MOST_EDITS:
        raise ValueError(f"The plan's edits must be a list of 1 to {MOST_EDITS} entries.")
    return told


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of the plan. Raises `ValueError` for a name that it has twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"The plan has an object with a name twice: {', '.join(name for name, _ in pairs)[:80]}.")
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"The plan holds {name}, which is not a finite number.")


def _by_hash(source: Any) -> dict[str, Any]:
    """The stores and SAEs of a source by the hash of the SAE."""
    listed = [] if source is None else list(source) if isinstance(source, Sequence | Iterable) else [source]
    return {one.manifest["sae"]["hash"] if hasattr(one, "manifest") else one.hash: one for one in listed}


def _built(entry: Any, sources: Mapping[str, Any], gates: bool = False) -> Any:
    """The edit or gate that an entry tells of."""
    if not isinstance(entry, dict):
        raise ValueError(f"The plan holds {entry!r}; expected an object with 'do' and a feature or direction.")
    do = "project_out" if entry.get("do") == "ablate" else entry.get("do")
    if not isinstance(do, str) or do not in _TAKES:
        raise ValueError(f"do={entry.get('do')!r} is unknown; expected {', '.join(_TAKES)}.")
    if (do == "above") != gates:
        raise ValueError(f"do={do!r} makes {'an edit' if gates else 'a gate'}: a gate is no edit; 'above' makes one.")
    known = _TAKES[do] | (_FEATURE if "feature" in entry else _DIRECTION)
    if unknown := sorted(set(entry) - known):
        raise ValueError(
            f"The {do} of a plan has {unknown[0]!r}, which is unknown; it may have {', '.join(sorted(known))}."
        )
    maker = _feature(entry, sources) if "feature" in entry else _direction(entry)
    given = {name: entry[name] for name in _TAKES[do] if name in entry}
    if do == "clamp" and isinstance(given.get("value"), list):
        given["value"] = _tensor(given["value"])
    _check_numbers(given)
    try:
        made = _make(maker, do, given)
    except TypeError as error:
        raise ValueError(f"The plan's {do} of {maker!r} got {given}: {error}.") from error
    sign = getattr(made, "asked", {}).get("sign")
    if sign != entry.get("sign", sign):
        raise ValueError(
            f"Feature {entry['feature']} is mostly negative in the plan's store: give that store, not the SAE."
        )
    return made


def _tensor(values: list[Any]) -> torch.Tensor:
    try:
        return torch.tensor(values, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"An edit of the plan has value={str(values)[:60]}, which is no array of numbers.") from error


def _check_numbers(given: Mapping[str, Any]) -> None:
    for name in ("value", "min", "max"):
        value = given.get(name, 0.0)
        if not isinstance(value, torch.Tensor) and not _is_number(value) and not (value is None and name != "value"):
            raise ValueError(f"An edit of the plan has {name}={str(value)[:40]!r}, which is not a number.")


def _is_number(value: Any) -> bool:
    """Whether a value is a number that float32 holds."""
    return (
        isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= torch.finfo(torch.float32).max
    )


def _feature(entry: Mapping[str, Any], sources: Mapping[str, Any]) -> FeatureHandle:
    wanted = entry.get("sae")
    if wanted is None and len(sources) == 1:
        wanted = next(iter(sources))
    if not isinstance(wanted, str) or wanted not in sources:
        have = ", ".join(one[:12] for one in sources) or "none"
        raise ValueError(
            f"The plan steers feature {entry['feature']} of the SAE {str(wanted)[:12]}, which is not given; there: {have}. Pass "
            "its feature store."
        )
    source, index, end = sources[wanted], entry["feature"], entry.get("end", 0)
    check_integer("feature", index, 0, source.d_sae - 1)
    if isinstance(end, bool) or not isinstance(end, int) or end not in (-1, 0, 1):
        raise ValueError(f"end={end!r}; expected 1, -1, or 0 for both ends.")
    hook_name = entry.get("hook_name")
    if not isinstance(hook_name, str | None):
        raise ValueError(f"hook_name={hook_name!r} of a plan's edit is no name of a hook.")
    if not hasattr(source, "feature"):
        return FeatureHandle(source, index, hook_name, end=end)
    feature = source.feature(index)
    handle = (feature if end == 0 else feature.positive if end > 0 else feature.negative).handle
    if hook_name in (None, handle.hook_name):
        return handle
    return FeatureHandle(handle.sae, index, hook_name, handle.units, end=end)  # another source of a crosscoder


def _direction(entry: Mapping[str, Any]) -> Direction:
    vector, hook_name = entry.get("direction"), entry.get("hook_name")
    if not isinstance(hook_name, str) or not isinstance(vector, list):
        raise ValueError("An edit of the plan has neither a feature nor a direction with its hook_name.")
    if not all(map(_is_number, vector)):
        raise ValueError(f"A direction of the plan is no list of numbers: {str(vector)[:60]}.")
    return Direction(torch.tensor(vector, dtype=torch.float32), hook_name)
