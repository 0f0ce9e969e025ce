"""Edits of features in a model, of every variant: what they add is the difference of two decodes, one by one and together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_saes import config_of
from torch import Tensor

from saelab.errors import SaelabError
from saelab.interop.directions import constant_vector
from saelab.kernels.sparse_acts import SparseActs, columns, summed
from saelab.saes import VARIANTS, Batch, StepInfo
from saelab.saes.trained_hooks import needs_other_hooks
from saelab.steering import FeatureHandle
from saelab.steering.attenuate import Attenuation, Posterior
from saelab.steering.control import along

HOOK, HOOK_OUT = "blocks.1.hook_resid_post", "blocks.2.hook_mlp_out"
TEXT = "The weather today is fine, and she said that it would not be so for long."
NOT_ADDITIVE = [name for name, variant in VARIANTS.items() if not variant.additive]


def activations(lm: Any, hook_name: str) -> Tensor:
    return next(iter(lm.stream_activations([lm.to_ids(TEXT)], [hook_name])))[hook_name][0].clone()


def sae_of(name: str, x: Tensor) -> Any:
    """A random SAE that has seen these rows, which set the threshold of those that have one."""
    shape: dict[str, Any] = {"n_sources": 2} if "n_sources" in VARIANTS[name].extra_dims else {}
    sae: Any = VARIANTS[name](config_of(name, 64), 32, seed=3, **shape)
    torch.manual_seed(0)
    with torch.no_grad():
        if not bool(sae.W_dec.any()):  # a transcoder's starts at 0
            sae.W_dec.add_(0.2 * torch.randn(sae.W_dec.shape))
        if not sae.extra_dims:
            sae.set_normalization(x.mean(0), float(x.square().sum(1).mean()))
        rows = torch.stack([x] * sae.n_sources, 1) if "n_sources" in sae.shape else x
        sae.loss(Batch(rows, rows), StepInfo(torch.zeros(64, dtype=torch.bool), 10, 100))
    origin: dict[str, Any] = {"hook_name": HOOK} | ({"hook_name_out": HOOK_OUT} if "d_out" in sae.shape else {})
    if "n_sources" in sae.shape:
        origin["hook_names"] = ["blocks.0.hook_resid_post", HOOK]
    sae.provenance = replace(sae.provenance, origin=origin)
    return sae.requires_grad_(False)


def attenuation(sae: Any, features: tuple[int, ...]) -> Attenuation:
    """A mask: it takes 3/4 of the activation."""
    posterior = Posterior(*[torch.ones(len(features))] * len(Posterior._fields))
    distances = (1.0,) * len(features)
    return Attenuation(HOOK, sae, features, distances, posterior, how="mask", strength=0.75)


def cases(sae: Any, busy: list[int]) -> list[tuple[list[Any], Callable[[Tensor], None]]]:
    """Edits of one `lm.steer`, and what they make of dense feature activations."""
    one, other, third = busy
    a, b = (FeatureHandle(sae, feature) for feature in (one, other))

    def added(z: Tensor) -> None:
        z[:, one] += 2.5

    if needs_other_hooks(sae):
        return [([a.add(2.5, unit="raw")], added)]

    def halved(z: Tensor) -> None:
        z[:, one] *= 0.5

    def clamped(z: Tensor) -> None:
        z[:, one] = 1.5

    def weakened(z: Tensor) -> None:
        z[:, [other, third]] *= 0.25

    def all_of_it(z: Tensor) -> None:
        added(z)
        weakened(z)

    def two(z: Tensor) -> None:
        clamped(z)
        z[:, other] -= 2.0

    return [
        ([a.add(2.5, unit="raw")], added),
        ([a.scale(0.5)], halved),
        ([a.clamp(1.5, unit="raw")], clamped),
        ([attenuation(sae, (other, third))], weakened),
        ([a.add(2.5, unit="raw"), attenuation(sae, (other, third))], all_of_it),
        ([attenuation(sae, (other, third)), a.add(2.5, unit="raw")], all_of_it),
        ([b.add(-2.0, unit="raw"), a.clamp(1.5, unit="raw")], two),
    ]


@pytest.mark.parametrize("name", VARIANTS)
def test_an_edit_is_the_difference_of_two_decodes(tiny_lm, name):
    sae = sae_of(name, activations(tiny_lm, HOOK)[1:])
    hook_name = FeatureHandle(sae, 0).hook_name
    plain = activations(tiny_lm, hook_name)
    read = torch.stack([plain] * sae.n_sources, 1) if "n_sources" in sae.shape else plain
    z = sae.encode(read).to_dense()
    busy = (z[1:] != 0).float().mean(0).topk(3).indices.tolist()
    special = torch.isin(tiny_lm.to_ids(TEXT)[0], torch.tensor(tiny_lm.special_ids))
    free = ~special & (torch.arange(len(plain)) > 0)
    for edits, change in cases(sae, busy):
        after = z.clone()
        change(after)
        codes = [SparseActs.from_dense(torch.where(free[:, None], one, z)) for one in (z, after)]
        before, moved = (sae.decode(one, read) for one in codes)
        difference = (moved - before)[:, -1] if "n_sources" in sae.shape else moved - before
        with tiny_lm.steer(*edits):
            steered = activations(tiny_lm, hook_name)
        torch.testing.assert_close(
            steered, plain + difference, atol=2e-4, rtol=1e-4, msg=lambda m, e=edits: f"{e}: {m}"
        )
        assert float(difference.abs().max()) > 1e-2
        assert torch.equal(steered[(after == z).all(1) | ~free], plain[(after == z).all(1) | ~free]), edits


@pytest.mark.parametrize("name", NOT_ADDITIVE)
def test_what_one_feature_adds_depends_on_the_others(tiny_lm, name):
    x = activations(tiny_lm, HOOK)
    sae = sae_of(name, x[1:])
    edit = FeatureHandle(sae, 5).add(3.0, unit="raw")
    with tiny_lm.steer(edit):
        change = (activations(tiny_lm, HOOK) - x)[1:]
    assert float((change - change[0]).abs().max()) > 1e-2
    with pytest.raises(SaelabError, match="depends on the activations"):
        constant_vector(edit)


@pytest.mark.parametrize("name", NOT_ADDITIVE)
def test_its_control_is_as_large_at_every_token(tiny_lm, name):
    x, direction = activations(tiny_lm, HOOK)[None], torch.randn(32, generator=torch.Generator().manual_seed(1))
    edit = FeatureHandle(sae_of(name, x[0, 1:]), 5).add(3.0, unit="raw")
    control, positions = along(edit, direction), torch.arange(x.shape[1])[None]
    changes = [(one.apply(x, positions) - x)[0, 1:] for one in (edit, control)]
    torch.testing.assert_close(changes[1].norm(dim=1), changes[0].norm(dim=1), rtol=1e-4, atol=1e-4)
    along_it = changes[1] @ (direction / direction.norm())
    torch.testing.assert_close(along_it, changes[1].norm(dim=1), rtol=1e-4, atol=1e-4)
    assert not control.apply(x, positions)[0, 0].ne(x[0, 0]).any()
    nothing = along(replace(edit, value=0.0), direction)
    assert torch.equal(nothing.apply(x, positions), x)


def test_columns_are_added_and_what_becomes_0_is_dropped():
    dense = torch.tensor([[0.0, 2.0, 0.0, 1.0], [3.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    few = columns(torch.tensor([[1.0, -2.0], [0.0, 5.0], [0.5, 0.0]]), [3, 1], 4)
    assert few.features.tolist() == [1, 3, 1, 3] and few.values.tolist() == [-2.0, 1.0, 5.0, 0.5]
    total = summed([SparseActs.from_dense(dense), few])
    want = torch.tensor([[0.0, 0.0, 0.0, 2.0], [3.0, 5.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.5]])
    assert torch.equal(total.to_dense(), want) and total.features.tolist() == [3, 0, 1, 3]
