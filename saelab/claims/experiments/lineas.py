"""Maps from chat answers to the Bible's style, at the inputs of three MLPs of SmolLM2-135M: LinEAS (60 steps, 24 passages a
side); elementwise maps that fit each hook on its own, in forward order, as Lin-AcT does; the difference of means. Effect: the log
odds of the Bible that a probe 8 blocks later reads on held-out answers; cost: the loss on passages of Python's documentation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.benchmarks.claims import Claim, Side
from saelab.claims.concept_texts import mean_nll, passages
from saelab.claims.smollm2 import language_model
from saelab.models import LanguageModel
from saelab.steering import AffineEdit, LinEAS, Probe, lineas, probe
from saelab.steering.text_activations import text_vectors
from saelab.steering.transport import transport_cost

SOURCE, TARGET, OTHER = "chat", "bible_kjv", "python_docs"
HOOKS = ("blocks.4.mlp.hook_in", "blocks.6.mlp.hook_in", "blocks.8.mlp.hook_in")
READ_AT = "blocks.16.hook_resid_post"
N_FIT, N_PROBE, N_TEST, N_CHARS = 24, 48, 32, 100
STEPS, GAMMA = 60, 4.0
"""`GAMMA` is the weight of the lasso for the sparse maps."""
SPARSE = "lineas, sparse"
STRENGTHS = (0.25, 0.5, 0.75, 1.0)
_PAPER = "Rodriguez et al. 2025 (LinEAS): "


def measure(seed: int) -> dict[str, dict[str, float]]:
    lm = language_model()
    texts = passages(N_FIT + N_PROBE + N_TEST, N_CHARS, seed)
    source, target, other = texts[SOURCE], texts[TARGET], texts[OTHER][:N_TEST]
    fit, read = slice(0, N_FIT), slice(N_FIT, N_FIT + N_PROBE)
    held, held_target = source[N_FIT + N_PROBE :], target[N_FIT + N_PROBE :]
    reader = probe(lm, target[read], source[read], READ_AT, seed=seed)

    def learn(gamma: float) -> LinEAS:
        return lineas(lm, source[fit], target[fit], HOOKS, steps=STEPS, gamma=gamma, group=0, seed=seed, progress=False)

    maps = {"lineas": learn(0.0), SPARSE: learn(GAMMA)}
    edits: dict[str, Sequence[AffineEdit]] = {label: found.maps for label, found in maps.items()}
    edits["local maps"] = _one_by_one(lm, source[fit], target[fit], _matching)
    edits["difference of means"] = _one_by_one(lm, source[fit], target[fit], _shift)

    curves = {label: _curve(lm, found, reader, held, other) for label, found in edits.items()}
    common = min(max(effect for effect, _ in curve) for label, curve in curves.items() if label != SPARSE)
    rows = {}
    for label, curve in curves.items():
        rows[label] = {
            "effect": curve[-1][0],
            "nll_rise": curve[-1][1],
            "nll_rise_at_equal_effect": _cost(curve, common),
        }
        distance = _distance(lm, held, held_target, edits[label])
        rows[label] |= {"distance": distance, "unchanged": _unchanged(edits[label])}
    return rows


def _curve(
    lm: LanguageModel, edits: Sequence[AffineEdit], reader: Probe, texts: Sequence[str], other: Sequence[str]
) -> list[tuple[float, float]]:
    """Effect on `texts` and cost on `other` at strength 0 and at each of `STRENGTHS`."""
    found = []
    for strength in (0.0, *STRENGTHS):
        scaled = [replace(one, strength=strength) for one in edits]
        with lm.steer(*scaled):
            effect = float(reader.log_odds(text_vectors(lm, texts, READ_AT, "texts")).mean())
        found.append((effect, mean_nll(lm, other, scaled)))
    return [(effect - found[0][0], nll - found[0][1]) for effect, nll in found]


def _one_by_one(
    lm: LanguageModel, source: Sequence[str], target: Sequence[str], fit: Callable[..., Tensor]
) -> list[AffineEdit]:
    """An edit at each hook, fitted to the activations of the target and those of the source under the edits before it."""
    edits: list[AffineEdit] = []
    for name in HOOKS:
        wanted = text_vectors(lm, target, name, "target")
        with lm.steer(*edits):
            here = text_vectors(lm, source, name, "source")
        weight, bias = fit(here, wanted)
        edits.append(AffineEdit(name, weight.float(), bias.float()))
    return edits


def _matching(u: Float[Tensor, "n d"], v: Float[Tensor, "n d"]) -> Float[Tensor, "2 d"]:
    """w - 1 and b of the least squared distance between the sorted values of each coordinate."""
    u, v = u.sort(0).values, v.sort(0).values
    weight = ((u - u.mean(0)) * (v - v.mean(0))).sum(0) / (u - u.mean(0)).square().sum(0).clamp_min(1e-12)
    return torch.stack([weight - 1, v.mean(0) - weight * u.mean(0)])


def _shift(u: Float[Tensor, "n d"], v: Float[Tensor, "m d"]) -> Float[Tensor, "2 d"]:
    """The difference of means."""
    return torch.stack([torch.zeros(u.shape[1]).to(u), v.mean(0) - u.mean(0)])


def _cost(curve: Sequence[tuple[float, float]], effect: float) -> float:
    """The cost at an effect, between the strengths that lie around it."""
    for (low, cost_low), (high, cost_high) in zip(curve, curve[1:], strict=False):
        if low <= effect <= high:
            share = (effect - low) / (high - low) if high > low else 1.0
            return cost_low + share * (cost_high - cost_low)
    return max(curve)[1]


def _distance(lm: LanguageModel, source: Sequence[str], target: Sequence[str], edits: Sequence[AffineEdit]) -> float:
    """Squared Wasserstein distance of held-out texts under the edits from the target, in units of that without edits."""
    costs = []
    for active in (edits, []):
        with lm.steer(*active):
            found = [text_vectors(lm, source, name, "source") for name in HOOKS]
        wanted = [text_vectors(lm, target, name, "target") for name in HOOKS]
        costs.append(sum(float((transport_cost(u, v) / v.var(0)).sum()) for u, v in zip(found, wanted, strict=True)))
    return costs[0] / costs[1]


def _unchanged(edits: Sequence[AffineEdit]) -> float:
    """Share of the coordinates that no edit changes."""
    changed = sum(int(((one.weight != 0) | (one.bias != 0)).sum()) for one in edits)
    return 1 - changed / sum(one.d_in for one in edits)


def _costs_less(text: str, right: str) -> Claim:
    measure, paper = "nll_rise_at_equal_effect", f"{_PAPER}steers at a smaller perplexity cost than layer-local maps."
    return Claim(text, "lineas", Side("lineas", measure), Side(right, measure), paper=paper)


CLAIMS = [
    _costs_less("At equal effect LinEAS costs less than maps fitted hook by hook", "local maps"),
    _costs_less("At equal effect LinEAS costs less than adding the difference of means", "difference of means"),
    Claim(
        "LinEAS brings held-out passages closer to the target's distribution than maps fitted hook by hook",
        "lineas",
        Side("lineas", "distance"),
        Side("local maps", "distance"),
        paper=f"{_PAPER}maps learned end to end align distributions better than layer-local ones.",
    ),
    Claim(
        "The sparse maps leave 90 % of the coordinates unchanged",
        "lineas",
        Side(SPARSE, "unchanged"),
        0.9,
        below=False,
        paper=f"{_PAPER}the maps can be reduced to about 1 % of the units.",
    ),
    Claim(
        "The sparse maps keep 80 % of the effect",
        "lineas",
        Side(SPARSE, "effect"),
        Side("lineas", "effect"),
        below=False,
        times=0.8,
        paper=f"{_PAPER}the maps can be reduced to about 1 % of the units.",
    ),
]
