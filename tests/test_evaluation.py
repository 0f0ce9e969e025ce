"""Evaluation on a real (tiny) transformer: exact values for SAEs whose numbers are known, and the refusals."""

import dataclasses
import json
import math
from dataclasses import replace

import pytest
import torch

import saelab
from saelab.evaluation.heldout import open_score_stream
from saelab.evaluation.reconstruction import Reconstruction, VarianceSums
from saelab.saes import (
    CrosscoderConfig,
    CrosscoderSAE,
    ReLUConfig,
    ReLUSAE,
    SAEOutput,
    SkipTranscoderConfig,
    SkipTranscoderSAE,
    TopKConfig,
    TranscoderConfig,
    TranscoderSAE,
)
from saelab.tokens import document_id
from saelab.tokens.mask import token_mask

HOOK = "blocks.1.hook_resid_post"
KEYS = {
    "fvu", "fvu_unmasked", "fvu_special", "explained_variance", "l0", "dead_fraction", "dense_fraction", "cosine",
    "relative_reconstruction_bias", "ce_loss", "ce_loss_sae", "ce_loss_recovered", "ce_loss_recovered_mean", "kl",
    "n_tokens", "n_masked", "mask", "split", "hook_name", "sae_hash", "model_hash",
}  # fmt: skip
TEXTS = [
    f"Document {i} says that {word} comes before the end of part {i * 7 % 13}."
    for i, word in enumerate("abcdefghijklmnop")
]


def rebuilder(d_in: int, gain: float = 1.0) -> ReLUSAE:
    """`x_hat = gain * x`: one feature for each direction and sign."""
    sae = ReLUSAE(ReLUConfig(2 * d_in, normalize="none"), d_in)
    eye = torch.eye(d_in)
    with torch.no_grad():
        sae.W_enc.copy_(torch.cat([eye, -eye]))
        sae.W_dec.copy_(gain * torch.cat([eye, -eye]))
    return sae


def measure(sae, lm, **options):
    return saelab.evaluate(sae, lm, TEXTS, hook_name=HOOK, ctx_len=32, batch_size=3, progress=False, **options)


def test_a_perfect_sae(tiny_lm):
    report = measure(rebuilder(32), tiny_lm)
    assert report.fvu == pytest.approx(0, abs=1e-10) and report.explained_variance == pytest.approx(1)
    assert report.cosine == pytest.approx(1, abs=1e-6)
    assert report.relative_reconstruction_bias == pytest.approx(1, abs=1e-6)
    assert report.ce_loss_recovered == pytest.approx(1, abs=1e-4)
    assert report.ce_loss_recovered_mean == pytest.approx(1, abs=1e-4)
    assert report.kl == pytest.approx(0, abs=1e-6)
    assert report.l0 == 32 and report.dead_fraction == 0


def test_a_zero_sae_recovers_nothing_of_zero_ablation(tiny_lm):
    report = measure(rebuilder(32, 0.0), tiny_lm)
    assert report.ce_loss_recovered == pytest.approx(0, abs=1e-6)
    assert report.ce_loss_recovered_mean is not None and report.kl is not None and report.kl > 0
    assert report.relative_reconstruction_bias is None


def test_a_constant_mean_sae_explains_nothing(tiny_lm):
    sae = rebuilder(32, 0.0)
    stream = open_score_stream(sae, tiny_lm, TEXTS, hook_name=HOOK, ctx_len=32)
    kept = torch.cat([acts[keep] for _, acts, keep in stream])
    with torch.no_grad():
        sae.b_dec.copy_(kept.mean(0))
    report = measure(sae, tiny_lm)
    assert report.fvu == pytest.approx(1, abs=1e-5)
    assert report.ce_loss_recovered_mean == pytest.approx(0, abs=1e-4)


def test_shrinkage_is_seen(tiny_lm):
    report = measure(rebuilder(32, 0.8), tiny_lm)
    assert report.relative_reconstruction_bias == pytest.approx(0.8, abs=1e-5)
    assert report.cosine == pytest.approx(1, abs=1e-6)


