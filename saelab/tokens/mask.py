"""The mask: which tokens' rows training, evaluation and feature collection all leave out, and why.

Left out are position 0 of each context, special tokens, and rows whose norm is over 5 times the median: a few such
rows carry most of the variance, and would determine the FVU of any SAE. Padding is left out too, but does not count as
tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelab.tokens.texts import TokenBatch

NORM_RULE_ROWS = 16_384
NORM_RULE_FACTOR = 5.0
REASONS = ("position", "special", "norm")
MASK_RULE = {
    "position": "position 0 of each context",
    "special": "the tokenizer's special tokens",
    "norm_factor": NORM_RULE_FACTOR,
    "norm_rows": NORM_RULE_ROWS,
}


def token_mask(
    ids: Int[Tensor, "n ctx"], doc: Int[Tensor, "n ctx"], special_ids: Sequence[int]
) -> dict[str, Bool[Tensor, "n ctx"]]:
    """Rows to leave out, judging by the token ids alone, by reason; no row has two reasons.

    Keys in priority order: `padding` (`doc` is -1), `position` (column 0), `special` (id in `special_ids`).
    """
    padding = doc < 0
    position = torch.zeros_like(padding)
    position[:, 0] = True
    position &= ~padding
    special = torch.isin(ids, torch.tensor(list(special_ids), dtype=ids.dtype, device=ids.device))
    return {"padding": padding, "position": position, "special": special & ~padding & ~position}


def row_norms(activations: Mapping[str, Float[Tensor, "n ctx d"]]) -> dict[str, Float[Tensor, "n ctx"]]:
    """L2 norm of every row in fp32, per hook."""
    return {
        hook: torch.linalg.vector_norm(x, dim=-1, dtype=torch.promote_types(x.dtype, torch.float32))
        for hook, x in activations.items()
    }


@dataclass(frozen=True)
class Mask:
    """The mask with its norm limits fixed, as stored in a cache's manifest and with every SAE."""

    special_ids: tuple[int, ...]
    """Token ids that are control tokens, never text."""
    max_norm: Mapping[str, float] | None
    """Hook name -> largest norm kept; None disables the norm rule."""

    def apply(
        self, batch: TokenBatch, activations: Mapping[str, Float[Tensor, "n ctx d"]]
    ) -> tuple[Bool[Tensor, "n ctx"], dict[str, int]]:
        """Rows to keep, and how many tokens each reason removed (`position`, `special`, `norm`, in this priority).

        A row is removed if its norm is too large at any of the hooks in `activations`. The result is on the device of
        `batch.ids`. Raises `ValueError` for a hook without a limit.
        """
        return self.apply_norms(batch, {} if self.max_norm is None else row_norms(activations))

    def apply_norms(
        self, batch: TokenBatch, norms: Mapping[str, Float[Tensor, "n ctx"]]
    ) -> tuple[Bool[Tensor, "n ctx"], dict[str, int]]:
        """As `apply`, for norms already computed (`row_norms`)."""
        out = token_mask(batch.ids, batch.doc, self.special_ids)
        keep = ~(out["padding"] | out["position"] | out["special"])  # (n, ctx)
        too_large = torch.zeros_like(keep)
        max_norms = {} if self.max_norm is None else self.max_norm
        for hook, norm in norms.items() if max_norms else ():
            if hook not in max_norms:
                raise ValueError(
                    f"no norm limit for hook {hook!r}: the mask has limits for {sorted(max_norms)}. Use one of these."
                )
            too_large |= (norm > max_norms[hook]).to(keep.device)
        too_large &= keep
        counts = {"position": out["position"], "special": out["special"], "norm": too_large}
        return keep & ~too_large, {reason: int(rows.sum()) for reason, rows in counts.items()}


class NormRule:
    """Computes the norm limit: 5 times the median over the first 16,384 rows that `position` and `special` leave.

    Add batches in stream order until `ready`; from then on `max_norms()` is fixed.
    """

    def __init__(self, special_ids: Sequence[int]):
        self._token_mask = Mask(tuple(special_ids), None)
        self._norms: dict[str, list[Tensor]] = {}
        self.n_rows = 0

    @property
    def ready(self) -> bool:
        """Whether enough rows have been seen."""
        return self.n_rows >= NORM_RULE_ROWS

    def add(self, batch: TokenBatch, norms: Mapping[str, Float[Tensor, "n ctx"]]) -> None:
        """Add the rows of one batch, up to the number of rows needed."""
        keep, _ = self._token_mask.apply_norms(batch, {})
        room = NORM_RULE_ROWS - self.n_rows
        for hook, norm in norms.items():
            self._norms.setdefault(hook, []).append(norm.cpu()[keep.cpu()][:room])
        self.n_rows += min(room, int(keep.sum()))

    def medians(self) -> dict[str, float]:
        """Median norm per hook of the rows seen; empty if there were none."""
        if not self.n_rows:
            return {}
        return {hook: torch.cat(parts).double().median().item() for hook, parts in self._norms.items()}

    def max_norms(self) -> dict[str, float]:
        """Largest norm kept, per hook."""
        return {hook: NORM_RULE_FACTOR * median for hook, median in self.medians().items()}
