"""The variants that select over a batch: identities between them, their thresholds, Zipf budgets, nested groups."""

from typing import Any

import pytest
import torch
from tiny_saes import D_IN, D_SAE, build, config_of, info, rows

from saelab.kernels.encode_threshold import encode_threshold
from saelab.saes import VARIANTS, Batch, FeatureChoiceConfig, MatryoshkaConfig, StepInfo, TopKConfig
from saelab.saes.zipf import Density, frequency_rank, underused, zipf_capacity

BATCHWISE = ("batch_topk", "mutual_choice", "feature_choice", "matryoshka")


def selected(name: str, x: torch.Tensor, sae=None, step: int = 10, **changes) -> torch.Tensor:
    """The dense codes that a training step of `name` sees."""
    sae = sae or build(name, **changes)
    acts = sae.select(sae.normalize(x), StepInfo(torch.zeros(D_SAE, dtype=torch.bool), step, 100))
    return acts.to_dense().detach()


def fresh(name: str, config: Any = None, d_in: int = D_IN) -> Any:
    """An SAE that has seen no batch."""
    return VARIANTS[name](config or config_of(name), d_in, 1)


def test_e1_mutual_choice_selects_as_batch_topk():
    assert torch.equal(selected("mutual_choice", rows(30)), selected("batch_topk", rows(30)))


def test_e2_batch_topk_of_one_token_is_topk():
    x = rows(1)
    assert torch.equal(selected("batch_topk", x), selected("topk", x))


def test_e4_feature_choice_with_one_feature_is_mutual_choice():
    configs = VARIANTS["feature_choice"].Config(1, 1, progressive=False), VARIANTS["mutual_choice"].Config(1, 1)
    saes = [fresh(name, c) for name, c in zip(("feature_choice", "mutual_choice"), configs, strict=True)]
    x, state = rows(40), StepInfo(torch.zeros(1, dtype=torch.bool), 10, 100)
    one, other = (sae.select(sae.normalize(x), state).to_dense() for sae in saes)
    assert torch.equal(one, other) and 0 < int((one != 0).sum()) < 40


def test_e5_rows_columns_and_totals_add_up():
    x = rows(64)
    with torch.no_grad():
        saes = {name: build(name, k=4) for name in ("topk", "batch_topk")}
        saes["feature_choice"] = build("feature_choice", k=4, progressive=False)
        for sae in saes.values():
            sae.b_enc.fill_(30.0)  # everything is positive
    codes = {name: selected(name, x, sae) != 0 for name, sae in saes.items()}
    assert codes["topk"].sum(1).tolist() == [4] * 64
    assert int(codes["batch_topk"].sum()) == 4 * 64 and len(set(codes["batch_topk"].sum(1).tolist())) > 1
    assert torch.equal(codes["feature_choice"].sum(0), saes["feature_choice"].capacity(64))
    assert int(codes["feature_choice"].sum()) == 4 * 64


def test_e6_abs_topk_is_odd_and_folds_topk_of_both_signs():
    sae = build("abs_topk", "none")
    with torch.no_grad():
        sae.b_enc.zero_()
    x = rows(20)
    assert torch.equal(sae.encode(-x).to_dense(), -sae.encode(x).to_dense())
    both = VARIANTS["topk"](TopKConfig(2 * D_SAE, 5, normalize="none"), D_IN)
    with torch.no_grad():
        both.W_enc.copy_(torch.cat([sae.W_enc, -sae.W_enc]))
    positive, negative = both.encode(x).to_dense().split(D_SAE, 1)
    assert torch.equal(positive - negative, sae.encode(x).to_dense())


def test_e7_abs_topk_is_topk_where_nothing_is_negative():
    topk, abs_topk = build("topk"), build("abs_topk", subtract_b_dec=True)
    with torch.no_grad():
        topk.b_enc.fill_(30.0)
        abs_topk.b_enc.fill_(30.0)
    assert torch.equal(topk.encode(rows(20)).to_dense(), abs_topk.encode(rows(20)).to_dense())


def test_abs_topk_keeps_the_largest_magnitudes_by_hand():
    sae = VARIANTS["abs_topk"](VARIANTS["abs_topk"].Config(4, 2, normalize="none"), 1)
    with torch.no_grad():
        sae.W_enc.copy_(torch.tensor([[1.0], [-3.0], [2.0], [0.5]]))
    assert sae.encode(torch.ones(1, 1)).to_dense().tolist() == [[0, -3, 2, 0]]


def test_e8_batch_topk_is_a_constant_threshold_between_the_last_kept_and_the_first_left():
    sae, x = build("batch_topk"), rows(50)
    normal = sae.normalize(x)
    kept = selected("batch_topk", x, sae)
    pre_acts = ((normal - sae.b_dec) @ sae.W_enc.T + sae.b_enc).detach()
    best = pre_acts.flatten().sort(descending=True).values
    middle = float((best[5 * 50 - 1] + best[5 * 50]) / 2)
    jump = encode_threshold(normal, sae.W_enc, sae.b_enc, middle, center=sae.b_dec)
    assert torch.equal(jump.to_dense() != 0, kept != 0)


