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

    rises: tuple[float, ...]
    """Of each set of chosen tokens: the rise in log-probability, mean over the set, in nats."""
    kl: float
    """KL divergence of the steered from the unsteered distribution, in nats."""
    nll_rise: float
    """How much less likely the text itself becomes, in nats per token."""


class Unsteered:
    """Texts with their unsteered next-token distributions, to compare steered ones with."""

    def __init__(self, lm: LanguageModel, texts: Sequence[Generation]) -> None:
        self.lm, self.texts = lm, texts
        self.log_probs = [self._log_probs(text, None) for text in texts]

    def shifts(self, steering: Steering, *token_sets: Sequence[int]) -> list[Shift]:
        """What a steering changes along each text, and how far each set of tokens rises."""
        return [self.shift(i, steering, *token_sets) for i in range(len(self.texts))]

    def shift(self, index: int, steering: Steering, *token_sets: Sequence[int]) -> Shift:
        """The same along one text."""
        text, before = self.texts[index], self.log_probs[index]
        after = self._log_probs(text, steering)
        change, new = after - before, text.ids[text.n_prompt :, None].to(after.device)
        rises = [float(change[:, torch.tensor(list(tokens), dtype=torch.int64)].mean()) for tokens in token_sets]
        return Shift(tuple(rises), float((after.exp() * change).sum(-1).mean()), -float(change.gather(1, new).mean()))

    def _log_probs(self, text: Generation, steering: Steering | None) -> Float[Tensor, "n_generated vocab"]:
        arms: list[Any] = [] if steering is None else [steering]
        with self.lm.steer(*arms):
            logits = self.lm.logits(text.ids[None])[0, text.n_prompt - 1 : -1]
        return logits.float().cpu().log_softmax(-1)
