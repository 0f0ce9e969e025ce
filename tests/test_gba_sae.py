"""GBA: targets of the groups, its loss against a dense formula, biases moved by the rule alone, their range, its export."""

from typing import Any

import pytest
import torch
from tiny_saes import D_SAE, build, info, rows

from saelab import TrainConfig, train
from saelab.distributed import SINGLE_PROCESS
from saelab.kernels.sparse_acts import SparseActs
from saelab.saes import GBASAE, Batch, GBAConfig
from saelab.saes.target_frequencies import FiringCounts, bias_moves, groups_of, target_frequencies


def targets(d_sae: int, n_groups: int, ratio: float, total: float | None = None) -> torch.Tensor:
    return target_frequencies(groups_of(d_sae, n_groups), ratio, total)


def test_targets_fall_geometrically_from_group_to_group():
    each = targets(30, 3, 100)
    torch.testing.assert_close(each[::10], torch.tensor([0.5, 0.05, 0.005], dtype=torch.float64))
    assert all(len(set(group.tolist())) == 1 for group in each.split(10))
    assert groups_of(7, 3).tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert targets(4, 1, 500, 1.0).tolist() == pytest.approx([0.25] * 4)


@pytest.mark.parametrize(("total", "first"), [(3.0, 3 / 11.1), (5.55, 0.5), (8.0, 0.5), (15.0, 0.5)])
def test_targets_add_up_to_the_l0_and_none_is_above_half(total, first):
    each = targets(30, 3, 100, total)
    assert float(each.sum()) == pytest.approx(total) and float(each[0]) == pytest.approx(first)
    below = each[each < 0.4999][::10]
    assert len(below) < 2 or float(below[0] / below[1]) == pytest.approx(10)


def test_loss_and_gradients_are_those_of_the_dense_formula():
    sae, raw = build("gba").double(), rows(40).double()
    with torch.no_grad():
        sae.output_scale.copy_(torch.linspace(0.5, 2, D_SAE))
    sae.zero_grad()
    loss = sae.loss(Batch(raw, raw), info())
    loss.total.backward()
    assert [name for name, _ in sae.named_parameters()] == ["W_dec", "output_scale"]  # no bias has a gradient
    got = {name: one.grad for name, one in sae.named_parameters()}
    sae.zero_grad()
    x = sae.normalize(raw)
    z = sae.output_scale * ((x - sae.b_dec) @ sae.W_dec.T + sae.b_enc).relu()
    torch.testing.assert_close(loss.feature_acts.to_dense(), z)
    torch.testing.assert_close(sae.encode(raw).to_dense(), z)
    total = (z @ sae.W_dec + sae.b_dec - x).square().sum() / (x - x.mean(0)).square().sum()  # and no sparsity term
    torch.testing.assert_close(loss.total, total)
    total.backward()
    for name, one in sae.named_parameters():
        torch.testing.assert_close(got[name], one.grad, rtol=1e-9, atol=1e-9)


def test_moves_by_hand():
    groups = groups_of(8, 4)
    each = torch.tensor([0.5, 0.25, 0.125, 0.0625])[groups]
    frequencies = torch.tensor([0.6, 0.04, 0.25, 0.2, 0.2, 0.01, 0.0, 0.0])
    largest = torch.tensor([3.0, 1.0, 9.0, 9.0, 2.0, 4.0, 0.0, 0.0])
    up = sum(largest.tolist()) / 6  # of a group of which none fired: the mean over all that fired
    assert bias_moves(frequencies, largest, each, groups).tolist() == pytest.approx([-3, 2, 0, 0, -2, 3, up, up])
    assert not bias_moves(torch.zeros(8), torch.zeros(8), each, groups).any()


@torch.no_grad()
def expected(sae: Any, x: torch.Tensor) -> torch.Tensor:
    """The biases after an adaptation, from all pre-activations of normalised `x`."""
    u = (x - sae.b_dec) @ sae.W_dec.T + sae.b_enc
    p, r = (u > 0).double().mean(0), u.amax(0).clamp_min(0)
    moved = sae.b_enc.clone()
    for i in range(D_SAE):
        here = [float(r[j]) for j in range(D_SAE) if sae.groups[j] == sae.groups[i] and r[j] > 0]
        if p[i] > sae.targets[i]:
            moved[i] -= 0.1 * r[i]
        elif p[i] < 0.1 * sae.targets[i]:
            moved[i] += 0.1 * (sum(here) / len(here) if here else float(r[r > 0].mean()))
    return moved.clamp(-(12**0.5), 0)


def test_counts_add_up_until_they_are_taken():
    counts = FiringCounts(3)
    for acts in ([[1.0, 0, 2], [3, 0, 0]], [[0, 0, 5.0]]):
        counts.add(SparseActs.from_dense(torch.tensor(acts)), SINGLE_PROCESS)
    frequencies, largest = counts.take()
    assert frequencies.tolist() == pytest.approx([2 / 3, 0, 2 / 3]) and largest.tolist() == [3, 0, 5]
    assert [one.tolist() for one in counts.take()] == [[0, 0, 0]] * 2


