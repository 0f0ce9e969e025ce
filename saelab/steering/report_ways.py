"""What a steering report compares: the feature, and controls that push exactly as hard.

    feature               its decoder row
    random direction      means nothing
    random feature        another feature that fires, drawn for each prompt
    difference of means   texts about it minus texts that are not, what needs no SAE

A control is drawn anew for each prompt, so an interval over prompts is one over controls too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.models import LanguageModel
from saelab.steering.control import along
from saelab.steering.plan import Plan
from saelab.steering.vectors import diff_means

FEATURE, RANDOM_DIRECTION, RANDOM_FEATURE = "feature", "random direction", "random feature"
DIFF_MEANS, ASKED = "difference of means", "prompt that asks"

PlanOf = Callable[[float, int], Plan]
"""(strength in p99 of the feature, number of the prompt) -> plan."""


class Texts(NamedTuple):
    """Texts about what the feature stands for, and texts that are not."""

    about: Sequence[Any]
    other: Sequence[Any]


def texts_of(feature: Any, others: Sequence[int], tokenizer: Any) -> Texts:
    """The strongest examples of a feature (or end), and one uniform example of each of `others`."""

    def text(example: Any) -> str:
        return tokenizer.decode(list(example.token_ids), skip_special_tokens=True)

    drawn = [example for other in others for example in feature.store.feature(other).examples(1, kind="uniform")]
    about = [text(example) for example in feature.examples()]
    return Texts([one for one in about if one.strip()], [one for one in map(text, drawn) if one.strip()])


def other_features(store: Any, feature: int, n: int, seed: int) -> list[int]:
    """Up to `n` other features that fire, drawn with `seed`."""
    live = [one for one in store.features("feature", False) if one != feature and store.row_of(one)["p99"]]
    order = torch.randperm(len(live), generator=torch.Generator().manual_seed(seed)).tolist()
    return [live[i] for i in order[:n]]


def ways_of(lm: LanguageModel, feature: Any, texts: Texts, others: Sequence[int], seed: int) -> dict[str, PlanOf]:
    """The plan of each way to steer. Raises `SaelabError` for a feature (or end) without a p99."""
    handle, store = feature.handle, feature.store
    width = len(handle.direction.vector)

    def random(n: int) -> Float[Tensor, " d_in"]:
        return torch.randn(width, generator=torch.Generator().manual_seed(seed + n))

    def of_feature(n: int) -> Float[Tensor, " d_in"]:
        return store.feature(others[n % len(others)]).handle.direction.vector

    def turned(direction: Callable[[int], Tensor], strength: float, n: int) -> Plan:
        return Plan((along(handle.add(strength), direction(n)),))

    ways: dict[str, PlanOf] = {
        FEATURE: lambda strength, _: Plan((handle.add(strength),)),
        RANDOM_DIRECTION: partial(turned, random),
    }
    if others:
        ways[RANDOM_FEATURE] = partial(turned, of_feature)
    if texts.about and texts.other:
        difference = diff_means(lm, texts.about, texts.other, handle.hook_name).vector
        ways[DIFF_MEANS] = partial(turned, lambda _: difference)
    return ways
