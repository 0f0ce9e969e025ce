"""Options of the Matryoshka SAE against dense float64 formulas: selection per token, weights, sampled prefixes, aux per level."""

from typing import Any

import pytest
import torch
from tiny_saes import D_SAE, build, info, interrupt_before, rows

import saelab
from saelab.interop.describing import blueprint_of
from saelab.saes import Batch, MatryoshkaConfig
from saelab.saes.config import settings
from saelab.saes.matryoshka import sampled_prefixes


def double(**options):
    sae = build("matryoshka", **options).double()
    x = rows(24).double()
    return sae, x, sae.normalize(x)


def dense(sae, x, k=5):
    """Feature activations by the k largest of each token, or of the batch."""
    u = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    last = u.topk(k, dim=1).values[:, -1:] if sae.config.select == "topk" else u.flatten().topk(k * len(u)).values[-1]
    return u * (u >= last) * (u > 0)


def nested(sae, x, ends, weights):
    """Weighted mean of the errors with nothing and with each prefix, over the variance."""
    z = dense(sae, x)
    parts = [x - sae.b_dec, *(x - sae.b_dec - z[:, :end] @ sae.W_dec[:end] for end in ends)]
    errors = [weight * part.square().sum() for weight, part in zip([1.0, *weights], parts, strict=True)]
    return sum(errors) / (1 + sum(weights)) / (x - x.mean(0)).square().sum()


