"""The hooks of a model that an SAE reads (`inputs`) and reconstructs (`outputs`).

Most SAEs have one hook; a crosscoder reads and reconstructs several; a transcoder reads one and predicts another, a cross-layer
transcoder several and as many others. A hook's name starts with "MODEL/" where several models are read side by side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saelab.saes.step import Batch


class HooksUsed(NamedTuple):
    """In the order of an SAE's sources."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    views: tuple[str, ...] = ()
    """The second view of the input, which only training reads."""
    gradients: tuple[str, ...] = ()
    """Columns of the training data with the gradients at the inputs, for variants that read them."""

    def __str__(self) -> str:
        inputs, output = ", ".join(self.inputs), ", ".join(self.outputs)
        return inputs if self.inputs == self.outputs else f"{inputs} -> {output}"

    @property
    def all(self) -> tuple[str, ...]:
        """Each hook once."""
        return tuple(dict.fromkeys(self.inputs + self.outputs + self.views))

    @property
    def columns(self) -> tuple[str, ...]:
        """What is read in training: the hooks, and the gradients at them."""
        return self.all + self.gradients

    def batch(self, rows: Mapping[str, Tensor]) -> Batch:
        """`Batch(x, y, gradient)` from rows `(..., d)` by column; several hooks are stacked to `(..., n_sources, d)`. y is the
        second view if there is one."""
        x = _joined([rows[name] for name in self.inputs])
        others = self.views or self.outputs
        y = x if others == self.inputs else _joined([rows[name] for name in others])
        return Batch(x, y, _joined([rows[name] for name in self.gradients]) if self.gradients else None)

    def origin(self) -> dict[str, Any]:
        """The entries of `sae.json`: `hook_name` (the last one read), `hook_name_out` (the last one predicted, if it is another),
        and all of either where there are several."""
        origin: dict[str, Any] = {"hook_name": self.inputs[-1]}
        if len(self.inputs) > 1:
            origin["hook_names"] = list(self.inputs)
        if self.outputs != self.inputs:
            origin["hook_name_out"] = self.outputs[-1]
            if len(self.outputs) > 1:
                origin["hook_names_out"] = list(self.outputs)
        return origin


def _joined(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.stack(tensors, dim=-2)


def one_hook(names: Sequence[str], hook_name: str | None, output: str | None = None) -> HooksUsed:
    """One hook to read, and `output` to predict if that is a different one. Raises `ValueError` if the choice is ambiguous."""
    others = [name for name in names if name != output] or list(names)
    if hook_name is None and len(others) > 1:
        raise ValueError(f"The cache holds several hooks; set hook_name to one of {', '.join(others)}.")
    inputs = chosen_hooks("hook_name", (hook_name or others[0],), names)
    return HooksUsed(inputs, inputs if output is None else chosen_hooks("hook_name_out", (output,), names))


def chosen_hooks(field: str, chosen: Sequence[str], names: Sequence[str]) -> tuple[str, ...]:
    for name in chosen:
        if name not in names:
            raise ValueError(
                f"{field}={name!r} is not in the cache, which holds {', '.join(names)}: choose one of these, or "
                "harvest it into another RUN."
            )
    return tuple(chosen)


def set_hook_names(config: Any, field: str) -> None:
    """Make a tuple of a config's list of hooks, if it has one. Raises `ValueError` unless it names each once."""
    given = getattr(config, field)
    if given is None:
        return
    object.__setattr__(config, field, (given,) if isinstance(given, str) else tuple(given))  # JSON has a list
    names = getattr(config, field)
    if not names or len(set(names)) < len(names):
        raise ValueError(f"{field}={names} must name one hook or more, each only once, or be None.")
