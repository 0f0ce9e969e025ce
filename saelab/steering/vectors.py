"""Directions from texts: the difference between the mean activations of two sets, and the main difference of pairs."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.edits.direction import Direction
from saelab.models import LanguageModel
from saelab.steering.text_activations import stream_tokens, text_list, text_vectors
from saelab.steering.unsteered import refuse_steered


def diff_means(lm: LanguageModel, pos: Any, neg: Any, hook_name: str) -> Direction:
    """Difference of means: the mean activation over the tokens of `pos` minus that of `neg`, without position 0 and special
    tokens. Each side is a list of texts, a column of a table, or an iterator.

    Raises `ValueError` when a side has no texts or no tokens left, for an unknown hook, or if the model is being steered.
    """
    lm.check_hook(hook_name)
    refuse_steered(lm)
    difference = _mean(lm, pos, hook_name, "pos") - _mean(lm, neg, hook_name, "neg")
    if not bool(difference.any()):
        raise ValueError(f"pos and neg have the same mean activation at {hook_name}: give texts that differ.")
    return Direction(difference, hook_name)


def _mean(lm: LanguageModel, texts: Any, hook_name: str, side: str) -> Float[Tensor, " d_in"]:
    texts = text_list(texts, side)
    total, count = torch.zeros(lm.d_in(hook_name), dtype=torch.float64), 0
    for tokens in stream_tokens(lm, texts, [hook_name]):
        total += tokens.x[hook_name].double().sum(0)
        count += len(tokens.texts)
    if count == 0:
        raise ValueError(f"{side} holds {len(texts)} texts and no token to average; give texts of at least two tokens.")
    return (total / count).float()


def pca_pairs(lm: LanguageModel, pos: Any, neg: Any, hook_name: str, *, tokens: str = "mean") -> Direction:
    """First principal component of the differences `pos[i] - neg[i]` of paired texts, after Zou et al. 2023, "Representation
    Engineering: A Top-Down Approach to AI Transparency" (arXiv 2310.01405).

    A text's vector is the mean over its tokens, or that of its last token (`tokens="last"`, as in the paper). Each pair counts in
    both orders, so no mean is subtracted. The direction points to `pos` on average; its norm is the root mean square of
    the differences along it, in raw units. Raises `ValueError` for sides of different lengths, texts without tokens, an unknown
    hook, pairs that do not differ, and a model that is being steered.
    """
    lm.check_hook(hook_name)
    refuse_steered(lm)
    first, second = text_list(pos, "pos"), text_list(neg, "neg")
    if len(first) != len(second):
        raise ValueError(
            f"pos has {len(first)} texts and neg has {len(second)}; pca_pairs compares pos[i] with neg[i]."
        )
    vectors = (text_vectors(lm, texts, hook_name, side, tokens) for texts, side in ((first, "pos"), (second, "neg")))
    differences = torch.sub(*vectors)  # (n_pairs, d_in)
    _, sizes, rows = torch.linalg.svd(differences, full_matrices=False)
    if not float(sizes[0]) > 0:
        raise ValueError(f"The texts of each pair have the same activations at {hook_name}: give pairs that differ.")
    sign = 1.0 if float((differences @ rows[0]).mean()) >= 0 else -1.0
    return Direction(sign * sizes[0] / len(differences) ** 0.5 * rows[0], hook_name)
