"""The diff report of a crosscoder: planted exclusives and artefacts by hand, exactness, intervals, files, refusals, the page."""

import copy
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import HOSTILE, build_tiny_llama
from pages import html_of

import saelab
from saelab.benchmarks.planted import diffing
from saelab.cli.main import main
from saelab.diffing import DiffReport, judging, load_diff
from saelab.diffing.judged import DEAD, DECOUPLED, NOT_HELD, RARE, SHRUNK, SPECIFIC, Interval
from saelab.diffing.measuring import N_RANDOM, Tokens, measure
from saelab.diffing.report_html import card, told
from saelab.diffing.running import diff_report, judged_report, sources_to_compare
from saelab.errors import SaelabError
from saelab.evaluation import latent_scaling
from saelab.features.sides import CLASSES, sides
from saelab.hints.next_commands import after_training, command, trainings
from saelab.saes import CrosscoderConfig, CrosscoderSAE, TopKConfig, TopKSAE

N, BLOCKS = 6144, 24
PLANTED = diffing(seed=0)
SHARED, ONLY_A, ONLY_B, WEAK = (
    PLANTED.groups[name] for name in ("shared", "only_first", "only_second", "weak_in_first")
)
X = PLANTED.held_out(N, 0)
BLOCK = torch.arange(N) * BLOCKS // N
ABOUT = {"a": "base", "b": "tuned", "sources": ["base", "tuned"], "kind": "models", "texts": "planted", "split": "all"}


def crosscoder(extra: int = 0) -> CrosscoderSAE:
    """One that knows the planted features: it encodes by the pseudo-inverse, with a threshold. `extra` features are of zeros."""
    rows = PLANTED.features.flatten(1)
    n, d_in = len(rows), PLANTED.features.shape[2]
    sae = CrosscoderSAE(CrosscoderConfig(n + extra, 3, normalize="none"), d_in, n_sources=2)
    with torch.no_grad():
        for tensor in (sae.W_enc, sae.W_dec):
            tensor.zero_()
        sae.W_enc[:, :n] = torch.linalg.pinv(rows).T.unflatten(1, (2, d_in)).transpose(0, 1)
        sae.W_dec[:, :n] = PLANTED.features.transpose(0, 1)
        sae.threshold.fill_(0.3)
        sae.n_observed.fill_(1)
    return sae


def tokens(x=X, document=None):
    return [Tokens(*some) for some in zip(x.split(500), BLOCK.split(500), (document or BLOCK.split(500)), strict=False)]


def found_in(sae: CrosscoderSAE, **options):
    return measure(sae, tokens(), n_blocks=BLOCKS, **options)


def verdicts(sae: CrosscoderSAE) -> dict[int, str]:
    return {one.feature: one.verdict for one in judging.judge(found_in(sae))}


# --- what is found


def test_true_exclusives_are_specific_and_nothing_else_is_a_candidate():
    found = judging.judge(found_in(crosscoder()))
    assert {one.feature: (one.verdict, one.side) for one in found} == (
        {i: (SPECIFIC, "a") for i in range(ONLY_A.start, ONLY_A.stop)}
        | {i: (SPECIFIC, "b") for i in range(ONLY_B.start, ONLY_B.stop)}
    )
    for one in found:
        assert one.sure and abs(one.nu_error.value) < 0.05 and abs(one.nu_reconstruction.value) < 0.3
        assert one.n_fired == pytest.approx(N * 3 / 36, rel=0.2)


def test_weak_features_whose_row_was_shrunk_are_not_mislabelled():
    """Decoder rows at a of features that a holds at 0.3 of their strength are set to zero, as an L1 penalty does."""
    sae = crosscoder()
    with torch.no_grad():
        sae.W_dec[0, WEAK] = 0
    found = judging.judge(found_in(sae))
    of = {one.feature: one for one in found}
    assert len(of) == 12
    for i in range(WEAK.start, WEAK.stop):
        assert of[i].verdict == SHRUNK and of[i].reasons == (SHRUNK,) and of[i].side == "b"
        assert (
            0.25 < of[i].nu_error.low < of[i].nu_error.high < 0.4 and of[i].sure
        )  # 0.3, and what noise adds to the code
    assert sum(one.verdict == SPECIFIC for one in found) == 8


