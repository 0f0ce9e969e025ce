"""Which sites of a model an SAE reads and which it writes: the one place that knows.

Most SAEs have one site; a crosscoder reads and writes several; a transcoder reads one and writes another. A site is a
hook's name, with "MODEL/" before it where several models are read side by side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saelab.saes.base import SAE, Batch


class HooksUsed(NamedTuple):
    """In the order of an SAE's sources."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def __str__(self) -> str:
        inputs, output = ", ".join(self.inputs), ", ".join(self.outputs)
        return inputs if self.inputs == self.outputs else f"{inputs} -> {output}"

    @property
    def all(self) -> tuple[str, ...]:
        """Each site once."""
        return tuple(dict.fromkeys(self.inputs + self.outputs))

    def batch(self, rows: Mapping[str, Tensor]) -> Batch:
        """`Batch(x, y)` of rows `(..., d)` by site; several sites become `(..., n_sources, d)`."""
        x = _joined([rows[name] for name in self.inputs])
        return Batch(x, x if self.inputs == self.outputs else _joined([rows[name] for name in self.outputs]))

    def origin(self) -> dict[str, Any]:
        """What `sae.json` says of them: `hook_name` (the last of those read), and what a single hook cannot tell."""
        origin: dict[str, Any] = {"hook_name": self.inputs[-1]}
        if len(self.inputs) > 1:
            origin["hook_names"] = list(self.inputs)
        if self.outputs != self.inputs:
            origin["hook_name_out"] = self.outputs[0]
        return origin


def _joined(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.stack(tensors, dim=-2)


def choose_hooks(config: Any, names: Sequence[str], hook_name: str | None = None) -> HooksUsed:
    """The sites of an SAE of this config in a cache that holds `names`.

    `hook_name` is the one to read, where a config does not list them. Raises `ValueError` naming what is missing.
    """
    if hasattr(config, "hook_names"):
        several = _known("hook_names", config.hook_names or names, names)
        return HooksUsed(several, several)
    output = getattr(config, "hook_name_out", None)
    others = [name for name in names if name != output] or list(names)
    if hook_name is None and len(others) > 1:
        raise ValueError(f"The cache holds several hooks; give hook_name, one of {', '.join(others)}.")
    inputs = _known("hook_name", (hook_name or others[0],), names)
    return HooksUsed(inputs, inputs if output is None else _known("hook_name_out", (output,), names))


def _known(field: str, chosen: Sequence[str], names: Sequence[str]) -> tuple[str, ...]:
    for name in chosen:
        if name not in names:
            raise ValueError(
                f"{field}={name!r} is not in the cache, which holds {', '.join(names)}: choose of these, or "
                "harvest it into another RUN."
            )
    return tuple(chosen)


def hooks_of(sae: SAE, hook_name: str | Sequence[str] | None = None) -> HooksUsed:
    """The sites of a trained SAE, or those given: one hook, all of a crosscoder's in order, or what a transcoder reads
    and writes. Raises `ValueError` where the SAE does not say, and for another number of sources than it has.
    """
    given = (hook_name,) if isinstance(hook_name, str) else tuple(hook_name or ())
    n_sources, output = sae.shape.get("n_sources", 1), _output(sae)
    if "d_out" in sae.shape and len(given) == 2:
        given, output = given[:1], given[1]
    inputs = given or _inputs(sae)
    if not inputs:
        raise ValueError("This SAE does not say which hook it reads (it was trained on bare tensors): give hook_name.")
    if len(inputs) != n_sources:
        raise ValueError(
            f"This SAE reads {n_sources} source{'s' * (n_sources > 1)}, hook_name names {len(inputs)} ({', '.join(inputs)}): "
            "name each source once, in order."
        )
    return HooksUsed(inputs, inputs if output is None else (output,))


def steered_hook(sae: SAE, hook_name: str | None = None) -> tuple[str | None, int]:
    """The hook that features are steered at (None: nobody knows) and the number of its source: of several the last.

    Raises `ValueError` for a hook that is none of a crosscoder's.
    """
    names = _inputs(sae)
    if hook_name is None:
        return _output(sae) or (names[-1] if names else None), -1
    if sae.shape.get("n_sources", 1) == 1 or not names:
        return hook_name, -1
    if hook_name not in names:
        raise ValueError(f"hook_name={hook_name!r} is no source of this crosscoder, which has {', '.join(names)}.")
    return hook_name, names.index(hook_name)


def needs_other_hooks(sae: SAE) -> bool:
    """Can no code be computed from the activations at the hook that is steered?"""
    return sae.shape.get("n_sources", 1) > 1 or _output(sae) not in (None, *_inputs(sae))


def _inputs(sae: SAE) -> tuple[str, ...]:
    known = sae.origin.get("hook_names") or getattr(sae.config, "hook_names", None) or [sae.origin.get("hook_name")]
    return tuple(name for name in known if name)


def _output(sae: SAE) -> str | None:
    """What a transcoder predicts, where that is not what it reads."""
    return sae.origin.get("hook_name_out") or getattr(sae.config, "hook_name_out", None)