@pytest.mark.parametrize("name", BATCHWISE)
def test_a_fresh_sae_has_no_threshold_and_says_so(name):
    sae = fresh(name)
    with pytest.raises(ValueError, match=f"{name}.*no threshold"):
        sae.encode(rows(3))


def test_threshold_is_a_mean_and_starts_anew_in_the_last_twentieth():
    sae = fresh("batch_topk")
    for step, smallest in [(0, 4.0), (1, 2.0), (95, 10.0), (96, 20.0), (97, torch.inf)]:
        sae.observe(torch.tensor(smallest), StepInfo(torch.zeros(D_SAE, dtype=torch.bool), step, 100))
        if step == 1:
            assert sae.threshold.item() == 3.0
    assert sae.threshold.item() == 15.0 and sae.n_observed.item() == 2


@pytest.mark.parametrize("name", ["batch_topk", "mutual_choice", "feature_choice", "matryoshka"])
def test_threshold_gives_the_promised_l0_on_other_tokens(name):
    """No training: weights stand still, the threshold is observed on 40 batches; held-out L0 is within 5 % of k."""
    sae: Any = build(name, k=4) if name != "feature_choice" else build(name, k=4, progressive=False)
    for step in range(60, 100):
        selected(name, rows(256, seed=step), sae, step)
    held_out = rows(4000, seed=1000)
    l0 = sae.encode(held_out).nnz / 4000
    wanted = (selected(name, held_out, sae, 99) != 0).sum().item() / 4000  # below k where too few are positive
    assert l0 == pytest.approx(wanted, rel=0.05)


def test_a_feature_that_was_never_kept_stays_silent():
    sae = fresh("feature_choice")
    smallest = torch.full((D_SAE,), 0.1)
    smallest[7] = torch.inf
    sae.observe(smallest, info())
    assert 7 not in sae.encode(100 * rows(200)).features.tolist()


@pytest.mark.parametrize(
    ("d_sae", "budget", "cap"), [(40, 256, 64), (7, 7, 3), (7, 21, 3), (1, 5, 9), (500, 4000, 2048)]
)
@pytest.mark.parametrize(("exponent", "shift"), [(1.0, 0.0), (0.0, 0.0), (2.0, 2.7)])
def test_zipf_places_spend_the_budget_falling_with_rank(d_sae, budget, cap, exponent, shift):
    places = zipf_capacity(d_sae, budget, cap, exponent, shift)
    assert int(places.sum()) == budget
    assert int(places.min()) >= 1 and int(places.max()) <= cap
    assert bool((places.diff() <= 0).all())


def test_zipf_places_by_hand():
    """Budget 11 over weights 1, 1/2, 1/3: 6, 3 and 2."""
    assert zipf_capacity(3, 11, 100).tolist() == [6, 3, 2]
    with pytest.raises(ValueError, match="budget of 2 .*3 features"):
        zipf_capacity(3, 2, 100)


def test_ranks_and_density_by_hand():
    assert frequency_rank(torch.tensor([0.1, 0.4, 0.1, 0.0])).tolist() == [1, 0, 2, 3]
    density = Density(3)
    for dense in ([[1.0, 0, 0], [2.0, 3.0, 0]], [[1.0, 0, 0], [0, 0, 0]]):
        density.update(VARIANTS["topk"](TopKConfig(3, 1), 1).encode(torch.zeros(0, 1)).from_dense(torch.tensor(dense)))
    torch.testing.assert_close(density.mean, torch.tensor([0.75, 0.25, 0.0]), rtol=1e-3, atol=1e-3)


def test_underused_are_those_under_a_tenth_of_zipf():
    """Budget of 11 places in 10 tokens: expected shares 0.6, 0.3, 0.2 by rank."""
    assert underused(torch.tensor([0.019, 0.5, 0.031]), 11, 10).tolist() == [True, False, False]
    assert underused(torch.tensor([0.5, 0.0, 0.5]), 11, 10).tolist() == [False, True, False]


def test_aux_zipf_teaches_underused_features_and_no_other():
    sae, x = build("topk", aux="aux_zipf"), rows(256)
    with torch.no_grad():
        sae.b_enc[:4] -= 5  # these are positive at times, but never among the five best
        sae.density.load_state_dict(Density(D_SAE).state_dict())
    loss = sae.loss(Batch(x, x), info())
    chosen = underused(sae.density.mean, 5 * 256, 256)
    assert {0, 1, 2, 3} <= set(chosen.nonzero().flatten().tolist()) < set(range(D_SAE))
    loss.terms["aux_zipf"].backward()
    assert sae.W_dec.grad is not None
    assert torch.equal(sae.W_dec.grad.abs().sum(1) > 0, chosen)
    assert loss.total.item() == pytest.approx((loss.terms["fvu"] + loss.terms["aux_zipf"] / 32).item(), rel=1e-6)


