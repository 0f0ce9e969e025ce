"""Whitening by control data: what it does to control and other rows, reconstructions and features in raw units, training."""

from typing import Any

import pytest
import torch
from tiny_runs import make_run
from tiny_saes import D_IN, D_SAE, build, config_of, rows

from saelab import TrainConfig, load_sae, train
from saelab.activation_cache.reader import ActivationCache
from saelab.cli.main import main
from saelab.edits.feature_handle import FeatureHandle
from saelab.errors import TrainingError
from saelab.saes.step import RULES
from saelab.saes.whitening import FLOOR, Whitening
from saelab.training.kept_out import n_kept_out

MIX = torch.randn(D_IN, D_IN, generator=torch.Generator().manual_seed(7)) + torch.eye(D_IN)
STEPS = TrainConfig(n_tokens=20 * 64, batch_size=64, checkpoint_every=8)


def control(n=3000, seed=3):
    """Rows with correlations, far from 0."""
    return rows(n, seed) @ MIX + 5


def whitened(name, **changes) -> Any:
    sae, x = build(name, "whiten", **changes).double(), control().double()
    sae.whitening.fit(x.mean(0), torch.cov(x.T, correction=0))
    return sae


def test_control_data_become_white():
    """Test 1 of section 17: mean 0 and covariance I; then every token has norm sqrt(d_in)."""
    whitening, x = Whitening(D_IN).double(), control().double()
    whitening.fit(x.mean(0), torch.cov(x.T, correction=0))
    y = (x - whitening.mean) @ whitening.whiten
    torch.testing.assert_close(y.mean(0), torch.zeros(D_IN).double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(y.T @ y / len(y), torch.eye(D_IN).double(), rtol=0, atol=1e-6)
    normal = whitening.normalize(x)
    torch.testing.assert_close(normal, y / y.norm(dim=1, keepdim=True) * D_IN**0.5)
    torch.testing.assert_close(whitening.restore(normal, x), x)
    assert not whitening.normalize(whitening.mean[None]).any()  # nor NaN


def test_directions_in_which_control_data_do_not_vary_are_capped():
    whitening = Whitening(3).double()
    whitening.fit(torch.zeros(3), torch.diag(torch.tensor([3.0, 0.0, 3.0])))
    torch.testing.assert_close(
        whitening.whiten.diag(), torch.tensor([3.0, 2 * FLOOR, 3.0]).double().rsqrt(), rtol=1e-6, atol=0
    )
    with pytest.raises(ValueError, match="control data do not vary"):
        whitening.fit(torch.zeros(3), torch.zeros(3, 3))


@pytest.mark.parametrize("name", ["icfl", "topk", "batch_topk", "gated"])
def test_features_write_in_raw_units(name):
    """x_hat is mean + (W_dec z + b_dec) |y| / sqrt(d) C^(1/2); one more of a feature adds its raw row times the token's size."""
    sae, x = whitened(name), control(20, 4).double()
    y = (x - sae.whitening.mean) @ sae.whitening.whiten
    size = y.norm(dim=1, keepdim=True) / D_IN**0.5
    found = sae.encode(x)
    z = found.to_dense()
    expected = sae.whitening.mean + ((z @ sae.W_dec + sae.b_dec) * size) @ torch.linalg.inv(sae.whitening.whiten)
    torch.testing.assert_close(sae(x).x_hat, expected)
    torch.testing.assert_close(sae.token_sizes(x), size)
    z[:, 3] += 1
    more = sae.decode(found.from_dense(z), x) - sae.decode(found, x)
    decoder, scale = sae.decoder()
    torch.testing.assert_close(more, size * decoder[3] / scale)
    edit, at = FeatureHandle(sae, 3, "h").add(2.0, "raw"), torch.ones(1, 20, dtype=torch.int64)
    torch.testing.assert_close((edit.apply(x[None], at) - x[None])[0], 2 * size * decoder[3].detach() / scale)
    with pytest.raises(ValueError, match="pass the activations too"):
        sae.decode(found)
    assert torch.equal(sae.float().encode(x[3:4].float()).to_dense(), sae.encode(x.float()).to_dense()[3:4])


def test_training_whitens_by_control_data_and_resumes(tmp_path):
    x, other = control(), rows(2000, 9) * torch.linspace(0.1, 4, D_IN)
    config = config_of("icfl", normalize="whiten")
    sae = train(config, x, STEPS, tmp_path / "sae", progress=False)
    kept_in = (x - sae.whitening.mean) @ sae.whitening.whiten
    torch.testing.assert_close(kept_in.T @ kept_in / len(x), torch.eye(D_IN), rtol=0, atol=1e-3)
    back = load_sae(tmp_path / "sae")
    assert back.hash == sae.hash and torch.equal(back(x).x_hat, sae(x).x_hat)
    for file in ("sae.json", "sae.safetensors", "golden.safetensors"):
        (tmp_path / "sae" / file).unlink()
    assert train(config, x, STEPS, tmp_path / "sae", progress=False).hash == sae.hash
    by_other = train(config, x, STEPS, tmp_path / "other", control=other, progress=False)
    torch.testing.assert_close(by_other.whitening.mean, other.mean(0))
    with pytest.raises(TrainingError, match="holds .*different arguments"):
        train(config, x, STEPS, tmp_path / "sae", control=other, progress=False)


def test_control_data_that_do_not_serve_are_refused():
    config, x = config_of("icfl", normalize="whiten"), control()
    with pytest.raises(ValueError, match="control is what normalize='whiten' whitens by"):
        train(config_of("topk", D_SAE), x, STEPS, control=x, progress=False)
    with pytest.raises(ValueError, match=r"Control rows must be \(n, 12\), at least 2 of them; got \(3000, 11\)"):
        train(config, x, STEPS, control=x[:, 1:], progress=False)
    with pytest.raises(ValueError, match="normalize='whiten'"):
        config_of("crosscoder", normalize="whiten")


def test_the_command_whitens_by_the_cache_of_another_run(tmp_path, tiny_lm, capsys):
    run = make_run(tmp_path / "run", tiny_lm)
    cache = ActivationCache(run / "cache")
    kept = cache.n_rows - n_kept_out(cache.n_rows, RULES)
    x = next(cache.batches(kept, leave_out=cache.n_rows - kept))
    words = ["train", f"{run}", "--variant", "topk", "--normalize", "whiten", "--d-sae", "64", "--k", "4"]
    words += ["--n-tokens", "200", "--batch-size", "100"]
    assert main([*words, "--name", "itself"]) == 0 and main([*words, "--name", "other", "--control", f"{run}"]) == 0
    itself, other = load_sae(run / "sae-itself"), load_sae(run / "sae-other")
    assert itself.hash == other.hash
    assert itself.whitening is not None
    torch.testing.assert_close(itself.whitening.mean, x.mean(0), rtol=1e-4, atol=1e-5)
    assert main([*words, "--name", "other"]) == 2 and "different arguments" in capsys.readouterr().err