def test_numbers_equal_a_plain_computation(tiny_lm):
    torch.manual_seed(0)
    sae = ReLUSAE(ReLUConfig(50, normalize="none"), 32, seed=4)
    report = measure(sae, tiny_lm)
    stream = open_score_stream(sae, tiny_lm, TEXTS, hook_name=HOOK, ctx_len=32)
    batches = list(stream)
    x = torch.cat([acts[keep] for _, acts, keep in batches]).double()
    every = torch.cat([acts[tokens.doc >= 0] for tokens, acts, _ in batches]).double()
    codes = sae.encode(x).to_dense()
    error = x - sae(x).x_hat.double()
    fvu = error.square().sum() / (x - x.mean(0)).square().sum()
    unmasked = (every - sae(every).x_hat.double()).square().sum() / (every - every.mean(0)).square().sum()
    assert report.fvu == pytest.approx(fvu.item(), rel=1e-6)
    assert report.fvu_unmasked == pytest.approx(unmasked.item(), rel=1e-6) and report.fvu_unmasked != report.fvu
    masks = [token_mask(tokens.ids, tokens.doc, stream.mask.special_ids)["special"] for tokens, _, _ in batches]
    special = torch.cat([acts[mask] for mask, (_, acts, _) in zip(masks, batches, strict=True)]).double()
    error = special - sae(special).x_hat.double()
    fvu = error.square().sum() / (special - special.mean(0)).square().sum()
    assert report.fvu_special == pytest.approx(fvu.item(), rel=1e-6) and len(special) == report.n_masked["special"] > 3
    assert report.l0 == pytest.approx((codes != 0).sum(1).double().mean().item())
    density = (codes != 0).double().mean(0)
    assert report.dead_fraction == pytest.approx((density == 0).double().mean().item())
    assert report.dense_fraction == pytest.approx((density > 0.1).double().mean().item())
    assert report.n_tokens == len(x)
    real = sum(int((tokens.doc >= 0).sum()) for tokens, _, _ in batches)
    assert report.n_tokens + sum(report.n_masked.values()) == real
    assert report.n_masked["position"] == sum(len(tokens.ids) for tokens, _, _ in batches)
    assert report.n_masked["special"] == len(TEXTS) - 1 or report.n_masked["special"] > 0


def test_cross_entropy_is_the_models_own(tiny_lm):
    report = measure(rebuilder(32), tiny_lm)
    stream = open_score_stream(rebuilder(32), tiny_lm, TEXTS, hook_name=HOOK, ctx_len=32)
    total = count = 0
    for tokens, _, keep in stream:
        logits = tiny_lm.logits(tokens.ids)
        for row in range(len(tokens.ids)):
            for position in range(31):
                if keep[row, position] and tokens.doc[row, position + 1] >= 0:
                    total -= logits[row, position].log_softmax(-1)[tokens.ids[row, position + 1]].item()
                    count += 1
    assert report.n_tokens_ce == count and report.ce_loss == pytest.approx(total / count, rel=1e-5)


def test_the_budget_of_the_loss_is_kept(tiny_lm):
    few = measure(rebuilder(32), tiny_lm, n_tokens_ce=20)
    assert 20 <= few.n_tokens_ce < measure(rebuilder(32), tiny_lm).n_tokens_ce
    none = measure(rebuilder(32), tiny_lm, n_tokens_ce=0)
    assert none.ce_loss is None and json.loads(none.to_json())["kl"] is None


def test_the_bar_of_the_loss_ends_at_its_total(tiny_lm, capsys):
    options = {"hook_name": HOOK, "ctx_len": 32, "batch_size": 3, "n_tokens_ce": 20}
    assert saelab.evaluate(rebuilder(32), tiny_lm, TEXTS, **options).n_tokens_ce > 20
    assert "| 20/20 " in capsys.readouterr().err.rsplit("\r", 1)[-1]


def test_report_has_every_key_and_shows_itself(tiny_lm, tmp_path):
    report = measure(rebuilder(32), tiny_lm)
    assert set(json.loads(report.to_json())) >= KEYS
    assert json.loads(report.save(tmp_path / "report.json").read_text()) == json.loads(report.to_json())
    assert "ce_loss_recovered" in str(report) and "<table>" in report._repr_html_()
    nasty = dataclasses.replace(report, texts="<script>alert(1)</script>")
    assert "<script>" not in nasty._repr_html_()


