"""PolySAE: its decoder against dense formulas in float64, what the products add, the retraction, and bad ranks."""

from typing import Any

import pytest
import torch
from tiny_saes import D_IN, D_SAE, build, config_of, info, rows

from saelab.benchmarks.planted import pairs
from saelab.kernels.decode import decode
from saelab.kernels.sparse_acts import SparseActs
from saelab.losses import fvu
from saelab.saes import Batch, PolyConfig, PolySAE, TopKConfig, TopKSAE
from saelab.saes.interactions import pair_directions, pair_norms
from saelab.saes.poly import orthonormal
from saelab.training import TrainConfig, train

MODES = ("shared", "separate")
each_mode = pytest.mark.parametrize("mode", MODES)
RANKS: dict[str, Any] = {"rank": 10, "rank_pairs": 6, "rank_triples": 3}


def poly(mode: str, **changes: Any) -> Any:
    """A float64 SAE with ranks that differ, and weights that are not those of a start."""
    sae = build("poly", mode=mode, **(RANKS | changes)).double()
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, dtype=torch.float64)
    return sae


def weights(sae: Any) -> tuple[torch.Tensor, ...]:
    """U_1, U_2, U_3, C_1, C_2 and C_3, cut here by hand."""
    U, C = sae.U, sae.C
    cut = (U[:, :10], U[:, :6], U[:, :3]) if sae.config.mode == "shared" else (U[:, :10], U[:, 10:16], U[:, 16:])
    return (*cut, C[:, :10], C[:, 10:16], C[:, 16:])