def test_two_features_that_split_a_shared_one_are_decoupled():
    sae = crosscoder(extra=1)
    with torch.no_grad():
        sae.W_enc[:, -1] = sae.W_enc[:, 0]
        sae.W_dec[0, -1], sae.W_dec[0, 0] = sae.W_dec[0, 0].clone(), 0
        sae.threshold.fill_(0.2)
    found = {one.feature: one for one in judging.judge(found_in(sae))}
    for feature, side in ((0, "b"), (36, "a")):
        assert found[feature].verdict == DECOUPLED and found[feature].side == side
        assert found[feature].nu_reconstruction.value == pytest.approx(1, abs=0.2) and found[feature].sure


def test_dead_rare_and_absent_features_are_named_as_such():
    sae = crosscoder(extra=3)
    with torch.no_grad():
        sae.W_dec[1, 36:] = PLANTED.features[:3, 1]
        sae.W_enc[:, 37] = sae.W_enc[:, 1]
        sae.b_enc[37] = -1.25  # only the largest of its activations
        sae.W_enc[:, 38] = sae.W_enc[:, 2]
        sae.W_dec[1, 38] *= -1
    found = {one.feature: one for one in judging.judge(found_in(sae))}
    assert [found[i].verdict for i in (36, 37, 38)] == [DEAD, RARE, NOT_HELD]
    assert found[36].n_fired == 0 and 0 < found[37].n_fired < judging.MIN_TOKENS
    assert (found_in(sae).n_fired[:, 37] > 0).sum() >= judging.MIN_BLOCKS  # in several places, but seldom
    assert math.isnan(found[36].nu_error.value) and not found[37].sure
    report = judged_report(sae, found_in(sae), ABOUT)
    assert "1 too rare to judge, 1 dead" in report.conclusions()[1] and report.about["n_dead"] == 1


def test_swapping_the_sides_swaps_the_verdicts():
    sae = crosscoder()
    there, back = (judging.judge(measure(sae, tokens(), *pair, n_blocks=BLOCKS)) for pair in ((0, 1), (1, 0)))
    assert {one.feature: one.side for one in there} == {one.feature: "ab"[one.side == "a"] for one in back}
    for one, other in zip(*(sorted(rows, key=lambda row: row.feature) for rows in (there, back)), strict=True):
        assert one.nu_error.value == pytest.approx(other.nu_error.value) and one.delta == pytest.approx(1 - other.delta)


# --- exactness


def noisy() -> CrosscoderSAE:
    sae = crosscoder()
    with torch.no_grad():
        sae.W_dec.add_(0.1 * torch.randn(sae.W_dec.shape, generator=torch.Generator().manual_seed(1)))
        sae.b_dec.add_(0.1)
    sae.set_normalization(torch.full((2, 24), 0.05), torch.tensor([3.0, 5.0]))
    return sae


def test_ratios_are_least_squares_along_the_direction_of_the_longer_row():
    sae = noisy()
    found = found_in(sae)
    x = sae.normalize(X).unflatten(1, (2, 24)).double()
    z, decoder = sae.encode(X).to_dense().double(), sae.W_dec.detach().double()
    x_hat = torch.einsum("nf,sfd->nsd", z, decoder) + sae.b_dec.detach().double()
    for j in (0, ONLY_A.start, ONLY_B.start, WEAK.start):
        side = int(decoder[1, j].norm() >= decoder[0, j].norm())
        along = (z[:, j, None] * decoder[side, j]).reshape(-1, 1)
        betas = []
        for source in (1 - side, side):
            put_back = x[:, source] - x_hat[:, source] + z[:, j, None] * decoder[source, j]
            betas.append(
                [torch.linalg.lstsq(along, y.reshape(-1, 1)).solution.item() for y in (put_back, x_hat[:, source])]
            )
        np.testing.assert_allclose(judging.nu(found)[:, j], np.array(betas[0]) / np.array(betas[1]), rtol=1e-5)


def test_ratios_are_those_of_latent_scaling():
    sae = noisy()
    ratios, scaling = judging.nu(found_in(sae)), latent_scaling(sae, X.split(1000))
    of_b = found_in(sae).delta >= 0.5
    assert of_b.sum() > 8
    np.testing.assert_allclose(ratios[0][of_b], scaling.nu_error.numpy()[of_b], rtol=1e-9)
    np.testing.assert_allclose(ratios[1][of_b], scaling.nu_reconstruction.numpy()[of_b], rtol=1e-9)


