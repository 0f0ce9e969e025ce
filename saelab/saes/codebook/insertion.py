"""Codebooks inside a model: at each hook the activation is replaced by the mean of its codes, from which the model continues.

`insert` attaches them until `remove()`; until then they affect everything that runs the model. Their LayerNorm is not
undone, so the model has to be trained with its codebooks in place (`finetune`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jaxtyping import Int
from torch import Tensor

from saelab.errors import ModelError
from saelab.models.hooks import attach
from saelab.saes.codebook.bottleneck import Bottleneck
from saelab.saes.codebook.config import CodebookConfig
from saelab.saes.codebook.edits import CodeEdit
from saelab.saes.codebook.quantizer import Codebook

if TYPE_CHECKING:
    from saelab.models.language_model import LanguageModel
    from saelab.models.prompts import Prompt


class Inserted:
    """The codebooks of a model by hook name. The end of a `with` block removes them; so does `remove()`."""

    def __init__(self, lm: LanguageModel, bottlenecks: Mapping[str, Bottleneck]) -> None:
        self.lm, self.bottlenecks = lm, dict(bottlenecks)
        self.base_hash: str | None = None
        """The model's hash before its weights were trained; None if they were not."""
        hook_places = lm.backend.hook_places
        self._handles: list[Any] = []
        for name in sorted(self.bottlenecks, key=list(hook_places).index):
            self._handles += attach(hook_places[name], self.bottlenecks[name])

    def __enter__(self) -> Inserted:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"<codebooks in {self.lm.name} at {', '.join(self.bottlenecks)}>"

    def remove(self) -> None:
        """Remove the codebooks; the model then computes without them, with its current weights."""
        while self._handles:
            self._handles.pop().remove()
        for bottleneck in self.bottlenecks.values():  # no edit may mistake an old pass for its own
            bottleneck.forget()

    @property
    def active(self) -> bool:
        """Whether they are in the model."""
        return bool(self._handles)

    @property
    def codebooks(self) -> dict[str, Codebook]:
        """Hook name -> codebook."""
        return {name: bottleneck.codebook for name, bottleneck in self.bottlenecks.items()}

    def codes(self, prompt: Prompt) -> dict[str, Int[Tensor, "batch seq kept"]]:
        """Ids of the codes at each hook and token, ascending, `k` per group."""
        for bottleneck in self.bottlenecks.values():
            bottleneck.forget()
        shape = self.lm.logits(prompt).shape[:2]
        return {name: reached(b, b.ids).clone().unflatten(0, shape) for name, b in self.bottlenecks.items()}

    def force(self, hook_name: str, code: int, positions: Any = None, slot: int = -1) -> CodeEdit:
        """An edit for `lm.steer`: the code replaces another code of its group.

        `positions` are absolute (an int, several, or None for all); `slot` says which code is replaced: 0 is the most
        similar one, -1 the least similar. Tokens that already have the code do not change.
        """
        return CodeEdit.made(self.bottlenecks, hook_name, code, "force", positions, slot)

    def block(self, hook_name: str, code: int, positions: Any = None, refill: bool = True) -> CodeEdit:
        """An edit for `lm.steer`: the code is left out; the next most similar one replaces it, or (`refill=False`) zeros."""
        return CodeEdit.made(self.bottlenecks, hook_name, code, "block" if refill else "drop", positions)


def insert(
    lm: LanguageModel, config: CodebookConfig | Mapping[str, CodebookConfig], hook_names: Sequence[str], seed: int = 0
) -> Inserted:
    """Insert a codebook at each hook; `config` is one for all hooks, or one for each hook name.

    At a `hook_z` with `n_groups=None` each head has its own group. Raises `ValueError` for a hook that the model lacks or
    that can only be read, that is named twice, or whose width is not divisible by the number of groups.
    """
    names = [hook_names] if isinstance(hook_names, str) else list(hook_names)
    if not names or len(set(names)) < len(names):
        raise ValueError(f"hook_names={names!r}: name at least one hook, and each only once.")
    if isinstance(config, Mapping) and set(config) != set(names):
        raise ValueError(
            f"config is for {', '.join(config)}, hook_names are {', '.join(names)}: pass one config for each."
        )
    made: dict[str, Bottleneck] = {}
    for index, name in enumerate(names):
        lm.check_hook(name)
        if name not in lm.hook_names:
            raise ValueError(f"hook_name={name!r} can only be read; codebooks go at one of {', '.join(lm.hook_names)}.")
        of_hook = config[name] if isinstance(config, Mapping) else config
        groups = of_hook.n_groups or (lm.backend.n_heads if re.search(r"\bhook_z$", name) else 1)
        with_norm = of_hook.layer_norm is not False
        made[name] = Bottleneck(name, Codebook(of_hook, lm.d_in(name), groups, with_norm, (seed + index) % 2**32))
        made[name].codebook.to(lm.device).eval()
    return Inserted(lm, made)


def reached(bottleneck: Bottleneck, value: Tensor | None) -> Tensor:
    """What the codebook kept from the last pass. Raises `ModelError` if the pass did not go through it."""
    if value is None:
        raise ModelError(
            f"The forward pass did not reach the codebook at {bottleneck.hook_name!r}, so the model ran without it. The layer "
            "is skipped, or runs compiled or replaced code: insert the codebook at another hook, or use the plain model."
        )
    return value