def test_feature_choice_moves_from_mutual_choice_to_its_budgets():
    sae, x = build("feature_choice", k=4), rows(64)
    with torch.no_grad():
        sae.b_enc.fill_(30.0)
    with torch.no_grad():
        like = build("mutual_choice", k=4)
        like.b_enc.fill_(30.0)
    mutual = selected("mutual_choice", x, like)
    assert torch.equal(selected("feature_choice", x, sae, step=10), mutual)
    at_end = (selected("feature_choice", x, sae, step=80) != 0).sum(0)
    assert torch.equal(at_end, sae.capacity(64))
    between = (selected("feature_choice", x, sae, step=62) != 0).sum(0)
    assert not torch.equal(between, at_end) and not torch.equal(between, (mutual != 0).sum(0))


def test_feature_choice_leaves_no_feature_dead():
    sae, x = build("feature_choice", k=4, progressive=False), rows(64)
    with torch.no_grad():
        sae.b_enc.fill_(30.0)
    assert int((selected("feature_choice", x, sae) != 0).any(0).sum()) == D_SAE


def test_harder_tokens_get_more_features_of_a_batch():
    easy, hard = 0.2 * rows(100), 2 * rows(100, 1)
    fired = selected("mutual_choice", torch.cat([easy, hard]), build("mutual_choice", "none")) != 0
    assert float(fired[100:].sum()) > 1.5 * float(fired[:100].sum())


def test_e16_matryoshka_of_one_group_is_batch_topk_with_half_the_weight():
    """Loss (|x - b_dec|^2 + |x - x_hat|^2) / 2 and the same codes."""
    matryoshka, batch_topk = build("matryoshka", group_fractions=(1.0,)), build("batch_topk")
    x = rows(32)
    one, other = (sae.loss(Batch(x, x), info()) for sae in (matryoshka, batch_topk))
    assert torch.equal(one.feature_acts.to_dense(), other.feature_acts.to_dense())
    torch.testing.assert_close(one.terms["fvu"], other.terms["fvu"])
    normal = batch_topk.normalize(x)
    without = (normal - batch_topk.b_dec).square().sum() / (normal - normal.mean(0)).square().sum()
    torch.testing.assert_close(one.total, (without + other.total) / 2)


def test_matryoshka_prefixes_decode_alone():
    sae, x = build("matryoshka"), rows(16)
    assert sae.config.prefixes == [2, 5, 10, 20, 40] or sum(sae.config.group_sizes) == D_SAE
    acts = sae.encode(x)
    dense = acts.to_dense()
    dense[:, sae.config.prefixes[2] :] = 0
    assert torch.equal(acts.below(sae.config.prefixes[2]).to_dense(), dense)


def test_matryoshka_levels_by_hand():
    """d_in 1, two groups of one feature, x 4 and 0: codes (3, 1) and none; errors 16, 1, 0 over a variance of 8."""
    sae = VARIANTS["matryoshka"](MatryoshkaConfig(2, 1, normalize="none", group_fractions=(0.5, 0.5)), 1)
    with torch.no_grad():
        sae.W_enc.copy_(torch.tensor([[0.75], [0.25]]))
        sae.W_dec.fill_(1.0)
    x = torch.tensor([[4.0], [0.0]])
    loss = sae.loss(Batch(x, x), StepInfo(torch.zeros(2, dtype=torch.bool), 1, 10))
    assert loss.total.item() == pytest.approx((16 + 1 + 0) / 3 / 8)
    assert loss.terms["fvu"].item() == 0


def test_multi_topk_adds_an_eighth_of_the_fvu_of_four_k():
    sae, x = build("topk", multi_topk=True), rows(32)
    loss = sae.loss(Batch(x, x), info())
    more = build("topk", k=20)
    more.load_state_dict(sae.state_dict())
    wide = more.loss(Batch(x, x), info())
    torch.testing.assert_close(loss.total, loss.terms["fvu"] + wide.terms["fvu"] / 8)
    assert loss.feature_acts.counts.max().item() == 5


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: FeatureChoiceConfig(16, 4, zipf_exponent=-1.0), "zipf_exponent=-1"),
        (lambda: MatryoshkaConfig(16, 4, group_fractions=(0.5, 0.6)), "add up to 1"),
        (lambda: MatryoshkaConfig(4, 2), "groups of"),
    ],
)
def test_bad_configs_name_the_value(make, says):
    with pytest.raises(ValueError, match=says):
        make()