def test_intervals_are_of_resampled_blocks():
    sae = crosscoder()
    once = found_in(sae)
    one = judging.judge(once)[0]
    assert one.nu_error.low < one.nu_error.value < one.nu_error.high
    assert (
        one.density.value == pytest.approx(one.n_fired / N) and one.density.low < one.density.value < one.density.high
    )
    alike = once._replace(
        numerators=np.broadcast_to(once.numerators.mean(3, keepdims=True), once.numerators.shape),
        n_fired=np.broadcast_to(once.n_fired.mean(0, keepdims=True), once.n_fired.shape),
    )
    for same in judging.judge(alike):
        assert same.nu_error.high - same.nu_error.low < 1e-9 and same.density.high - same.density.low < 1e-9


def test_random_directions_have_the_norms_of_the_rows_and_score_low():
    found = found_in(crosscoder())
    base = judging.baseline(found)
    assert base["n"] == 8 * N_RANDOM and 0 < base["nu_error"] < 0.1 < base["nu_reconstruction"]
    again, other = found_in(crosscoder()), found_in(crosscoder(), seed=1)
    np.testing.assert_array_equal(found.numerators, again.numerators)
    assert not np.allclose(found.numerators[:, 1:], other.numerators[:, 1:])
    np.testing.assert_array_equal(found.numerators[:, 0], other.numerators[:, 0])


def test_features_of_the_change_fire_in_documents_that_show_it():
    """Tokens with the planted feature 28 are put into the first 20 documents of 60."""
    z = PLANTED.held_out_feature_acts(N, 0)
    has = z[:, ONLY_B.start] > 0.3
    document = torch.where(has, torch.arange(N) % 20, 20 + torch.arange(N) % 40)
    found = measure(crosscoder(), tokens(document=document.split(500)), n_blocks=BLOCKS, changed=range(20))
    assert found.documents is not None and found.documents.n == (20, 40)
    of = {one.feature: one.related for one in judging.judge(found)}
    change = of[ONLY_B.start]
    assert change is not None and change.related and (change.n_changed, change.n_other) == (20, 0)
    assert change.difference.value == 1 and change.q < 1e-6
    assert not any(one.related for feature, one in of.items() if one and feature != ONLY_B.start)
    document = torch.where(has, torch.arange(N) % 3, 3 + torch.arange(N) % 20)
    few = measure(crosscoder(), tokens(document=document.split(500)), n_blocks=BLOCKS, changed=range(3))
    assert not any(one.related.related for one in judging.judge(few) if one.related)  # too few documents for a claim


# --- the report


@pytest.fixture(scope="module")
def report():
    sae = crosscoder(extra=2)
    with torch.no_grad():
        sae.W_dec[0, WEAK] = 0
        sae.W_dec[1, 36] = 1
    return judged_report(sae, found_in(sae), ABOUT)


def test_saved_and_loaded(report, tmp_path):
    again = load_diff(report.save(tmp_path / "diff.json"))
    assert again.conclusions() == report.conclusions() and len(again.features) == len(report.features)
    for one, other in zip(report.features, again.features, strict=True):
        assert str(one) == str(other)  # NaN and all
    assert card(again) == card(report) and again.cloud.keys() == report.cloud.keys()
    data = json.loads((tmp_path / "diff.json").read_text())
    assert (
        data["counts"] == {"a only": 4, "shared": 24, "b only": 9, "other": 1}
        and data["features"][-1]["nu_error"][0] is None
    )
    for damage in (
        {"format": "x"},
        {"features": [{}]},
        {"about": 1, "thresholds": 1, "counts": None, "a": None, "kind": 0},
    ):
        (tmp_path / "bad.json").write_text(json.dumps({**data, **damage} if "about" not in damage else [1]))
        with pytest.raises(SaelabError, match="make it again"):
            load_diff(tmp_path / "bad.json")


def test_what_it_concludes(report):
    said = report.conclusions()
    assert (
        said[0]
        == "Only base: 4 of 38 features by their decoder norms; 4 survive Latent Scaling, 100% [51%, 100%] of those judged."
    )
    assert "9 of 38" in said[1] and "4 survive Latent Scaling, 50% [22%, 78%]" in said[1]
    assert "4 are artefacts (4 by complete shrinkage); 1 dead." in said[1] and "Random directions" in said[2]
    assert report.survival("b") == pytest.approx(Interval(0.5, 0.2152, 0.7848), abs=1e-3)
    shown = "".join(map(str, told(report)[:3]))
    assert "artefacts" in shown


