"""The hooks of a trained SAE: which it reads and reconstructs, and at which its features are steered; what is no SAE."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from saelab.saes.base import SAE
from saelab.saes.hooks_used import HooksUsed


def check_is_sae(sae: Any, call: str) -> None:
    """Raise `ValueError` where something else was given, such as a folder or a language model."""
    if not isinstance(sae, SAE):
        raise ValueError(f"{call} needs an SAE, such as saelab.load_sae(folder); got a {type(sae).__name__}.")


def hooks_of(sae: SAE, hook_name: str | Sequence[str] | None = None) -> HooksUsed:
    """The hooks of a trained SAE, or those in `hook_name`: one hook, all of a crosscoder's in order, or a transcoder's inputs
    and then its outputs. Raises `ValueError` if neither the SAE nor `hook_name` names any, or for a wrong number of sources.
    """
    given = (hook_name,) if isinstance(hook_name, str) else tuple(hook_name or ())
    n_sources, outputs = sae.shape.get("n_sources", 1), _outputs(sae)
    if "d_out" in sae.shape and len(given) == 2 * n_sources:
        given, outputs = given[:n_sources], given[n_sources:]
    inputs = given or _inputs(sae)
    if not inputs:
        raise ValueError("This SAE does not say which hook it reads (it was trained on bare tensors): pass hook_name.")
    for names, does in ((inputs, "reads"), (outputs or inputs, "predicts")):
        if len(names) != n_sources:
            raise ValueError(
                f"This SAE {does} {n_sources} source{'s' * (n_sources > 1)}; hook_name names {len(names)} ({', '.join(names)}): "
                "name each source once, in order."
            )
    return HooksUsed(inputs, outputs or inputs)


def steered_hook(sae: SAE, hook_name: str | None = None) -> tuple[str | None, int]:
    """The hook at which features are steered (None if unknown) and the index of its source, by default the last.

    Raises `ValueError` for a hook that is not one of several sources.
    """
    names = _outputs(sae) or _inputs(sae)
    if hook_name is None:
        return (names[-1] if names else None), -1
    if sae.shape.get("n_sources", 1) == 1 or not names or hook_name == names[-1]:
        return hook_name, -1
    if hook_name not in names:
        raise ValueError(
            f"hook_name={hook_name!r} is not a source of this {sae.variant.replace('_', ' ')}, which has {', '.join(names)}."
        )
    return hook_name, names.index(hook_name)


def steered_hooks(sae: SAE, feature: int, source: int = -1) -> list[tuple[str, int]]:
    """The hooks that a feature is steered at, with the indices of their sources: with `source` -1 all that a feature of a
    cross-layer transcoder writes to; otherwise that of `source` alone."""
    names, layer_of = _outputs(sae) or _inputs(sae), getattr(sae, "layer_of", None)
    if not names:
        return []
    if layer_of is None or source != -1:
        return [(names[source], source)]
    return [(names[target], target) for target in range(int(layer_of(feature)), len(names))]


def needs_other_hooks(sae: SAE) -> bool:
    """Whether feature activations need more than the activations at the steered hook."""
    return sae.shape.get("n_sources", 1) > 1 or not set(_outputs(sae)) <= set(_inputs(sae))


def refuse_partial(sae: SAE, what: str) -> None:
    """Raise `ValueError` for an SAE that is a part of something larger, such as one layer of a cross-layer transcoder."""
    if reason := sae.provenance.origin.get("partial"):
        raise ValueError(f"This SAE cannot be {what}: {reason}.")


def _inputs(sae: SAE) -> tuple[str, ...]:
    known = (
        sae.provenance.origin.get("hook_names")
        or getattr(sae.config, "hook_names", None)
        or [sae.provenance.origin.get("hook_name")]
    )
    return tuple(name for name in known if name)


def _outputs(sae: SAE) -> tuple[str, ...]:
    """The hooks that a transcoder predicts, if they are not those it reads."""
    for place in (sae.provenance.origin.get, lambda name: getattr(sae.config, name, None)):
        if several := place("hook_names_out"):
            return tuple(several)
        if one := place("hook_name_out"):
            return (one,)
    return ()
