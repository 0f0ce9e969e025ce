"""What steering does to the next-token distributions along a given text: how far chosen tokens rise, and how far all of it moves.

The text is the same with and without steering, so that the difference is the edit's alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.models import LanguageModel, Steering
from saelab.models.sampling import Generation


class Shift(NamedTuple):
    """Along one text; means over the places at which its generated tokens were chosen."""

    rise: float
    """Rise in log-probability of the chosen tokens, mean over them, in nats."""
    kl: float
    """KL divergence of the steered from the unsteered distribution, in nats."""


class Unsteered:
    """Texts with their unsteered next-token distributions, to compare steered ones with."""

    def __init__(self, lm: LanguageModel, texts: Sequence[Generation]) -> None:
        self.lm, self.texts = lm, texts
        self.log_probs = self._log_probs(None)

    def shifts(self, steering: Steering, tokens: Sequence[int]) -> list[Shift]:
        """What a steering changes along each text, and how far `tokens` rise."""
        chosen, found = torch.tensor(list(tokens), dtype=torch.int64), []
        for before, after in zip(self.log_probs, self._log_probs(steering), strict=True):
            kl = (after.exp() * (after - before)).sum(-1).mean()
            found.append(Shift(float((after - before)[:, chosen].mean()), float(kl)))
        return found

    def _log_probs(self, steering: Steering | None) -> list[Float[Tensor, "n_generated vocab"]]:
        arms: list[Any] = [] if steering is None else [steering]
        found = []
        for text in self.texts:
            with self.lm.steer(*arms):
                logits = self.lm.logits(text.ids[None])[0, text.n_prompt - 1 : -1]
            found.append(logits.float().cpu().log_softmax(-1))
        return found