def test_a_saved_report_answers_the_same_request_only(tiny_lm, tmp_path, monkeypatch):
    path, sae = tmp_path / "report.json", rebuilder(32, 0.5)
    first = measure(sae, tiny_lm, path=path)
    assert json.loads(path.read_text()) == json.loads(first.to_json())
    with monkeypatch.context() as patch:
        patch.setattr("saelab.evaluation.report._measure", lambda *_: pytest.fail("measured again"))
        assert measure(sae, tiny_lm, path=path) == first
    assert measure(sae, tiny_lm, path=path, n_tokens_ce=20).n_tokens_ce < first.n_tokens_ce
    assert measure(rebuilder(32), tiny_lm, path=path).fvu == pytest.approx(0, abs=1e-10)
    options = {"hook_name": HOOK, "ctx_len": 32, "batch_size": 3, "progress": False, "path": path}
    assert saelab.evaluate(rebuilder(32), tiny_lm, TEXTS[:5], **options).n_tokens < first.n_tokens
    path.write_text("{")
    assert measure(sae, tiny_lm, path=path) == first


def test_a_training_document_is_refused_by_count(tiny_lm):
    sae = rebuilder(32)
    sae.provenance = replace(
        sae.provenance, train_documents=torch.tensor([document_id(TEXTS[2]), document_id(TEXTS[5]), 7])
    )
    with pytest.raises(ValueError, match=rf"2 of {len(TEXTS)} documents .*allow_train"):
        measure(sae, tiny_lm)
    assert measure(sae, tiny_lm, allow_train=True).n_tokens > 0


def test_the_way_from_harvest_to_report(tiny_lm, tmp_path):
    """The SAE names its own source: no texts given, the held-out tenth is scored; the training part is refused."""
    path = tmp_path / "texts.jsonl"
    path.write_text(
        "\n".join(json.dumps({"text": f"{i} sheep and {i * i} goats in the field {i}"}) for i in range(300))
    )
    texts = saelab.load_texts(str(path))
    cache = saelab.harvest(tiny_lm, texts, [HOOK], 3000, tmp_path / "cache", ctx_len=32, progress=False)
    config = saelab.TrainConfig(n_tokens=20_000, batch_size=200, warmup_steps=5)
    sae = saelab.train(TopKConfig(64, 8), cache, config, tmp_path / "sae", progress=False)
    report = saelab.evaluate(saelab.load_sae(tmp_path / "sae"), tiny_lm, progress=False)
    assert report.split == "held_out" and report.fvu is not None and report.fvu < 0.9
    assert report.mask["max_norm"] == cache.manifest["max_norm"][HOOK]
    assert report.sae_hash == sae.hash and report.model_hash == tiny_lm.hash
    with pytest.raises(ValueError, match="used to train this SAE"):
        saelab.evaluate(sae, tiny_lm, texts, split="train", progress=False)
    other = saelab.evaluate(sae, tiny_lm, TEXTS, progress=False)
    assert other.split == "all"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"hook_name": "blocks.9.hook_resid_post"}, "blocks.9.hook_resid_post"),
        ({"hook_name": None}, "hook_name"),
        ({"texts": None, "hook_name": HOOK}, "give texts"),
        ({"texts": ["x"], "hook_name": HOOK}, "(?i)no token"),
        ({"texts": TEXTS, "hook_name": HOOK, "split": "test"}, "test"),
    ],
    ids=["unknown hook", "no hook", "no texts", "one token", "unknown split"],
)
def test_what_cannot_be_scored(tiny_lm, options, says):
    with pytest.raises(ValueError, match=says):
        saelab.evaluate(rebuilder(32), tiny_lm, progress=False, **{"texts": TEXTS, **options})


def test_a_width_error_names_both(tiny_lm):
    with pytest.raises(ValueError, match=r"width 32.*d_in=16"):
        measure(rebuilder(16), tiny_lm)


def test_sums_do_not_depend_on_batches():
    x, x_hat = torch.randn(100, 5) + 3, torch.randn(100, 5)
    whole, parts = VarianceSums(), VarianceSums()
    whole.add(x, x_hat)
    for rows in torch.arange(100).split(7):
        parts.add(x[rows], x_hat[rows])
    assert whole.fvu == pytest.approx(parts.fvu)
    assert VarianceSums().fvu is None