def test_it_tells_how_good_the_crosscoder_is_at_either_side(report):
    sae = crosscoder()
    x_hat, y = sae(X).x_hat.detach(), X
    fvu = [float((y - x_hat)[:, s].square().sum() / (y - y.mean(0))[:, s].square().sum()) for s in (0, 1)]
    for pair, order in (((0, 1), fvu), ((1, 0), fvu[::-1])):
        made = judged_report(sae, measure(sae, tokens(), *pair, n_blocks=BLOCKS), ABOUT)
        assert [made.about["fvu"][side] for side in "ab"] == pytest.approx(order, rel=1e-4) and fvu[0] != fvu[1]
        assert made.about["l0"] == pytest.approx(sae.encode(X).nnz / N)
        line = f"leaves {order[0]:.1%} of base and {order[1]:.1%} of tuned unexplained (FVU, all), with an L0 of "
        assert line in str(made) and line in card(made) and made.data()["fvu"]["a"] == made.about["fvu"]["a"]
    before = {name: one for name, one in report.about.items() if name not in ("fvu", "l0")}
    assert "unexplained" not in "".join(DiffReport(before, report.features, report.cloud).conclusions())


def test_without_candidates_it_says_how_far_norms_lean():
    sae = crosscoder()
    with torch.no_grad():
        sae.W_dec[0, ONLY_B], sae.W_dec[1, ONLY_A] = PLANTED.features[ONLY_B, 1], PLANTED.features[ONLY_A, 0]
    said = judged_report(sae, found_in(sae), ABOUT).conclusions()
    assert said[2:-1] == ["Relative norms range from 0.50 to 0.85."] and said[0].startswith("Only base: 0 of 36")


def test_the_html_is_one_safe_file(report, tmp_path):
    evil = "".join(HOSTILE)
    features = tuple(one._replace(label=evil, tokens=(evil, "</code>")) for one in report.features)
    hostile = copy.copy(report)
    object.__setattr__(hostile, "features", features)
    object.__setattr__(hostile, "about", {**report.about, "a": evil, "texts": evil})
    text = hostile.save_html(tmp_path / "diff.html").read_text(encoding="utf-8")
    assert "<script" not in text and "<img" not in text and "<svg on" not in text and "\u202e" not in text
    assert "default-src 'none'" in text and "http" not in text.replace("http-equiv", "").replace("arXiv", "")[:400]
    plain = report.save_html(tmp_path / "plain.html").read_text(encoding="utf-8")
    assert "complete shrinkage" in plain and "<svg" in plain and 'class="grey"' in plain


# --- models, files, refusals

HOOK = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_folder):
    """A RUN with a crosscoder of two models and its features; one text in three shows a change."""
    folder = tmp_path_factory.mktemp("diff") / "run"
    folder.mkdir()
    other = build_tiny_llama(folder.parent / "other", seed=1)
    texts = [
        f"{i} sheep and {i * i} goats in field {i % 7}" + (" ring, green bells" if i % 3 == 0 else "")
        for i in range(400)
    ]
    for name, some in (("texts", texts), ("changed", texts[::3])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in some))
    models = [saelab.load_model(one, dtype=torch.float32, device="cpu") for one in (tiny_folder, other)]
    cache = saelab.harvest(models, folder / "texts.jsonl", HOOK, 2_500, folder / "cache", ctx_len=32, progress=False)
    train = saelab.TrainConfig(n_tokens=4_000, batch_size=250, warmup_steps=2, checkpoint_every=0, device="cpu")
    sae = saelab.train(CrosscoderConfig(d_sae=64, k=6), cache, train, progress=False)
    assert isinstance(sae, CrosscoderSAE)
    with torch.no_grad():  # some look specific
        sae.W_dec[0, :8], sae.W_dec[1, 8:12] = 0, 0
    saelab.save_sae(sae, folder / "sae")
    saelab.collect_features(sae, models, out_dir=folder / "features", progress=False)
    return folder


