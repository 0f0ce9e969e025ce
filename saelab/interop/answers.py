"""`Answers`: what the user settles with `assume=`, and what a format assumes where its files leave a meaning open."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from saelab.errors import SaelabError
from saelab.interop.blueprint import Blueprint
from saelab.interop.values import check_given, check_used
from saelab.saes import VARIANTS

SWITCHES = ("variant", "k", "threshold", "pre_bias", "normalize", "scale", "scale_out")
OPTIONS = ("select", "score", "stop_on_duplicate", "residual_threshold", "signed")
ORIGIN = ("hook_name", "hook_names", "hook_name_out", "model", "prepend_bos", "ctx_len")


class Answers:
    """`given` is the user's `assume`, `listed` what a list of releases says; `assumed` collects what the files do not say, with
    the value taken."""

    def __init__(self, given: Mapping[str, Any] | None = None, listed: Mapping[str, Any] | None = None) -> None:
        check_given({} if given is None else given)
        self.given = dict(given or {})
        self.listed = dict(listed or {})
        self.assumed: dict[str, Any] = {}

    def need(self, key: str, found: Any, where: str) -> Any:
        """The user's answer, `found`, or what is listed. Raises `SaelabError` if there is none."""
        value = self.given.get(key, found)
        if value is None and self.listed.get(key) is not None:
            return self.assume(key, self.listed[key])
        if value is None:
            raise SaelabError(f"{where} does not say {key}: pass assume={{'{key}': ...}}.")
        return value

    def assume(self, key: str, value: Any) -> Any:
        """The user's answer, or `value`, which is then reported as assumed."""
        if key in self.given:
            return self.given[key]
        self.assumed[key] = value
        return value


def revised(plan: Blueprint, given: Mapping[str, Any]) -> Blueprint:
    """The blueprint with the user's answers instead of what the files say or a format assumed."""
    variant = given.get("variant", plan.variant)
    check_used(given, variant, VARIANTS[variant].Config, OPTIONS)
    switches = {key: value for key, value in given.items() if key in SWITCHES}
    options = {key: value for key, value in given.items() if key in OPTIONS}
    origin = {key: value for key, value in given.items() if key in ORIGIN}
    if "model" in origin:
        origin["model"] = {"name": str(origin["model"])}
    if "hook_names" in origin:  # of a crosscoder
        options["hook_names"] = tuple(origin["hook_names"])
        origin |= {"hook_names": list(origin["hook_names"]), "hook_name": origin["hook_names"][-1]}
    return dataclasses.replace(plan, **switches, options={**plan.options, **options}, origin={**plan.origin, **origin})
