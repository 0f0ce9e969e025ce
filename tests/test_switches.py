"""The switches that released SAEs need, against dense formulas written out here: norms by token, pre-biases, scores, groups."""

import dataclasses
from typing import Any

import pytest
import torch
from tiny_saes import D_IN, D_SAE, build, config_of, info, rows
from torch import Tensor

from saelab.edits.feature_handle import FeatureHandle
from saelab.io import load_sae, save_sae
from saelab.kernels.encode_groupmax import encode_groupmax
from saelab.kernels.reference.encode_groupmax import encode_groupmax as groupmax_reference
from saelab.saes import VARIANTS, Batch, MatchingPursuitConfig, MatchingPursuitSAE, TopKConfig
from saelab.saes.config import settings
from saelab.saes.token_norm import TOKEN_NORMS
from saelab.training import TrainConfig, train

ONE_HOOK = [name for name in VARIANTS if name != "crosscoder"]
norms = pytest.mark.parametrize(
    "norm", [norm for norm in TOKEN_NORMS if norm != "whiten"]
)  # test_whitening.py has that


def uneven(n: int = 40) -> Tensor:
    """Tokens of sizes from 1e-3 to 1e3, with means."""
    return rows(n, 4) * torch.logspace(-3, 3, n)[:, None]


def normalized(norm: str, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised tokens, and what one unit and zero of them are in raw units."""
    if norm == "layer_norm":
        mean, size = x.mean(1, keepdim=True), x.std(1, keepdim=True)
        return (x - mean) / (size + 1e-5), size, mean
    size = x.norm(dim=1, keepdim=True) / D_IN**0.5
    return x / size, size, torch.zeros_like(size)


@norms
@pytest.mark.parametrize("name", ONE_HOOK)
def test_tokens_are_normalised_by_themselves(name, norm):
    sae, plain, x = build(name, norm), build(name, "none"), uneven()
    with torch.no_grad():
        for to, of in zip(sae.state_dict().values(), plain.state_dict().values(), strict=True):
            to.copy_(of)
    x_norm, size, mean = normalized(norm, x)
    torch.testing.assert_close(sae.encode(x).to_dense(), plain.encode(x_norm).to_dense(), rtol=1e-4, atol=1e-5)
    y = plain(x_norm).x_hat
    want = y if "d_out" in sae.extra_dims else y * size + mean
    torch.testing.assert_close(sae(x).x_hat, want, rtol=1e-3, atol=1e-4)
    alone = sae(x[7:8])
    assert torch.equal(alone.acts.to_dense(), sae.encode(x).to_dense()[7:8])


@norms
def test_a_token_of_zeros_is_decoded_to_its_mean(norm):
    x_hat = build("topk", norm)(torch.zeros(2, D_IN)).x_hat
    assert bool((x_hat == 0).all())


@norms
def test_what_reconstructs_by_token_needs_the_tokens(norm):
    sae, x = build("topk", norm), uneven()
    acts = sae.encode(x)
    assert torch.equal(sae.decode(acts, x), sae(x).x_hat)
    with pytest.raises(ValueError, match=rf"normalises every token by its own size \(normalize='{norm}'\): pass the"):
        sae.decode(acts)
    with pytest.raises(ValueError, match=f"normalize='{norm}' is not supported by crosscoders"):
        config_of("crosscoder", normalize=norm)


@norms
def test_an_edit_is_as_large_as_the_token(norm):
    """A token of a thousand times the size gets a thousand times the vector: a change in the SAE's units stays the same."""
    sae, x = build("topk", norm), rows(6, 2).double().float()
    edit = FeatureHandle(sae, 3, "h").add(2.0, "raw")
    at = torch.ones(1, 6, dtype=torch.int64)
    moved = edit.apply(x[None], at) - x[None]
    large = edit.apply(1000 * x[None], at) - 1000 * x[None]
    torch.testing.assert_close(large, 1000 * moved, rtol=1e-3, atol=1e-2)
    size = normalized(norm, x)[1]
    torch.testing.assert_close(moved[0], 2 * size * sae.W_dec[3].detach(), rtol=1e-4, atol=1e-5)


@norms
def test_training_and_saving(norm, tmp_path):
    config = TopKConfig(D_SAE, 5, normalize=norm)
    x = uneven(2000)
    sae: Any = train(config, x, TrainConfig(20_000, 200), out_dir=tmp_path / "sae", progress=False)
    x_norm = normalized(norm, x)[0]
    start = VARIANTS["topk"](config, D_IN)
    assert _error(sae, x_norm) < 0.5 * _error(start, x_norm)
    again = load_sae(save_sae(sae, tmp_path / "copy"))
    assert torch.equal(again(x[:9]).x_hat, sae(x[:9]).x_hat)


def _error(sae: Any, x: Tensor) -> float:
    return float((sae(x).x_hat - x).detach().square().mean())


def dense(sae: Any, x: Tensor, pre_bias: bool) -> Tensor:
    centered = sae.normalize(x) - (sae.b_dec if pre_bias else 0)
    return (centered @ sae.W_enc.T + sae.b_enc).detach()


def chosen(u: Tensor, score: Tensor, k: int) -> Tensor:
    mask = torch.zeros_like(u).scatter(1, score.topk(k, dim=1).indices, 1.0)
    return torch.where((mask > 0) & (score > 0), u, 0.0)


@pytest.mark.parametrize("pre_bias", [True, False])
@pytest.mark.parametrize("score", ["value", "decoder_norm"])
@pytest.mark.parametrize("select", ["topk", "groupmax"])
def test_topk_with_each_switch(select, score, pre_bias):
    sae, x = build("topk", select=select, score=score, pre_bias=pre_bias), rows(30)
    with torch.no_grad():
        sae.W_dec.mul_(torch.linspace(0.2, 5, D_SAE)[:, None])
    u = dense(sae, x, pre_bias)
    ranked = u * sae.W_dec.detach().norm(dim=1) if score == "decoder_norm" else u
    if select == "topk":
        want = chosen(u, ranked, 5)
    else:
        parts = zip(u.split(D_SAE // 5, 1), ranked.split(D_SAE // 5, 1), strict=True)
        want = torch.cat([chosen(part, rank, 1) for part, rank in parts], dim=1)
    torch.testing.assert_close(sae.encode(x).to_dense(), want, rtol=1e-4, atol=1e-5)
    assert ("|d|" in sae.selection_rule) == (score == "decoder_norm")
    assert ("groups" in sae.selection_rule) == (select == "groupmax")


@pytest.mark.parametrize("pre_bias", [True, False])
@pytest.mark.parametrize("name", ["relu", "gated"])
def test_pre_bias(name, pre_bias):
    sae, x = build(name, pre_bias=pre_bias), rows(30)
    u = dense(sae, x, pre_bias)
    if name == "gated":
        with torch.no_grad():
            sae.r_mag.add_(torch.linspace(-1, 1, D_SAE))
        magnitude = sae.r_mag.detach().exp() * (u - sae.b_enc.detach()) + sae.b_mag.detach()
        want = torch.where(u > 0, magnitude.relu(), 0.0)
    else:
        want = u.relu()
    torch.testing.assert_close(sae.encode(x).to_dense(), want, rtol=1e-4, atol=1e-5)


def test_a_transcoder_of_groups_keeps_its_choice_when_its_norms_are_folded():
    sae, x = build("transcoder", select="groupmax"), rows(30)
    with torch.no_grad():
        sae.W_dec.mul_(torch.linspace(0.2, 5, D_SAE)[:, None])
        before, y_hat = sae.encode(x), sae(x).x_hat
        sae.fold_decoder_norms()
    after = sae.encode(x)
    assert torch.equal(after.features, before.features) and after.counts.tolist() == before.counts.tolist()
    torch.testing.assert_close(sae(x).x_hat, y_hat, rtol=1e-4, atol=1e-4)


def test_switches_at_their_defaults_leave_the_identity_of_a_run():
    for name in ("topk", "relu", "gated", "transcoder", "matching_pursuit"):
        later = {"select", "score", "pre_bias", "stop_on_duplicate"}
        assert not later & set(settings(config_of(name))), name
    assert settings(config_of("topk", score="decoder_norm"))["score"] == "decoder_norm"
    with pytest.raises(ValueError, match="d_sae=40 is not a multiple of k=7"):
        TopKConfig(40, 7, select="groupmax")
    for name in ("relu_transcoder", "jumprelu_transcoder"):
        with pytest.raises(ValueError, match="a transcoder has no pre-bias"):
            config_of(name, pre_bias=True)


@pytest.mark.parametrize("k", [1, 4, 12])
@pytest.mark.parametrize("with_norms", [False, True])
def test_groupmax_matches_its_reference(k, with_norms):
    generator = torch.Generator().manual_seed(k)
    x, W, b = (torch.randn(*shape, generator=generator) for shape in ((9, 5), (24, 5), (24,)))
    norms = torch.rand(24, generator=generator) + 0.1 if with_norms else None
    center = torch.randn(5, generator=generator)
    acts = encode_groupmax(x, W, b, k, norms, center)
    want = groupmax_reference(x, W, b, k, norms, center)
    torch.testing.assert_close(acts.to_dense(), want, rtol=1e-5, atol=1e-6)
    assert int(acts.counts.max()) <= k
    one, other = acts.split_features([24 // k] * k)[0], encode_groupmax(x, W[: 24 // k], b[: 24 // k], 1, None, center)
    assert with_norms or torch.equal(one.to_dense(), other.to_dense())


def test_pursuit_stops_at_a_feature_that_it_chose_before():
    """Against a loop over one token after another, as SAELens writes the rule: the repeated choice still counts."""
    torch.manual_seed(0)
    sae = MatchingPursuitSAE(MatchingPursuitConfig(D_SAE, 12, stop_on_duplicate=True, normalize="none"), D_IN, seed=1)
    with torch.no_grad():
        sae.W_dec.mul_(1.3)  # a row of another norm leaves something of itself
    x, want = rows(30), torch.zeros(30, D_SAE)
    for i, r in enumerate((x - sae.b_dec).detach()):
        for _ in range(12):
            u = sae.W_dec.detach() @ r
            j = int(u.argmax())
            again = bool(want[i, j])
            want[i, j] += u[j].clamp_min(0)
            r = r - u[j].clamp_min(0) * sae.W_dec[j].detach()
            if again or u[j] <= 0:
                break
    acts = sae.encode(x)
    torch.testing.assert_close(acts.to_dense(), want, rtol=1e-4, atol=1e-4)
    more = dataclasses.replace(sae.config, stop_on_duplicate=False)
    sae.config = more
    assert not torch.allclose(sae.encode(x).to_dense(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["relu_transcoder", "jumprelu_transcoder"])
def test_transcoders_with_a_skip_of_each_kind(name):
    generator = torch.Generator().manual_seed(0)
    variant: Any = VARIANTS[name]
    sae = variant(config_of(name, skip=True, normalize="scale"), D_IN, d_out=7)
    x, y = rows(50), torch.randn(50, 7, generator=generator)
    sae.set_normalization(x.mean(0), x.square().sum(1).mean(), y.mean(0), y.square().sum(1).mean())
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    u = dense(sae, x, False)
    z = u.relu() if name == "relu_transcoder" else torch.where(u > sae.threshold.detach(), u, 0.0)
    torch.testing.assert_close(sae.encode(x).to_dense(), z, rtol=1e-4, atol=1e-5)
    inside = z @ sae.W_dec + sae.b_dec + sae.normalize(x) @ sae.W_skip.T
    torch.testing.assert_close(sae(x).x_hat, inside / sae.scale_out, rtol=1e-4, atol=1e-5)
    target = sae.sparse_target(sae.normalize(x), sae.normalize_target(y))
    loss = sae.loss(Batch(x, y), info())
    error = (z @ sae.W_dec + sae.b_dec - target).square().sum() / 50
    torch.testing.assert_close(loss.terms["sse"], error, rtol=1e-4, atol=1e-5)