ENDS = [2, 5, 10, 20, 40]
OPTIONS: dict[str, Any] = {
    "plain": ({}, None, [1.0] * 5),
    "topk": ({"select": "topk"}, None, [1.0] * 5),
    "weights": ({"group_weights": (0.5, 0.0, 2.0, 1.0, 3.0)}, None, [0.5, 0.0, 2.0, 1.0, 3.0]),
    "sampled": ({"sampled_prefixes": 6}, sampled_prefixes(D_SAE, 6, 10), None),
    "all": ({"sampled_prefixes": 3, "select": "topk", "level_aux": True}, sampled_prefixes(D_SAE, 3, 10), None),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_loss_and_gradients_are_those_of_the_dense_formula(name):
    options, ends, weights = OPTIONS[name]
    sae, x, normal = double(**options)
    ends = ends or sae.config.prefixes
    wanted = nested(sae, normal, ends, weights or [1.0] * len(ends))
    loss = sae.loss(Batch(x, x), info())
    assert loss.total.item() == pytest.approx(wanted.item(), rel=1e-12)
    for got, exact in zip(
        *(torch.autograd.grad(one, list(sae.parameters())) for one in (loss.total, wanted)), strict=True
    ):
        torch.testing.assert_close(got, exact, rtol=1e-9, atol=1e-13)


def test_a_weight_of_0_leaves_the_first_group_to_later_levels():
    """Its gradient then comes only from the levels behind it, and a group's never from a level before it."""
    sae, x, _ = double(group_weights=(0.0, 0.0, 0.0, 0.0, 1.0))
    only_last = torch.autograd.grad(sae.loss(Batch(x, x), info()).total, sae.W_dec)[0]
    other, x, _ = double(group_weights=(0.0, 0.0, 0.0, 5.0, 1.0))
    more = torch.autograd.grad(other.loss(Batch(x, x), info()).total, other.W_dec)[0]
    torch.testing.assert_close(more[20:] * 7 / 2, only_last[20:])
    assert not torch.allclose(more[:20] * 7 / 2, only_last[:20])


def test_e16_also_with_topk():
    one, other = build("matryoshka", group_fractions=(1.0,), select="topk"), build("topk")
    x = rows(32)
    first, second = (sae.loss(Batch(x, x), info()) for sae in (one, other))
    assert torch.equal(first.feature_acts.to_dense(), second.feature_acts.to_dense())
    normal = other.normalize(x)
    without = (normal - other.b_dec).square().sum() / (normal - normal.mean(0)).square().sum()
    torch.testing.assert_close(first.total, (without + second.total) / 2)
    assert torch.equal(one.encode(x).to_dense(), other.encode(x).to_dense())
    assert not one.calibrate(x) and set(one.encode(x).counts.tolist()) == {5}


def test_sampled_prefixes_follow_a_truncated_pareto_distribution():
    """By step alone; always with the whole dictionary; a length over l as often as the formula says."""
    assert sampled_prefixes(1000, 8, 3) == sampled_prefixes(1000, 8, 3) != sampled_prefixes(1000, 8, 4)
    assert sampled_prefixes(1, 4, 0) == [1]
    drawn = []
    for step in range(400):
        ends = sampled_prefixes(10_000, 10, step)
        assert ends == sorted(set(ends)) and ends[-1] == 10_000 and ends[0] >= 1
        drawn += ends[:-1]
    every = [sampled_prefixes(10_000, 1, step)[0] for step in range(3000)]
    for length in (4, 25, 400, 2500):
        expected = (length**-0.5 - 0.01) / 0.99
        assert sum(one >= length for one in every) / 3000 == pytest.approx(expected, abs=0.03)


def test_the_aux_loss_of_a_level_sees_what_its_prefix_leaves():
    dead = torch.zeros(D_SAE, dtype=torch.bool)
    dead[[1, 30, 33]] = True  # one in the first group, two in the last
    sae, x, normal = double(level_aux=True, k_aux=2)
    loss = sae.loss(Batch(x, x), info(dead))
    z, parts = dense(sae, normal), []
    for chosen, end in (([1], 2), ([30, 33], 40)):
        left = normal - sae.b_dec - z[:, :end] @ sae.W_dec[:end]
        u = ((normal - sae.b_dec) @ sae.W_enc[chosen].T + sae.b_enc[chosen]).relu()
        left = left.detach()
        parts.append((left - u @ sae.W_dec[chosen]).square().sum() / (left - left.mean(0)).square().sum())
    assert loss.terms["auxk"].item() == pytest.approx(torch.stack(parts).mean().item(), rel=1e-12)
    plain = build("matryoshka", k_aux=2).double().loss(Batch(x, x), info(dead))
    assert loss.terms["auxk"].item() != pytest.approx(plain.terms["auxk"].item(), rel=1e-3)
    assert "auxk" not in sae.loss(Batch(x, x), info()).terms


@pytest.mark.parametrize("options", [{"sampled_prefixes": 4, "level_aux": True}, {"select": "topk"}], ids=str)
def test_a_run_resumes_bit_for_bit_and_loads(options, tmp_path, monkeypatch):
    config = MatryoshkaConfig(48, 3, **options)
    train = saelab.TrainConfig(64 * 20, batch_size=64, warmup_steps=2, checkpoint_every=4)
    saelab.train(config, rows(500), train, tmp_path / "whole", progress=False)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_before(9, patch)
        saelab.train(config, rows(500), train, tmp_path / "cut", progress=False)
    saelab.train(config, rows(500), train, tmp_path / "cut", progress=False)
    whole, cut = ((tmp_path / name / "sae.safetensors").read_bytes() for name in ("whole", "cut"))
    assert whole == cut
    loaded = saelab.load_sae(tmp_path / "cut")
    assert loaded.config == config
    if config.select == "topk":
        assert (
            set(loaded.encode(rows(30)).counts.tolist()) <= {1, 2, 3}
            and "k largest u of the token" in loaded.selection_rule
        )


def test_trained_per_token_it_is_described_as_a_topk_sae():
    sae = build("matryoshka", select="topk")
    assert blueprint_of(sae).variant == "topk" and blueprint_of(sae).threshold is None
    plain = blueprint_of(build("matryoshka"))
    assert plain.variant == "matryoshka" and plain.threshold is not None and "select" not in plain.options


def test_defaults_are_not_recorded_and_bad_options_are_refused():
    assert not {"select", "group_weights", "sampled_prefixes", "level_aux"} & settings(MatryoshkaConfig(32, 2)).keys()
    bad: list[tuple[dict[str, Any], str]] = [
        ({"group_weights": (1.0, 2.0)}, r"group_weights=\(1.0, 2.0\).*each of the 5 groups"),
        ({"group_weights": (1.0, -1.0, 1.0, 1.0, 1.0)}, "finite number from 0 on"),
        ({"group_weights": (1.0, 1.0, 1.0, 1.0, 0.0)}, "more than 0 for the last"),
        ({"sampled_prefixes": 0}, "sampled_prefixes=0 must be at least 1"),
        ({"sampled_prefixes": 2, "group_weights": (1.0,) * 5}, "belong to fixed groups"),
        ({"select": "groupmax"}, "select='groupmax' must be one of 'batch_topk', 'topk'"),
    ]
    for options, match in bad:
        with pytest.raises(ValueError, match=match):
            MatryoshkaConfig(32, 2, **options)
