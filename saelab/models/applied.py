"""What edits changed: counted while the model runs, and told in `lm.last_report`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saelab.errors import SteeringError
from saelab.models.steered import Steering

_LOG = logging.getLogger("saelab")


class HookReport(NamedTuple):
    """What the edits of one `lm.steer` block did at one hook in the last call of the model."""

    hook_name: str
    edits: tuple[str, ...]
    n_read: int
    """Tokens that ran through the hook, without padding."""
    n_applied: int
    """Tokens at which the edits applied."""
    n_changed: int
    """Tokens whose activation is another one than before."""
    relative_change: float
    """Mean norm of the change over the norm of the activation, at the changed tokens; 0 without any."""
    n_capped: int
    """Tokens whose change was shortened by `cap`."""


class Tally:
    """The counts of one block at one hook, kept on the model's device until they are asked for."""

    def __init__(self, hook_name: str, steering: Steering, edits: Sequence[Any]) -> None:
        self.hook_name, self.steering, self.edits = hook_name, steering, tuple(edits)
        self.counts: Tensor | None = None
        self.any_in_phase: Any = False

    @torch.no_grad()
    def count(
        self,
        before: Float[Tensor, "batch seq d_in"],
        after: Float[Tensor, "batch seq d_in"],
        read: Bool[Tensor, "batch seq"],
        in_phase: Bool[Tensor, "batch seq"],
        applied: Bool[Tensor, "batch seq"],
        capped: Bool[Tensor, "batch seq"] | None,
    ) -> None:
        """Add one forward pass. `in_phase` are the tokens behind the first that `on` admits."""
        self.any_in_phase = in_phase.any() | self.any_in_phase
        changed = (after != before).any(-1)
        size = before.float().norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
        share = ((after.float() - before.float()).norm(dim=-1) / size).where(changed, 0.0)
        n_capped = torch.zeros_like(share).sum() if capped is None else capped.sum()
        new = torch.stack([one.double() for one in (read.sum(), applied.sum(), changed.sum(), share.sum(), n_capped)])
        self.counts = new if self.counts is None else self.counts + new

    def report(self) -> HookReport:
        """The counts so far."""
        n_read, n_applied, n_changed, share, n_capped = [0.0] * 5 if self.counts is None else self.counts.tolist()
        names = tuple(repr(edit)[:120] for edit in self.edits)
        mean = share / n_changed if n_changed else 0.0
        return HookReport(self.hook_name, names, int(n_read), int(n_applied), int(n_changed), mean, int(n_capped))


def check_applied(tallies: Sequence[Tally], generating: bool) -> None:
    """Raises `SteeringError` for a block that applied to no token of the call, unless a gate was to decide, or the text ended
    before a token was read that its `on` admits."""
    for steering in {id(tally.steering): tally.steering for tally in tallies}.values():
        mine = [tally for tally in tallies if tally.steering is steering]
        if generating and not any(bool(tally.any_in_phase) for tally in mine):
            continue
        told = [tally.report() for tally in mine]
        if steering.gate is not None and not any(report.n_applied for report in told):
            n_read, names = max(report.n_read for report in told), ", ".join(told[0].edits)
            _LOG.warning("The gate of %s was open at none of the %d tokens that the model read.", names, n_read)
        elif not any(report.n_applied for report in told):
            n_read, names = max(report.n_read for report in told), ", ".join(told[0].edits)
            raise SteeringError(
                f"{names} applied to none of the {n_read} tokens that the model read, with {steering.describe()}. The first "
                "token and special tokens are left alone; a token that is generated is read when the next one is."
            )
