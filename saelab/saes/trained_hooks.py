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
    """The hooks of a trained SAE, or those in `hook_name`: one hook, all of a crosscoder's in order, or a transcoder's input
    and output. Raises `ValueError` if neither the SAE nor `hook_name` names any, or for a wrong number of sources.
    """
    given = (hook_name,) if isinstance(hook_name, str) else tuple(hook_name or ())
    n_sources, output = sae.shape.get("n_sources", 1), _output(sae)
    if "d_out" in sae.shape and len(given) == 2:
        given, output = given[:1], given[1]
    inputs = given or _inputs(sae)
    if not inputs:
        raise ValueError("This SAE does not say which hook it reads (it was trained on bare tensors): pass hook_name.")
    if len(inputs) != n_sources:
        raise ValueError(
            f"This SAE reads {n_sources} source{'s' * (n_sources > 1)}; hook_name names {len(inputs)} ({', '.join(inputs)}): "
            "name each source once, in order."
        )
    return HooksUsed(inputs, inputs if output is None else (output,))


def steered_hook(sae: SAE, hook_name: str | None = None) -> tuple[str | None, int]:
    """The hook at which features are steered (None if unknown) and the index of its source, by default the last.

    Raises `ValueError` for a hook that is not a source of the crosscoder.
    """
    names = _inputs(sae)
    if hook_name is None:
        return _output(sae) or (names[-1] if names else None), -1
    if sae.shape.get("n_sources", 1) == 1 or not names:
        return hook_name, -1
    if hook_name not in names:
        raise ValueError(f"hook_name={hook_name!r} is not a source of this crosscoder, which has {', '.join(names)}.")
    return hook_name, names.index(hook_name)


def needs_other_hooks(sae: SAE) -> bool:
    """Whether feature activations need more than the activations at the steered hook."""
    return sae.shape.get("n_sources", 1) > 1 or _output(sae) not in (None, *_inputs(sae))


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


def _output(sae: SAE) -> str | None:
    """The hook that a transcoder predicts, if it is not the one it reads."""
    return sae.provenance.origin.get("hook_name_out") or getattr(sae.config, "hook_name_out", None)