@pytest.fixture(scope="module")
def saved(run):
    """The report by the command line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("saelab.models.loading.fast_bf16", lambda device: False)
        assert (
            main(["diff", str(run), "--changed", str(run / "changed.jsonl"), "--report", str(run / "diff.html")]) == 0
        )
    return load_diff(run / "diff.json")


def test_the_command_reads_held_out_text_of_both_models(run, saved, capsys):
    about, store = saved.about, saelab.load_features(run)
    assert (
        about["kind"] == "models"
        and about["split"] == "held_out"
        and about["sources"] == store.manifest["sites"]["reads"]
    )
    assert about["n_tokens"] == store.n_tokens and about["a"].endswith("tiny-llama/" + HOOK)
    assert about["changed"]["n_changed"] > 0 and "show the change" in saved.conclusions()[-1]
    both = sides(store)
    assert about["counts"] == {name: len(both.features(name)) for name in CLASSES}
    assert len(saved.features) == 12 and about["counts"]["b only"] == 8
    for one in saved.features:
        row = store.row_of(one.feature)
        assert one.n_fired == row["n_fired"] and one.label == row["label"] and (one.tokens or not one.n_fired)
    assert (run / "diff.html").stat().st_size > 1000
    assert "--variant crosscoder" in trainings(run)[0] and command("diff", run / "sae") in after_training(run / "sae")


def test_refusals_name_what_is_wrong(run, tiny_lm, capsys):
    with pytest.raises(ValueError, match="variant topk.*reads one source"):
        sources_to_compare(TopKSAE(TopKConfig(8, 2), 4))
    with pytest.raises(ValueError, match="reads one source; a diff compares two"):
        sources_to_compare(CrosscoderSAE(CrosscoderConfig(8, 2), 4, n_sources=1))
    three = CrosscoderSAE(CrosscoderConfig(8, 2, hook_names=("p", "q", "r")), 4, n_sources=3)
    with pytest.raises(ValueError, match="reads 3 sources, p, q, r: name two of them"):
        sources_to_compare(three)
    assert sources_to_compare(three, "r", 0) == (2, 0)
    for a, b, says in (
        ("p", "p", "same source"),
        ("x", "p", "'x' is no source.*0 to 2, or one of p, q, r"),
        (3, 0, "no source"),
    ):
        with pytest.raises(ValueError, match=says):
            sources_to_compare(three, a, b)
    assert main(["diff", str(run / "cache")]) == 2 and "holds no SAE" in capsys.readouterr().err
    sae = saelab.load_sae(run)
    with pytest.raises(ValueError, match="give a list of them"):
        diff_report(sae, tiny_lm, progress=False)
    assert main(["diff", str(run), "--changed", str(run / "none.jsonl")]) == 2
    assert "none.jsonl" in capsys.readouterr().err


def test_texts_that_are_not_read_are_refused(run, tiny_folder):
    models = [saelab.load_model(one, dtype=torch.float32, device="cpu") for one in (tiny_folder, run.parent / "other")]
    sae = saelab.load_sae(run)
    with pytest.raises(ValueError, match="None of the .* documents .* is among the texts that show the change"):
        diff_report(sae, models, changed=["something else"], progress=False)


# --- the page


def test_the_page_shows_the_report(open_page, run, saved):
    app = open_page("compare", run)
    assert not app.exception and not app.error and len(app.get("plotly_chart")) == 3
    shown = html_of(app)
    assert saved.conclusions()[0].split(":")[0].replace("/", "/")[:9] == "Only tiny"
    for one in saved.features[:3]:
        assert f"feature={one.feature}" in shown
    if len(saved.specific) < len(saved.features):
        assert "sa-dim" in shown


def test_the_page_without_a_report_or_with_another_says_what_to_do(open_page, run, saved, tmp_path):
    import shutil

    bare = shutil.copytree(run, tmp_path / "bare", ignore=shutil.ignore_patterns("diff.json", "cache"))
    app = open_page("compare", bare)
    assert not app.exception and [code.value for code in app.code][0] == f"saelab diff {bare / 'sae'}"
    data = json.loads((run / "diff.json").read_text())
    for change, says in (({"sae": "0" * 64}, "other weights"), ({"a": "x<b>"}, "compares x")):
        (bare / "diff.json").write_text(json.dumps({**data, **change}))
        app = open_page("compare", bare)
        assert not app.exception and any(says in one.value for one in app.caption), [one.value for one in app.caption]
    (bare / "diff.json").write_text("{")
    app = open_page("compare", bare)
    assert not app.exception and "not valid JSON" in app.warning[0].value


def test_reading_a_report_does_not_import_torch(run, saved):
    code = (
        "import sys; from saelab.app import page_compare; from saelab.diffing import load_diff\n"
        f"load_diff({str(run)!r} + '/diff.json')._repr_html_(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