def terms(sae: Any, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The linear, the quadratic and the cubic term, by sums over the ranks."""
    U_1, U_2, U_3, C_1, C_2, C_3 = weights(sae)
    linear, quadratic, cubic = (torch.zeros(len(z), D_IN, dtype=z.dtype) for _ in range(3))
    for r in range(10):
        linear = linear + (z @ U_1[:, r])[:, None] * C_1[:, r]
    for r in range(6):
        quadratic = quadratic + ((z @ U_1[:, r]) * (z @ U_2[:, r]))[:, None] * C_2[:, r]
    for r in range(3):
        cubic = cubic + ((z @ U_1[:, r]) * (z @ U_2[:, r]) * (z @ U_3[:, r]))[:, None] * C_3[:, r]
    return linear, sae.lambda2 * quadratic, sae.lambda3 * cubic


@torch.no_grad()
def without_products(sae: Any) -> Any:
    sae.lambda2.zero_()
    sae.lambda3.zero_()
    return sae


def decoded(sae: Any, z: torch.Tensor) -> torch.Tensor:
    """Without the bias, in the units of the weights."""
    return (sae.decode(SparseActs.from_dense(z)) - sae.center) * sae.scale - sae.b_dec


def codes(n: int, features: slice = slice(None)) -> torch.Tensor:
    z = torch.zeros(n, D_SAE, dtype=torch.float64)
    z[:, features] = torch.randn(z[:, features].shape, dtype=torch.float64).relu()
    return z


@each_mode
def test_sparse_decode_is_the_dense_formula(mode):
    sae, z = poly(mode), codes(20)
    torch.testing.assert_close(decoded(sae, z), sum(terms(sae, z)), rtol=1e-11, atol=1e-11)


@each_mode
def test_e14_without_products_it_is_a_linear_decoder(mode):
    sae, z = without_products(poly(mode)), codes(20)
    U_1, C_1 = weights(sae)[0], weights(sae)[3]
    torch.testing.assert_close(decoded(sae, z), z @ (U_1 @ C_1.T), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(decoded(sae, z), decode(SparseActs.from_dense(z), sae.decoder()[0]))
    topk = TopKSAE(TopKConfig(D_SAE, 5), D_IN, seed=3)
    start = without_products(PolySAE(PolyConfig(D_SAE, 5, mode=mode), D_IN, seed=3))
    torch.testing.assert_close(start(rows(20)).x_hat, topk(rows(20)).x_hat)


@each_mode
def test_of_two_codes_only_the_products_across_them_do_not_add_up(mode):
    sae, one, other = poly(mode), codes(20, slice(0, 15)), codes(20, slice(15, None))
    rest = decoded(sae, one + other) - decoded(sae, one) - decoded(sae, other)
    U_1, U_2, U_3, _, C_2, C_3 = weights(sae)
    p, q = ([z @ U for U in (U_1, U_2, U_3)] for z in (one, other))
    across = (p[0][:, :6] * q[1] + q[0][:, :6] * p[1]) @ C_2.T * sae.lambda2
    cut_p, cut_q = ([part[:, :3] for part in parts] for parts in (p, q))
    whole = [a + b for a, b in zip(cut_p, cut_q, strict=True)]
    mixed = whole[0] * whole[1] * whole[2] - cut_p[0] * cut_p[1] * cut_p[2] - cut_q[0] * cut_q[1] * cut_q[2]
    torch.testing.assert_close(rest, across + mixed @ C_3.T * sae.lambda3, rtol=1e-10, atol=1e-10)
    assert float(rest.detach().abs().max()) > 0.1
    sae = without_products(sae)
    rest = decoded(sae, one + other) - decoded(sae, one) - decoded(sae, other)
    torch.testing.assert_close(rest, torch.zeros_like(rest), atol=1e-11, rtol=0)


@each_mode
def test_terms_grow_with_their_degree(mode):
    sae, z = poly(mode), codes(20)
    linear, pairs, triples = terms(sae, z)
    for s in (0.5, 3.0):
        want = s * linear + s**2 * pairs + s**3 * triples
        torch.testing.assert_close(decoded(sae, s * z), want, rtol=1e-11, atol=1e-11)


@each_mode
def test_norms_are_of_what_a_feature_writes_at_1(mode):
    sae = poly(mode)
    want = decoded(sae, torch.eye(D_SAE, dtype=torch.float64)).norm(dim=1)
    torch.testing.assert_close(sae.decoder_norms, want, rtol=1e-10, atol=1e-10)


@each_mode
def test_a_pair_writes_what_two_features_write_together_and_not_alone(mode):
    sae = poly(mode)
    with torch.no_grad():
        sae.lambda3.zero_()
    one = torch.zeros(D_SAE, D_SAE, dtype=torch.float64)
    one[:, 7] = 1.0
    other = torch.eye(D_SAE, dtype=torch.float64)
    together = (decoded(sae, one + other) - decoded(sae, one) - decoded(sae, other)) / sae.scale
    together[7] /= 2  # of a feature with itself that is its square, twice
    torch.testing.assert_close(pair_directions(sae, 7), together.detach(), rtol=1e-9, atol=1e-10)
    norms = pair_norms(sae, [3, 7, 11])
    torch.testing.assert_close(norms[1], pair_directions(sae, 7)[[3, 7, 11]].norm(dim=1), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(norms, norms.T)
    with pytest.raises(ValueError, match="topk has no products"):
        pair_norms(build("topk"), [0, 1])


@each_mode
def test_gradcheck_of_the_decoder(mode):
    sae = poly(mode)
    acts = sae.encode(rows(4).double())
    held = dict(sae.named_parameters())
    names = ("U", "C", "b_dec", "lambda2", "lambda3")

    def rebuilt(values: torch.Tensor, *given: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(
            Rebuilt(sae), dict(zip([f"sae.{n}" for n in names], given, strict=True)), (acts, values)
        )

    inputs = [acts.values.detach(), *(held[name].detach() for name in names)]
    assert torch.autograd.gradcheck(rebuilt, [one.clone().requires_grad_() for one in inputs])


class Rebuilt(torch.nn.Module):
    """An SAE's decoder as a function of values, for `functional_call`."""

    def __init__(self, sae: Any) -> None:
        super().__init__()
        self.sae = sae

    def forward(self, acts: SparseActs, values: torch.Tensor) -> torch.Tensor:
        return self.sae.decode(acts.with_values(values))


@each_mode
def test_loss_is_the_dense_formula_with_dead_features_by_the_same_decoder(mode):
    sae, raw = poly(mode), rows(40).double()
    dead = torch.zeros(D_SAE, dtype=torch.bool)
    dead[:4] = True
    with torch.no_grad():
        sae.b_enc[:4] -= 20
    loss = sae.loss(Batch(raw, raw), info(dead))
    x = sae.normalize(raw)
    u = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    best = u.topk(5, dim=1)
    z = torch.zeros_like(u).scatter(1, best.indices, best.values.relu())
    error = sum(terms(sae, z)) + sae.b_dec - x
    fvu = error.square().sum() / (x - x.mean(0)).square().sum()
    alone = u.relu() * dead  # at most 6 per token: all four
    rest = -error.detach()
    auxk = (sum(terms(sae, alone)) - rest).square().sum() / (rest - rest.mean(0)).square().sum()
    torch.testing.assert_close(loss.terms["fvu"], fvu)
    torch.testing.assert_close(loss.terms["auxk"], auxk)
    torch.testing.assert_close(loss.total, fvu + auxk / 32)
    torch.testing.assert_close(loss.residual, error.detach())


@each_mode
def test_after_a_step_columns_are_orthonormal(mode):
    sae = poly(mode)
    sae.after_step()
    U_1, U_2, U_3 = weights(sae)[:3]
    for part in (U_1, U_2, U_3):
        torch.testing.assert_close(part.T @ part, torch.eye(part.shape[1], dtype=torch.float64), atol=1e-10, rtol=0)
    if mode == "separate":
        both = torch.cat([U_1[:, :3], U_2[:, :3], U_3], 1)
        torch.testing.assert_close(both.T @ both, torch.eye(9, dtype=torch.float64), atol=1e-10, rtol=0)
    before = sae.U.detach().clone()
    sae.after_step()  # a second one finds nothing to do: no column changes its sign
    torch.testing.assert_close(sae.U.detach(), before, atol=1e-12, rtol=0)
    with torch.no_grad():
        sae.U += 1e-4 * torch.randn(sae.U.shape, dtype=torch.float64)
    sae.after_step()
    assert float((sae.U - before).detach().abs().max()) < 2e-3


def test_a_column_that_points_back_keeps_its_side():
    columns = torch.tensor([[-2.0, 1.0], [0.0, -3.0], [0.0, 0.0]])
    torch.testing.assert_close(orthonormal(columns), torch.tensor([[-1.0, 0.0], [0.0, -1.0], [0.0, 0.0]]))


def test_products_start_in_the_unit_of_the_pre_activations():
    """What they write beside the linear part does not depend on the unit of the data."""
    shares = []
    for size in (0.01, 1.0, 100.0):
        x = size * rows(200)
        sae: Any = PolySAE(config_of("poly", normalize="none"), D_IN, seed=3)
        sae.start_from(x.double().mean(0).float(), x.double().square().sum(1).mean())
        with torch.no_grad():
            acts = sae.encode(x)
            linear = decode(acts, sae.W_dec)
            shares.append(float((sae.decode(acts) - sae.b_dec - linear).norm() / linear.norm()))
    assert shares[0] > 0.01 and shares == pytest.approx([shares[0]] * 3, rel=1e-3)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"rank": 4, "rank_pairs": 5}, "rank=4, rank_pairs=5: they must not rise"),
        ({"rank_pairs": 2, "rank_triples": 3}, "rank_pairs=2, rank_triples=3: they must not rise"),
        ({"rank": 0}, "rank=0 must be between 1 and 16"),
        ({"rank_triples": 17}, "rank_triples=17 must be between 1 and 16"),
        ({"rank_triples": 6, "mode": "separate"}, "3 [*] rank_triples.*d_sae=16.*rank_triples=6"),
    ],
)
def test_ranks_that_cannot_be_are_refused(given, says):
    with pytest.raises(ValueError, match=says):
        PolyConfig(16, 4, **given)


