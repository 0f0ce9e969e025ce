"""How similar ITDA dictionaries are by the tokens that they consist of (Leask, Nanda & Al Moubayed 2025), for layers and models:

    S(D, D') = |labels of both| / |labels of either|

No directions are compared, so the models need not share a basis or even a width; but both dictionaries must have been built from
the same tokens in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.saes import ITDASAE, SAE


def jaccard(one: SAE, other: SAE) -> float:
    """The share of the tokens that are atoms of either dictionary that are atoms of both. Raises `ValueError` for other SAEs, and
    if they were not built from the same tokens."""
    return float(jaccard_matrix([one], [other]))


def jaccard_matrix(rows: Sequence[SAE], columns: Sequence[SAE]) -> Float[Tensor, "rows columns"]:
    """`jaccard` of each of `rows` with each of `columns`. Raises `ValueError` as `jaccard` does, and if either is empty."""
    check_same_tokens(_some("rows", rows) + _some("columns", columns))
    ours, theirs = [_labels(sae) for sae in rows], [_labels(sae) for sae in columns]
    return torch.tensor([[_share(a, b) for b in theirs] for a in ours])


def model_jaccard(one: Sequence[SAE], other: Sequence[SAE]) -> float:
    """`jaccard` of the atoms of all layers of a model with those of another. Raises `ValueError` as `jaccard_matrix` does."""
    check_same_tokens(_some("one", one) + _some("other", other))
    return _share(*(set().union(*map(_labels, layers)) for layers in (one, other)))


def layer_matching_accuracy(models: Sequence[Sequence[SAE]]) -> float:
    """Over all ordered pairs of models, given as their layers' SAEs in order, the share of layers of the first whose most similar
    layer in the second is the one of the same number. Raises `ValueError` unless there are two models or more, of as many layers,
    and more than one, which has nothing else to be matched with.
    """
    if len(models) < 2 or len({len(layers) for layers in models}) != 1 or len(models[0]) < 2:
        sizes = ", ".join(str(len(layers)) for layers in models) or "none"
        raise ValueError(
            f"Layers are matched between two models or more with as many SAEs each, two or more; these have {sizes}."
        )
    nearest = [jaccard_matrix(one, other).argmax(1) for one, other in permutations(models, 2)]
    right = torch.stack(nearest) == torch.arange(len(models[0]))
    return float(right.float().mean())


def check_same_tokens(saes: Sequence[SAE]) -> None:
    """Raise `ValueError` naming an SAE that is no ITDA, or two that were not built from the same tokens in the same order; and if
    there is none."""
    first, *others = (_itda(sae) for sae in _some("saes", saes))
    for other in others:
        if (int(other.n_rows), int(other.fingerprint)) != (int(first.n_rows), int(first.fingerprint)):
            sizes = [f"{_name(sae)} ({int(sae.n_rows):,} rows)" for sae in (first, other)]
            raise ValueError(
                f"{' and '.join(sizes)} were not built from the same tokens in the same order: train both on hooks of one cache, "
                "or on caches of the same texts, with the same seed and number of tokens."
            )


def full(saes: Sequence[SAE]) -> list[SAE]:
    """Those that stopped growing at `d_sae` atoms: which tokens they are of, and so their Jaccard, depends on where that was."""
    return [sae for sae in map(_itda, saes) if int(sae.n_atoms) == sae.d_sae]


def _some(name: str, saes: Sequence[SAE]) -> list[SAE]:
    if not saes:
        raise ValueError(f"{name} is empty: give at least one itda SAE.")
    return list(saes)


def _itda(sae: SAE) -> ITDASAE:
    if not isinstance(sae, ITDASAE):
        raise ValueError(
            f"{_name(sae)} is a {sae.variant}: only the atoms of itda dictionaries have labels to compare."
        )
    return sae


def _name(sae: SAE) -> str:
    folder, hook = sae.provenance.folder, sae.provenance.origin.get("hook_name")
    return str(folder) if folder is not None else f"the SAE of {hook}" if hook else "an SAE"


def _labels(sae: SAE) -> set[tuple[int, ...]]:
    return {tuple(label) for label in _itda(sae).labels[: int(_itda(sae).n_atoms)].tolist()}


def _share(one: set[tuple[int, ...]], other: set[tuple[int, ...]]) -> float:
    return len(one & other) / max(len(one | other), 1)