def test_biases_adapt_to_all_micro_batches_of_their_step_and_to_no_other():
    sae, raw = build("gba", adapt_every=3, bias_rate=0.1).double(), rows(70).double()
    x = sae.normalize(raw)
    with torch.no_grad():
        sae.b_enc[:8] = -5  # they are silent, and outside the range
    want, before = expected(sae, x), sae.b_enc.clone()
    for step in (0, 1, 3, 4):
        sae.loss(Batch(raw[:30], raw[:30]), info(step=step))
        sae.after_step()
        assert torch.equal(sae.b_enc, before)
    for part in (raw[:30], raw[30:]):
        sae.loss(Batch(part, part), info(step=5))
    with torch.no_grad():
        sae.W_dec.copy_(sae.W_dec.roll(1, 0))  # the optimiser's step: what counts are the weights of the gradient
    sae.after_step()
    torch.testing.assert_close(sae.b_enc, want)
    assert (want < before).sum() > 5 and (want[:8] == -(12**0.5)).all()
    after = sae.b_enc.clone()
    sae.after_step()
    assert torch.equal(sae.b_enc, after)


def test_a_rare_feature_rises_strictly_up_to_zero_and_a_frequent_one_falls():
    sae, x = build("gba", adapt_every=1, bias_rate=0.02), rows(300)
    sae.counts.take()  # of the batch that it was built with
    with torch.no_grad():
        sae.b_enc[:4], sae.b_enc[4:36], sae.b_enc[36:] = -3.4, -1.0, -0.001
        sae.W_dec[:4] /= 5
    before = sae.b_enc.clone()
    sae.loss(Batch(x, x), info(step=0))
    sae.after_step()
    assert (sae.b_enc[:4] > before[:4]).all() and (sae.b_enc[36:] < before[36:]).all()
    with torch.no_grad():
        sae.b_enc[:4] = -0.001
        sae.W_dec[:4] = 0
    sae.loss(Batch(x, x), info(step=1))
    sae.after_step()
    assert torch.equal(sae.b_enc[:4], torch.zeros(4))


def test_on_gaussian_data_every_feature_ends_at_its_target():
    config = GBAConfig(20, n_groups=4, frequency_ratio=20, target_l0=3.0, adapt_every=1)
    sae = GBASAE(config, 16)
    with torch.no_grad():
        sae.b_enc.zero_()  # as far off as it can be
    generator = torch.Generator().manual_seed(0)
    for step in range(150):
        x = torch.randn(1500, 16, generator=generator)
        sae.loss(Batch(x, x), info(step=step))
        sae.after_step()
    fired = sae.encode(torch.randn(40_000, 16, generator=generator)).features
    frequency = torch.bincount(fired, minlength=20) / 40_000
    assert (frequency <= 1.2 * sae.targets).all() and (frequency > 0.1 * sae.targets).all()
    assert (sae.b_enc <= 0).all() and (sae.b_enc >= -4).all()


@pytest.mark.parametrize("normalize", ["center_and_scale", "scale", "none", "constant_norm"])
def test_it_starts_at_its_targets_in_the_units_of_the_data(normalize):
    sae = GBASAE(GBAConfig(40, 8.0, normalize=normalize), 12)
    x = 7 * torch.randn(20_000, 12, generator=torch.Generator().manual_seed(0)) + torch.linspace(-5, 5, 12)
    moments = x.mean(0), float(x.square().sum(1).mean())
    sae.set_normalization(*moments)
    sae.start_from(*moments)
    assert sae.encode(x).nnz / len(x) == pytest.approx(8.0, rel=0.1)
    centered = sae.normalize(x) - sae.b_dec
    assert float(sae.input_norm) == pytest.approx(float(centered.square().sum(1).mean().sqrt()), rel=0.02)


def test_scales_stay_positive():
    sae = build("gba")
    with torch.no_grad():
        sae.output_scale[:3] = -1.0
    sae.after_step()
    assert (sae.output_scale > 0).all() and float(sae.output_scale[3].detach()) == 1


def test_an_adapted_run_that_was_cut_ends_the_same(tmp_path):
    config, x = GBAConfig(32, 4.0, adapt_every=3), rows(900)
    cut = TrainConfig(n_tokens=64 * 20, batch_size=64, checkpoint_every=7, grad_accumulation=2, device="cpu")
    sae = train(config, x, cut, tmp_path / "sae", progress=False)
    assert not torch.equal(sae.b_enc, GBASAE(config, 12).b_enc)
    for file in ("sae.json", "sae.safetensors", "golden.safetensors"):
        (tmp_path / "sae" / file).unlink()
    assert train(config, x, cut, tmp_path / "sae", progress=False).hash == sae.hash


def test_it_is_exported_as_the_relu_sae_that_computes_the_same():
    sae = build("gba").double()
    with torch.no_grad():
        sae.output_scale.copy_(torch.linspace(0.5, 2, D_SAE))
    relu = sae.as_exported()
    one, other = sae(rows(30).double()), relu(rows(30).double())
    assert relu.variant == "relu" and torch.equal(one.acts.features, other.acts.features)
    torch.testing.assert_close(one.acts.values, other.acts.values)
    torch.testing.assert_close(one.x_hat, other.x_hat)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"target_l0": 9.0}, "target_l0=9.0 must be more than 0 and at most half of d_sae=16"),
        ({"target_l0": 0.0}, "target_l0=0.0 must be more than 0"),
        ({"n_groups": 17}, "n_groups=17 must be at most d_sae=16"),
        ({"n_groups": 0}, "n_groups=0"),
        ({"adapt_every": 0}, "adapt_every=0"),
        ({"frequency_ratio": 0.5}, "frequency_ratio=0.5 must be at least 1"),
        ({"bias_rate": 1.0}, "bias_rate=1.0 must be between 0 and 1"),
    ],
)
def test_bad_settings_are_refused(changes, says):
    with pytest.raises(ValueError, match=says):
        GBAConfig(16, **changes)