def test_ranks_that_the_input_does_not_have_are_refused_and_defaults_fit():
    wide: list[dict[str, Any]] = [{"rank": 13}, {"rank_pairs": 13}, {"rank_triples": 13}]
    for given in wide:
        with pytest.raises(ValueError, match="=13.*d_in=12"):
            PolySAE(PolyConfig(64, 4, **given), 12)
    assert PolyConfig(64, 4).ranks(32) == (32, 4, 4) and PolyConfig(8, 4).ranks(32) == (8, 1, 1)
    assert PolyConfig(64, 4, rank_pairs=16).ranks(32) == (32, 16, 4) and PolyConfig(64, 4, rank=5).ranks(32) == (
        5,
        1,
        1,
    )
    assert (
        PolyConfig(64, 4, rank_triples=8).ranks(32) == (32, 8, 8) and PolyConfig(64, 4, rank_pairs=2).ranks(32)[2] == 2
    )
    assert PolyConfig(8, 4, mode="separate", rank=8, rank_pairs=8).ranks(32) == (8, 8, 1)


def test_training_keeps_the_columns_and_learns_products():
    """Pairs of features bring a direction of their own, which no linear decoder of as many features has."""
    data, found = pairs(0, d_in=16, n_features=8, n_products=4, n_together=0), {}
    steps = TrainConfig(n_tokens=300 * 128, batch_size=128, lr=3e-2, device="cpu")
    x = data.held_out(2000, 0)
    for config in (TopKConfig(8, 3), PolyConfig(8, 3, mode="separate", rank_pairs=8)):
        sae: Any = train(config, data.stream(0), steps, progress=False)
        found[sae.variant] = float(fvu(x, sae(x).x_hat.detach()))
    assert found["poly"] < 0.5 * found["topk"], found
    for part in sae.projections(sae.U.detach()):
        torch.testing.assert_close(part.T @ part, torch.eye(part.shape[1]), atol=1e-5, rtol=0)