def test_constant_rows_have_no_fvu():
    sums = VarianceSums()
    sums.add(torch.ones(9, 2), torch.ones(9, 2))
    assert sums.fvu is None


def test_density_counts_signed_codes():
    sae = rebuilder(1)
    measures = Reconstruction(sae)
    x = torch.tensor([[-2.0], [3.0], [-1.0]])
    with torch.no_grad():
        output = sae(x)
    measures.add(x, SAEOutput(output.x_hat, output.acts.with_values(-output.acts.values)))
    assert measures.results()["dead_fraction"] == 0 and measures.results()["l0"] == 1
    assert not math.isnan(measures.results()["cosine"] or 0)


@pytest.mark.parametrize("arguments", [{"n_tokens": 0}, {"n_tokens": -7}, {"n_tokens_ce": -7}])
def test_budgets_are_whole_numbers_from_one_up(tiny_lm, arguments):
    with pytest.raises(ValueError, match="n_tokens(_ce)?=.* must be"):
        measure(rebuilder(32), tiny_lm, **arguments)


# --- SAEs of several sites

OTHER = "blocks.0.hook_resid_post"


def crosscoder(gain=1.0):
    """Rebuilds both sources, times `gain`: one feature for each direction, sign and source."""
    sae = CrosscoderSAE(CrosscoderConfig(128, 1, sparsity="l1", normalize="none"), 32, n_sources=2)
    signed = torch.cat([torch.eye(32), -torch.eye(32)])
    with torch.no_grad():
        for W, size in ((sae.W_enc, 1.0), (sae.W_dec, gain)):
            W.zero_()
            W[0, :64], W[1, 64:] = size * signed, size * signed
    return sae


def scored(sae, lm, hooks):
    """Kept rows of what the SAE reads and rebuilds."""
    stream = open_score_stream(sae, lm, TEXTS, hook_name=hooks, ctx_len=32, batch_size=3)
    pairs = [(batch.x[keep], batch.y[keep]) for _, batch, keep in stream.pairs()]
    return tuple(torch.cat(parts).double() for parts in zip(*pairs, strict=True))


def measure_at(sae, lm, hooks, **options):
    return saelab.evaluate(sae, lm, TEXTS, hook_name=hooks, ctx_len=32, batch_size=3, progress=False, **options)


def test_a_perfect_crosscoder_recovers_all_at_each_hook(tiny_lm):
    report = measure_at(crosscoder(), tiny_lm, [OTHER, HOOK])
    assert report.fvu == pytest.approx(0, abs=1e-10) and report.l0 == 64
    assert report.ce_loss_recovered == pytest.approx(1, abs=1e-4) and report.kl == pytest.approx(0, abs=1e-6)
    assert report.ce_loss == pytest.approx(measure(rebuilder(32), tiny_lm).ce_loss, rel=1e-6)
    assert report.hook_name == f"{OTHER}, {HOOK}" and set(report.mask["max_norm"]) == {OTHER, HOOK}


def test_a_crosscoders_losses_are_means_over_its_hooks(tiny_lm):
    both = measure_at(crosscoder(0.8), tiny_lm, [OTHER, HOOK])
    each = [measure_at(rebuilder(32, 0.8), tiny_lm, hook) for hook in (OTHER, HOOK)]
    assert each[0].ce_loss_sae != each[1].ce_loss_sae
    assert both.ce_loss_sae == pytest.approx(sum(one.ce_loss_sae or 0 for one in each) / 2, rel=1e-5)
    assert both.kl == pytest.approx(sum(one.kl or 0 for one in each) / 2, rel=1e-4)
    assert both.n_tokens_ce == each[0].n_tokens_ce


