"""Baselines of `saelab bench family`: each against its formula, and as rows beside trained SAEs."""

import pytest
import torch
from test_activation_cache import make_cache
from tiny_runs import make_run

from saelab.activation_cache.reader import ActivationCache
from saelab.benchmarks.baselines import BASELINES, baseline, levels
from saelab.benchmarks.family import FamilyConfig, run_family
from saelab.io import load_sae

D_IN = 8


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> ActivationCache:
    return make_cache(tmp_path_factory.mktemp("baselines") / "cache", n_sequences=80)


def test_each_is_its_formula(cache):
    x, mean = next(cache.batches(cache.n_rows)).double(), cache.stats("h")["mean"].double()
    rows = torch.linalg.svd(x - mean, full_matrices=False).Vh
    turned = (x - mean) @ rows.T
    for k in (1, 2):
        found = baseline("pca", cache, "h", k, 99).double()(x)
        torch.testing.assert_close(found.x_hat, mean + turned[:, :k] @ rows[:k], rtol=1e-3, atol=1e-3)
        kept = turned * (turned.abs() >= turned.abs().topk(k, dim=1).values[:, -1:])
        found = baseline("pca_topk", cache, "h", k, 99).double()(x)
        torch.testing.assert_close(found.x_hat, mean + kept @ rows, rtol=1e-3, atol=1e-3)
        assert 0 < found.acts.nnz <= k * len(x)
    torch.testing.assert_close(baseline("identity", cache, "h", x.shape[1], 99).double()(x).x_hat, x)
    random = baseline("random", cache, "h", 2, 99, seed=4)
    assert torch.equal(random.W_enc, random.W_dec) and random.W_dec.shape == (99, x.shape[1])
    torch.testing.assert_close(random.W_dec.norm(dim=1), torch.ones(99))
    assert not torch.equal(random.W_dec, baseline("random", cache, "h", 2, 99, seed=5).W_dec)


def test_levels_are_those_that_there_are_dimensions_for():
    assert levels("pca", [32, 4, 8], D_IN) == [4, 8] and levels("identity", [4], D_IN) == [D_IN]


@pytest.mark.usefixtures("models_load_in_fp32")
def test_rows_beside_trained_saes(tmp_path, tiny_lm):
    run = make_run(tmp_path / "run", tiny_lm)
    config = FamilyConfig(d_sae=48, steps=5, batch_size=200, eval_tokens=400)
    rows = run_family(run, config, variants=("topk", *BASELINES), l0=(4,), lm=tiny_lm, progress=False)
    by_name = {row["variant"]: row for row in rows}
    assert list(by_name) == ["topk", *BASELINES] and {by_name[name]["table"] for name in BASELINES} == {"baseline"}
    assert by_name["identity"]["fvu"] < 1e-6 and by_name["identity"]["l0"] == pytest.approx(32, rel=0.01)
    assert by_name["pca_topk"]["fvu"] < by_name["pca"]["fvu"] < 1
    assert load_sae(run / "family" / by_name["pca"]["folder"]).provenance.trained["baseline"] == "pca"
    again = run_family(run, config, variants=BASELINES, l0=(4,), lm=tiny_lm, progress=False)
    assert again == rows


@pytest.mark.usefixtures("models_load_in_fp32")
def test_baselines_have_a_bar_and_the_loss_can_be_left_out(tmp_path, tiny_lm, capsys):
    run = make_run(tmp_path / "run", tiny_lm)
    config = FamilyConfig(d_sae=48, eval_tokens=400, eval_tokens_ce=0)
    (row,) = run_family(run, config, variants=("pca",), l0=(4,), lm=tiny_lm)
    assert row["ce_loss_recovered"] is None and "Measuring baselines" in capsys.readouterr().err
    with pytest.raises(ValueError, match="eval_tokens_ce=-1"):
        FamilyConfig(eval_tokens_ce=-1)
