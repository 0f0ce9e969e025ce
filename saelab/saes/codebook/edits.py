"""Steering with codes: force or block a code at chosen positions. `lm.steer` takes these edits.

An edit runs right after its codebook, in the same forward pass, and outputs the mean of the changed set of codes instead:
forcing moves the output by `(c_new - c_old) / k`. The output of a token whose codes do not change is bit-identical.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from saelab.saes.codebook.bottleneck import Bottleneck
from saelab.validation import check_integer


@dataclass(frozen=True, eq=False)
class CodeEdit:
    """One code at one hook. Created by `Inserted.force` and `Inserted.block`."""

    hook_name: str
    bottleneck: Bottleneck
    code: int
    mode: Literal["force", "block", "drop"]
    positions: tuple[int, ...] | None
    """Absolute positions; None means all."""
    slot: int = -1
    first_token: ClassVar[bool] = True
    """Codes are forced and blocked at the first token too: it has codes as any other."""

    @classmethod
    def made(
        cls, bottlenecks: Mapping[str, Bottleneck], hook_name: str, code: int, mode: Any, positions: Any, slot: int = -1
    ) -> CodeEdit:
        """A checked edit. Raises `ValueError` for a hook without a codebook, or an invalid code, slot or position."""
        if hook_name not in bottlenecks:
            raise ValueError(f"hook_name={hook_name!r} has no codebook; there is one at {', '.join(bottlenecks)}.")
        book = bottlenecks[hook_name].codebook
        check_integer("code", code, 0, book.d_sae - 1)
        check_integer("slot", slot, -book.config.k, book.config.k - 1)
        several = (positions,) if isinstance(positions, int) else positions
        where = None if several is None else tuple(int(position) for position in several)
        for position in where or ():
            check_integer("position", position, 0)
        return cls(hook_name, bottlenecks[hook_name], code, mode, where, slot)

    @property
    def d_in(self) -> int:
        """Width of the activations it edits."""
        return self.bottleneck.codebook.d_in

    def __repr__(self) -> str:
        return f"<{self.mode} code {self.code} at {self.hook_name}>"

    @torch.no_grad()
    def apply(
        self, x: Float[Tensor, "batch seq d_in"], positions: Int[Tensor, "batch seq"]
    ) -> Float[Tensor, "batch seq d_in"]:
        """`x`, the codebook's output, with the codes changed. Raises `ValueError` if the codebook is not in the model."""
        seen, ids = self.bottleneck.seen, self.bottleneck.ids
        if seen is None or ids is None or len(ids) != positions.numel():
            raise ValueError(
                f"{self!r}: its codebook is no longer in the model; insert it again and create a new edit."
            )
        here = (positions >= 0).flatten()
        if self.positions is not None:
            here &= torch.isin(positions.flatten(), torch.tensor(self.positions, device=positions.device))
        present = (ids == self.code).any(1)
        rows = (here & (present if self.mode != "force" else ~present)).nonzero().squeeze(1)
        if not len(rows):
            return x
        flat = x.flatten(0, 1).clone()
        flat[rows] = self._output(seen[rows], ids[rows]).to(x.dtype)
        return flat.view(x.shape)

    def _output(self, seen: Tensor, ids: Tensor) -> Float[Tensor, "n d_in"]:
        """The codebook's output for these rows with the codes changed."""
        book = self.bottleneck.codebook
        if self.mode == "block":
            blocked = torch.zeros(book.d_sae, dtype=torch.bool, device=ids.device)
            blocked[self.code] = True
            return book.decode(book.feature_acts_of(book.select(seen, blocked)))
        feature_acts = book.feature_acts_of(ids if self.mode == "drop" else self._forced(seen, ids))
        values = (
            torch.where(feature_acts.features == self.code, 0.0, feature_acts.values)
            if self.mode == "drop"
            else feature_acts.values
        )
        return book.decode(feature_acts.with_values(values))

    def _forced(self, seen: Tensor, ids: Tensor) -> Int[Tensor, "n kept"]:
        """The ids, with this code in place of the `slot`-th most similar one of its group."""
        book = self.bottleneck.codebook
        k, group = book.config.k, self.code // book.codes_per_group
        mine = slice(group * k, (group + 1) * k)
        a = seen.unflatten(1, (book.n_groups, book.width))[:, group]
        order = similarities(a, book.codes[ids[:, mine]], book.config.similarity).argsort(
            dim=1, descending=True, stable=True
        )
        changed = ids[:, mine].scatter(1, order[:, self.slot, None], self.code).sort(1).values
        return torch.cat([ids[:, : mine.start], changed, ids[:, mine.stop :]], 1)


def similarities(
    a: Float[Tensor, "n width"], codes: Float[Tensor, "n k width"], similarity: str
) -> Float[Tensor, "n k"]:
    """Similarity of each row to its own codes."""
    if similarity == "euclidean":
        return -(a[:, None] - codes).norm(dim=2)
    return (normalize(codes, dim=2) * a[:, None]).sum(2)


@dataclass(frozen=True)
class CodeMatch:
    """How well one code predicts a set of tokens."""

    code: int
    precision: float
    """Fraction of the tokens with this code that are in the set."""
    recall: float
    """Fraction of the tokens in the set that have this code."""
    count: int
    """Tokens that have this code."""


def find_codes(
    ids: Int[Tensor, "*tokens kept"], meant: Bool[Tensor, "*tokens"], d_sae: int, min_recall: float = 0.01
) -> list[CodeMatch]:
    """Codes (`Inserted.codes`) that predict the tokens where `meant` is true: recall above `min_recall`, most precise first.

    Ties are ordered by recall. Raises `ValueError` if `meant` is false everywhere.
    """
    n_meant = int(meant.sum())
    if not n_meant:
        raise ValueError("`meant` is false everywhere: set it to true on the tokens to find codes for.")
    count = torch.bincount(ids.flatten(), minlength=d_sae)
    hits = torch.bincount(ids[meant].flatten(), minlength=d_sae)
    recall, precision = hits / n_meant, hits / count.clamp_min(1)
    found = (recall > min_recall).nonzero().squeeze(1).tolist()
    matches = [CodeMatch(c, precision[c].item(), recall[c].item(), int(count[c])) for c in found]
    return sorted(matches, key=lambda match: (-match.precision, -match.recall, match.code))
