"""AFA error and the lower bounds on epsilon: by hand, in raw units under every normalisation, and below the true coherence."""

import pytest
import torch
from tiny_saes import D_SAE, build, rows

from saelab.evaluation.norm_match import NormPairs, afa_error, epsilon_lbo, epsilon_lbo_active, norm_pairs
from saelab.saes import VARIANTS

SUMS = [name for name in VARIANTS if "coder" not in name and name not in ("codebook", "poly")]


def test_by_hand():
    """|x| 5, 2, 0 and 2; activations (3, 4), (2, 1), none, and one of 3, among three vectors."""
    f, l1 = torch.tensor([5.0, 5**0.5, 0, 3]).double(), torch.tensor([7.0, 3, 0, 3]).double()
    pairs = NormPairs(torch.tensor([5.0, 2, 0, 2]).double(), f, l1, 3)
    assert afa_error(pairs) == pytest.approx(((5**0.5 - 2) ** 2 + 1) / 4)
    torch.testing.assert_close(epsilon_lbo(pairs), torch.tensor([0.0, 1 / 10, 0, 5 / 18]).double())
    torch.testing.assert_close(epsilon_lbo_active(pairs), torch.tensor([0.0, 1 / 4, 0, torch.inf]).double())


@pytest.mark.parametrize("normalize", ["none", "scale", "center_and_scale", "layer_norm", "constant_norm"])
@pytest.mark.parametrize("name", SUMS)
@torch.no_grad()
def test_activations_are_the_lengths_of_what_is_added_up(name, normalize):
    """One feature at a time is decoded, in raw units, and what no feature writes counts as one more."""
    sae, x = build(name, normalize), rows(7)
    pairs, acts = norm_pairs(sae, x), sae.encode(x)
    nothing = acts.where(acts.features < 0)
    bias = sae.decode(nothing, x)
    alone = [sae.decode(acts.where(acts.features == i), x) - bias for i in range(D_SAE)]
    f = torch.stack([*alone, bias], 1).norm(dim=2).double()
    torch.testing.assert_close(pairs.x, x.norm(dim=1).double())
    torch.testing.assert_close(pairs.f, f.norm(dim=1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pairs.f_l1, f.sum(1), rtol=1e-4, atol=1e-5)
    assert pairs.n_vectors == D_SAE + 1


@torch.no_grad()
def test_the_bounds_are_below_the_coherence_of_the_vectors():
    """For tokens that the SAE reconstructs exactly, as the theorem supposes."""
    sae = build("topk").double()
    acts = sae.encode(rows(200).double())
    x = sae.decode(acts)
    bias = sae.decode(acts.where(acts.features < 0))[0]
    vectors = torch.nn.functional.normalize(torch.cat([sae.W_dec, bias[None]]), dim=1)
    coherence = float((vectors @ vectors.T).fill_diagonal_(0).abs().max())
    lengths = torch.cat([acts.to_dense() / sae.scale, bias.norm().expand(200, 1)], 1)
    pairs = NormPairs(x.norm(dim=1), lengths.norm(dim=1), lengths.sum(1), D_SAE + 1)
    loose, tight = epsilon_lbo(pairs), epsilon_lbo_active(pairs)
    assert bool((loose <= tight).all()) and 0.05 < float(tight.max()) <= coherence


@pytest.mark.parametrize("name", ["transcoder", "crosscoder", "codebook"])
def test_what_does_not_add_up_to_its_input_is_refused(name):
    with pytest.raises(ValueError, match=f"A {name} does not reconstruct"):
        norm_pairs(build(name), rows(3))