def test_a_crosscoders_fvu_pools_its_sources(tiny_lm):
    sae = CrosscoderSAE(CrosscoderConfig(50, 1, sparsity="l1", normalize="none"), 32, seed=4, n_sources=2)
    report = measure_at(sae, tiny_lm, [OTHER, HOOK])
    x, _ = scored(sae, tiny_lm, [OTHER, HOOK])
    assert x.shape[1:] == (2, 32)
    error = x - sae(x.float()).x_hat.double()
    fvu = error.square().sum() / (x - x.mean(0)).square().sum()
    assert report.fvu == pytest.approx(fvu.item(), rel=1e-6)
    swapped = measure_at(sae, tiny_lm, [HOOK, OTHER])
    assert swapped.fvu != report.fvu


def least_squares_transcoder(lm, hook_in, hook_out):
    """All skip: the affine map that fits the scored rows best, as a skip transcoder whose codes are silent."""
    config = SkipTranscoderConfig(4, 1, normalize="none", hook_name_out=hook_out)
    sae = SkipTranscoderSAE(config, lm.d_in(hook_in), d_out=lm.d_in(hook_out))
    x, y = scored(sae, lm, hook_in)
    solved = torch.linalg.lstsq(torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1), y).solution.float()
    with torch.no_grad():
        sae.b_enc.fill_(-1e4)
        sae.W_skip.copy_(solved[:-1].T)
        sae.b_dec.copy_(solved[-1])
    residual = y - sae(x.float()).x_hat.double()
    return sae, (residual.square().sum() / (y - y.mean(0)).square().sum()).item()


def test_a_transcoder_is_scored_against_what_it_predicts(tiny_lm):
    hook_in, hook_out = "blocks.1.hook_resid_mid", "blocks.1.hook_mlp_out"
    sae, fvu = least_squares_transcoder(tiny_lm, hook_in, hook_out)
    report = measure_at(sae, tiny_lm, hook_in)
    assert report.fvu == pytest.approx(fvu, rel=1e-4) and 0.01 < fvu < 0.99 and report.l0 == 0
    assert report.hook_name == f"{hook_in} -> {hook_out}"
    assert measure_at(sae, tiny_lm, [hook_in, hook_out]).fvu == report.fvu


def test_a_transcoder_replaces_the_rows_it_predicts(tiny_lm):
    hook_in, hook_out = "blocks.1.hook_resid_mid", "blocks.1.hook_mlp_out"
    sae, _ = least_squares_transcoder(tiny_lm, hook_in, hook_out)
    report = measure_at(sae, tiny_lm, hook_in)
    total, count = 0.0, 0
    stream = open_score_stream(sae, tiny_lm, TEXTS, hook_name=hook_in, ctx_len=32, batch_size=3)
    for tokens, batch, keep in stream.pairs():
        replaced = batch.y.clone()
        replaced[keep] = sae(batch.x[keep]).x_hat
        logits = tiny_lm.run_with_edit(tokens.ids, Put(hook_out, replaced))
        for row, position in keep[:, :-1].nonzero().tolist():
            if tokens.doc[row, position + 1] >= 0:
                total -= logits[row, position].log_softmax(-1)[tokens.ids[row, position + 1]].item()
                count += 1
    assert report.n_tokens_ce == count and report.ce_loss_sae == pytest.approx(total / count, rel=1e-5)
    assert report.ce_loss_sae != pytest.approx(report.ce_loss, rel=1e-4)


class Put:
    def __init__(self, hook_name, x):
        self.hook_name, self.x = hook_name, x

    def apply(self, x, positions):
        return self.x


def test_sites_that_do_not_fit_are_named(tiny_lm):
    with pytest.raises(ValueError, match=r"reads 2 sources; hook_name names 1"):
        measure_at(crosscoder(), tiny_lm, HOOK)
    sae = TranscoderSAE(TranscoderConfig(4, 1, hook_name_out="blocks.1.hook_mlp_out"), 32, d_out=7)
    with pytest.raises(ValueError, match=r"hook_mlp_out of .* has width 32, but the SAE writes d_out=7"):
        measure_at(sae, tiny_lm, HOOK)


def test_a_saved_report_of_a_crosscoder_is_used_again(tiny_lm, tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    first = measure_at(crosscoder(), tiny_lm, [OTHER, HOOK], path=path)
    monkeypatch.setattr("saelab.evaluation.report._measure", lambda *_: pytest.fail("measured again"))
    assert measure_at(crosscoder(), tiny_lm, (OTHER, HOOK), path=path) == first
