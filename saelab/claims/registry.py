"""The experiments that test the papers' claims: the kinds of planted data of `synthetic.py`, and the modules of `experiments/`.

A module has `measure(seed)`, which returns the measures of all that it trains (label -> measure -> number), and `CLAIMS`, which
compare them; the first paragraph of its docstring says what is done.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, NamedTuple

from saelab.benchmarks.claims import Claim, Side
from saelab.benchmarks.planted_claims import ABOUT
from saelab.benchmarks.planted_claims import CLAIMS as PLANTED
from saelab.benchmarks.synthetic import measure_one
from saelab.claims.experiments import __path__ as folder


class Experiment(NamedTuple):
    """What `saelab bench claims` runs, once per seed."""

    name: str
    about: str
    measure: Callable[[int], Mapping[str, Mapping[str, Any]]]
    claims: Sequence[Claim]


def labels(claims: Sequence[Claim]) -> list[str]:
    """What claims compare."""
    sides = [side for claim in claims for side in (claim.left, claim.right) if isinstance(side, Side)]
    return list(dict.fromkeys(side.sae for side in sides))


def experiments() -> dict[str, Experiment]:
    """All experiments by name, in the order of the page."""
    planted = [Experiment(kind, about, partial(_measure_planted, kind), _claims(kind)) for kind, about in ABOUT.items()]
    modules = [_of_module(one.name) for one in sorted(iter_modules(folder), key=lambda one: one.name)]
    return {one.name: one for one in (*planted, *modules)}


def _claims(kind: str) -> list[Claim]:
    return [claim for claim in PLANTED if claim.data == kind]


def _measure_planted(kind: str, seed: int) -> dict[str, dict[str, Any]]:
    return {label: measure_one(kind, label, seed, None) for label in labels(_claims(kind))}


def _of_module(name: str) -> Experiment:
    module: Any = import_module(f"saelab.claims.experiments.{name}")
    about = " ".join(module.__doc__.split("\n\n")[0].split())
    return Experiment(name, about, module.measure, module.CLAIMS)
