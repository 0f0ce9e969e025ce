"""How separable concepts are in the units of a hook: the features of an SAE beside the coordinates of the activations it reads.

    score of a unit = mean over pairs of concepts of the Jensen-Shannon distance of its histograms
    score of a set of units = mean over the N most separable of them

After Fereidouni et al. 2025, "Evaluating Sparse Autoencoders for Monosemantic Representation" (arXiv 2508.15094). Bins, pairs and
ranking are our own choice, as is `chance`: the same with the concepts of the texts shuffled. Of few tokens chance is far above 0,
most of all for units that are never 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.features.separability import pairwise_separability
from saelab.models import LanguageModel
from saelab.saes.hooks_used import HooksUsed
from saelab.saes.trained_hooks import check_is_sae, hooks_of
from saelab.steering.text_activations import distinct_texts, stream_tokens
from saelab.steering.unsteered import refuse_steered
from saelab.validation import check_integer


class UnitScores(NamedTuple):
    """Scores of units, each between 0 and 1: `(n_units,)`."""

    scores: Float[Tensor, " n_units"]
    chance: Float[Tensor, " n_units"]
    """Likewise, with the concepts of the texts shuffled."""

    def top(self, n: int | None = None) -> float:
        """Mean score of the `n` most separable units; None: of all."""
        return _top(self.scores, n)

    def top_chance(self, n: int | None = None) -> float:
        """The same by chance: of the units that are the most separable with shuffled concepts."""
        return _top(self.chance, n)


class ConceptSeparability(NamedTuple):
    """What `concept_separability` measured."""

    features: UnitScores
    """Of the SAE."""
    coordinates: UnitScores
    """Of the activations that it reads."""
    n_tokens: dict[str, int]
    """Counted tokens of each concept."""


def concept_separability(
    sae: Any, lm: LanguageModel, concepts: Mapping[str, Any], *, hook_name: Any = None, seed: int = 0
) -> ConceptSeparability:
    """Measure how separable `concepts` (name -> texts) are. The tokens of the texts are the samples, without position 0 and
    special ones; `seed` shuffles the concepts for `chance`. All activations are held in memory.

    Raises `ValueError` for fewer than two concepts, one without a counted token, an SAE for another hook, and a model that is
    being steered.
    """
    check_is_sae(sae, "concept_separability")
    check_integer("seed", seed, 0)
    if len(concepts) < 2:
        raise ValueError(f"concepts={list(concepts)}; give at least two, as name -> texts.")
    refuse_steered(lm)
    hooks = hooks_of(sae, hook_name)
    texts = {name: distinct_texts(of, name) for name, of in concepts.items()}
    rows, owners = _tokens(lm, [text for of in texts.values() for text in of], hooks)
    of_text = torch.repeat_interleave(torch.arange(len(texts)), torch.tensor([len(of) for of in texts.values()]))
    shuffled = of_text[torch.randperm(len(of_text), generator=torch.Generator().manual_seed(seed))]
    n_tokens = torch.bincount(of_text[owners], minlength=len(texts)).tolist()
    for name, n in zip(texts, n_tokens, strict=True):
        if not n:
            raise ValueError(f"concept {name!r} has no counted token; give texts of at least two tokens.")
    with torch.no_grad():
        found = sae.encode(rows.to(sae.center.device))
    dense = rows.flatten(1)
    fired = found.values.cpu() != 0
    units = (
        (found.values.cpu().float()[fired], found.features.cpu().long()[fired], found.rows.cpu()[fired], sae.d_sae),
        (dense.flatten(), *_grid(*dense.shape), dense.shape[1]),
    )
    features, coordinates = (
        UnitScores(*(_scores(values, unit, row, width, sets[owners], len(texts)) for sets in (of_text, shuffled)))
        for values, unit, row, width in units
    )
    return ConceptSeparability(features, coordinates, dict(zip(texts, n_tokens, strict=True)))


def _tokens(lm: LanguageModel, texts: list[Any], hooks: HooksUsed) -> tuple[Tensor, Tensor]:
    """The activations that the SAE reads at every counted token, and the number of its text."""
    x, owners = [], []
    for tokens in stream_tokens(lm, texts, hooks.inputs):
        x.append(HooksUsed(hooks.inputs, hooks.inputs).batch(tokens.x).x.float())
        owners.append(tokens.texts)
    return torch.cat(x), torch.cat(owners)


def _grid(n: int, width: int) -> tuple[Tensor, Tensor]:
    """Unit and row of every number of a dense matrix."""
    return torch.arange(width).repeat(n), torch.arange(n).repeat_interleave(width)


def _scores(values: Tensor, units: Tensor, rows: Tensor, width: int, sets: Tensor, n_sets: int) -> Tensor:
    n_tokens = torch.bincount(sets, minlength=n_sets).clamp_min(1).tolist()
    return pairwise_separability(values, units, sets[rows], n_tokens, width)


def _top(scores: Float[Tensor, " n_units"], n: int | None) -> float:
    return float(scores.sort(descending=True).values[: len(scores) if n is None else n].mean())
