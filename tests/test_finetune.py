"""SAEs trained inside their model: the KL and its gradients, the masked tokens, what is refused, and resuming bit for bit."""

import dataclasses
import json
import shutil

import pytest
import torch
from tiny_runs import HOOK, make_run
from tiny_saes import interrupt_before
from torch.nn.functional import kl_div

import saelab
from saelab.cli.main import main
from saelab.errors import TrainingError
from saelab.evaluation.heldout import open_score_stream
from saelab.evaluation.loss_recovered import LossRecovered
from saelab.losses import log_probs
from saelab.models.differentiable import differentiable_logits
from saelab.models.tiny import build_tiny_llama
from saelab.saes import VARIANTS, StepInfo, TopKConfig, TopKSAE
from saelab.training.contexts import ContextRows, Contexts, Watch, as_batch
from saelab.training.finetune import finetune, train_end_to_end
from saelab.training.spliced_step import spliced_loss

CTX = 64
QUICK = saelab.TrainConfig(n_tokens=CTX * 2 * 6, batch_size=CTX * 2, warmup_steps=2, checkpoint_every=2, log_every=1)
ABLE = [name for name, one in VARIANTS.items() if getattr(one, "trains_in_model", False) and not one.extra_dims]


@pytest.fixture(scope="module")
def run(tiny_lm, tmp_path_factory):
    """A RUN with a briefly trained SAE of 64 features, k 4."""
    folder = make_run(tmp_path_factory.mktemp("finetune") / "run", tiny_lm)
    config = saelab.TrainConfig(n_tokens=256 * 60, batch_size=256, warmup_steps=5)
    saelab.train(TopKConfig(64, 4), folder / "cache", config, folder / "sae", progress=False)
    return folder


def sae_of(run):
    return saelab.load_sae(run / "sae")


def never(*_):
    return StepInfo(torch.zeros(24, dtype=torch.bool), 0, 10)


@pytest.fixture(scope="module")
def double():
    """A random model of two layers, width 8, in float64, two contexts of 5 tokens, and a mask that keeps seven of the ten."""
    lm = build_tiny_llama(20, 8, 2, 2, 16)
    lm.model.double()
    for module in lm.model.modules():
        if hasattr(module, "variance_epsilon"):  # transformers computes it in float32
            module.forward = lambda x, norm=module: norm.weight * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    ids = torch.randint(0, 20, (2, 5), generator=torch.Generator().manual_seed(0))
    keep = torch.ones(2, 5, dtype=torch.bool)
    keep[:, 0] = keep[1, 3] = False
    return lm, ids, keep


def contexts_of(lm, ids, keep, hook="blocks.0.hook_resid_post"):
    scored = keep & torch.tensor([True] * 4 + [False])
    watch = Watch(hook)
    predicted = log_probs(differentiable_logits(lm, as_batch(ids), [watch])[scored])
    return ContextRows(hook, watch.x[keep], ids, keep, scored, predicted)


def double_sae(variant, **changes):
    sae = VARIANTS[variant](VARIANTS[variant].Config(d_sae=24, k=3, normalize="none", **changes), 8, seed=1).double()
    with torch.no_grad():
        sae.b_dec.copy_(0.01 * torch.randn(8, generator=torch.Generator().manual_seed(2)))
        sae.W_dec.mul_(1.0)
    return sae


class Shift:
    """An edit at an earlier hook, to differentiate by."""

    hook_name = "blocks.0.hook_resid_pre"
    first_token = True

    def __init__(self, by):
        self.by = by

    def apply(self, x, positions):
        return x + self.by


def dense_kl(lm, ids, keep, sae, by, variant):
    """The KL with a dense SAE in a forward hook of torch's own, and torch's own KL."""
    target = lm.model(input_ids=ids).logits

    def spliced(_module, _arguments, output):
        x = output[0] if isinstance(output, tuple) else output
        rows = x[keep]
        u = (rows - (0 if sae.pre_bias is None else sae.pre_bias)) @ sae.W_enc.T + sae.b_enc
        score = u.abs() if variant == "abs_topk" else u
        if variant in ("topk", "abs_topk"):
            least = score.topk(3, dim=1).values[:, -1:]
        else:
            least = score.flatten().topk(3 * len(rows)).values[-1]
        z = u * (score >= least) * (score > 0)
        out = x.clone()
        out[keep] = z @ sae.W_dec + sae.b_dec
        return (out, *output[1:]) if isinstance(output, tuple) else out

    handles = [
        lm.model.model.embed_tokens.register_forward_hook(lambda _m, _a, x: x + by),
        lm.model.model.layers[0].register_forward_hook(spliced),
    ]
    try:
        logits = lm.model(input_ids=ids).logits
    finally:
        for handle in handles:
            handle.remove()
    scored = keep.clone()
    scored[:, -1] = False
    p, q = (each[scored].log_softmax(-1) for each in (target, logits))
    return kl_div(q, p, reduction="sum", log_target=True) / int(scored.sum())


@pytest.mark.parametrize("variant", ["topk", "abs_topk", "batch_topk", "matryoshka", "mutual_choice"])
def test_the_kl_and_all_its_gradients_are_those_of_a_dense_sae(variant, double):
    """Also the gradient towards what the SAE reads, through the sparse encoder: that of a shift at the embedding."""
    lm, ids, keep = double
    lm.model.requires_grad_(False)
    sae, by = double_sae(variant), torch.zeros(8, dtype=torch.float64, requires_grad=True)
    rows = contexts_of(lm, ids, keep)
    kl, _ = spliced_loss(sae, lm, rows, never(), [Shift(by)])
    expected = dense_kl(lm, ids, keep, sae, by, variant)
    wanted = [sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, by]
    assert kl.item() == pytest.approx(expected.item(), rel=1e-10) and kl.item() > 1e-4
    for got, exact in zip(torch.autograd.grad(kl, wanted), torch.autograd.grad(expected, wanted), strict=True):
        assert exact.abs().max() > 1e-7
        torch.testing.assert_close(got, exact, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("variant", ["topk", "batch_topk"])
def test_gradcheck_through_the_model(variant, double):
    lm, ids, keep = double
    sae, by = double_sae(variant), torch.zeros(8, dtype=torch.float64, requires_grad=True)
    rows = contexts_of(lm, ids, keep)
    kl = lambda *_: spliced_loss(sae, lm, rows, never(), [Shift(by)])[0]  # noqa: E731
    assert torch.autograd.gradcheck(kl, [sae.b_enc, sae.b_dec, by], eps=1e-7, atol=1e-6)


def test_without_error_the_kl_and_its_gradient_are_0(double):
    lm, ids, keep = double
    sae = TopKSAE(TopKConfig(16, 16, normalize="none"), 8).double()
    both = torch.cat([torch.eye(8), -torch.eye(8)]).double()
    with torch.no_grad():
        for weight in (sae.W_enc, sae.W_dec):
            weight.copy_(both)
    info = StepInfo(torch.zeros(16, dtype=torch.bool), 0, 10)
    kl, loss = spliced_loss(sae, lm, contexts_of(lm, ids, keep), info)
    kl.backward()
    assert abs(kl.item()) < 1e-14 and loss.terms["fvu"].item() < 1e-28
    assert all(p.grad is None or p.grad.abs().max() < 1e-13 for p in sae.parameters())
    assert sae.W_dec.grad is not None


def test_masked_tokens_keep_their_activations(double):
    lm, ids, keep = double
    none = torch.zeros_like(keep)
    none[0, 2] = True  # one token replaced: contexts without one are those of the model
    rows = contexts_of(lm, ids, keep)
    few = dataclasses.replace(rows, keep=none)
    kl, _ = spliced_loss(double_sae("topk"), lm, few, never())
    changed = dataclasses.replace(few, scored=rows.scored & (torch.arange(2)[:, None] == 1))
    changed = dataclasses.replace(changed, log_probs=contexts_of(lm, ids, keep).part(slice(1, 2)).log_probs)
    untouched, _ = spliced_loss(double_sae("topk"), lm, changed, never())
    assert kl.item() > 1e-6 and untouched.item() < 1e-14


def test_the_kl_is_the_one_that_evaluate_reports(run, tiny_lm):
    sae, lm = sae_of(run), tiny_lm
    stream = open_score_stream(sae, lm, split="train", allow_train=True, n_tokens=CTX * 3)
    reported = LossRecovered(sae, lm, stream.hooks, torch.zeros(sae.d_in))
    (batch,) = stream.batches
    (scored,) = list(stream)
    reported.add(batch.ids, scored.keep, batch.doc >= 0)
    contexts = Contexts(lm, stream.texts, "train", HOOK, stream.mask, CTX, stream.prepend_bos, "", True)
    rows = contexts._rows(batch.ids, batch.doc, predicts=True)
    kl, _ = spliced_loss(sae, lm, rows, StepInfo(torch.zeros(64, dtype=torch.bool), 0, 10))
    assert kl.item() == pytest.approx(reported.results()["kl"], rel=1e-4)


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_short_finetune_lowers_the_kl_on_other_text_more_than_the_fvu_alone_does(run, tiny_lm, tmp_path):
    sae = sae_of(run)
    longer = dataclasses.replace(QUICK, n_tokens=CTX * 2 * 30, lr=3e-3)
    tuned = finetune(sae, tiny_lm, longer, tmp_path / "sae", progress=False)
    by_fvu = finetune(sae, tiny_lm, longer, kl_weight=0.0, progress=False)
    scored = [saelab.evaluate(one, tiny_lm, n_tokens_ce=500, progress=False) for one in (sae, by_fvu, tuned)]
    before, at_fvu, after = (one.kl or 0.0 for one in scored)
    assert after < 0.95 * before and after < at_fvu and {one.l0 for one in scored} == {4.0}
    assert sae.hash == sae_of(run).hash  # the old one is as it was
    torch.testing.assert_close(tuned.W_dec.norm(dim=1), torch.ones(64))
    assert {"kl", "fvu", "loss", "l0", "grad_norm"} <= metrics(tmp_path / "sae")[0].keys()
    loaded = saelab.load_sae(tmp_path / "sae")  # checks the golden numbers
    origin = loaded.provenance.origin
    assert origin["in_model"]["sae_hash"] == sae.hash and origin["in_model"]["fvu_weight"] == 1.0
    assert origin["in_model"]["training"]["n_tokens"] == 256 * 60 and origin["hook_name"] == HOOK
    documents = loaded.provenance.train_documents
    assert torch.isin(sae.provenance.train_documents, documents).all()


def saved(folder):
    return {name: (folder / name).read_bytes() for name in ("sae.safetensors", "golden.safetensors", "sae.json")}


@pytest.mark.parametrize("variant", ["topk", "batch_topk"])
def test_an_interrupted_finetune_resumes_bit_for_bit(variant, run, tiny_lm, tmp_path, monkeypatch):
    config = VARIANTS[variant].Config(d_sae=64, k=4)
    go = lambda folder: train_end_to_end(config, run / "cache", tiny_lm, QUICK, folder, progress=False)  # noqa: E731
    go(tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_before(3, patch)
        go(tmp_path / "cut")
    assert not (tmp_path / "cut" / "sae.json").exists()
    go(tmp_path / "cut")
    assert saved(tmp_path / "cut") == saved(tmp_path / "whole")
    stamp = (tmp_path / "cut" / "sae.safetensors").stat().st_mtime_ns
    go(tmp_path / "cut")  # finished: nothing is done again
    assert (tmp_path / "cut" / "sae.safetensors").stat().st_mtime_ns == stamp


@pytest.mark.parametrize("variant", ABLE)
def test_every_able_variant_is_trained_and_keeps_its_l0(variant, run, tiny_lm, tmp_path):
    from tiny_saes import config_of

    sae = train_end_to_end(config_of(variant, 64), run / "cache", tiny_lm, QUICK, tmp_path, progress=False)
    assert all(line["kl"] > 0 for line in metrics(tmp_path)) and len(metrics(tmp_path)) == 6
    if sae.expected_l0(sae.config) is not None and hasattr(sae, "threshold"):
        assert sae.provenance.trained["calibration"] == {
            "n_rows": sae.provenance.trained["calibration"]["n_rows"],
            "kept_out": True,
        }
    again = finetune(sae, tiny_lm, dataclasses.replace(QUICK, n_tokens=CTX * 4), progress=False)
    assert again.hash != sae.hash


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name not in ABLE])
def test_every_other_variant_is_refused_by_name(variant, run, tiny_lm, tmp_path):
    from tiny_saes import build, config_of

    assert {"topk", "batch_topk", "abs_topk", "matryoshka"} <= set(ABLE)
    assert not {"masked_topk", "batch_topk_transcoder"} & set(ABLE)
    with pytest.raises(ValueError, match=f"^{variant} cannot be trained inside a model; topk, .*can"):
        finetune(build(variant), tiny_lm, QUICK, tmp_path)
    with pytest.raises(ValueError, match=f"^{variant} cannot be trained inside a model"):
        train_end_to_end(config_of(variant), run / "cache", tiny_lm, QUICK, tmp_path)
    assert not list(tmp_path.iterdir())


def test_contexts_of_a_step_follow_from_its_number_and_the_held_out_are_in_none(run, tiny_lm):
    sae = sae_of(run)
    stream = open_score_stream(sae, tiny_lm, split="train", allow_train=True, n_tokens=CTX)
    options = (
        tiny_lm,
        stream.texts,
        "train",
        HOOK,
        stream.mask,
        CTX,
        stream.prepend_bos,
        "EOS between documents, attention not reset",
    )
    contexts = Contexts(*options, predicts=False)
    assert contexts.has_held_out
    everything = [tuple(row) for block in contexts._blocks() for row in block.ids.tolist()]
    several = contexts.batches([HOOK], 2 * CTX, 0, 0)
    epochs = 2 * len(everything) // 2
    steps = [next(several).ids.tolist() for _ in range(epochs)]
    for step in (1, 5, epochs - 1):
        assert next(contexts.batches([HOOK], 2 * CTX, 0, step)).ids.tolist() == steps[step]
    assert next(contexts.batches([HOOK], 2 * CTX, 1, 0)).ids.tolist() != steps[0]
    trained = {tuple(row) for step in steps for row in step}
    assert trained == {row for i, row in enumerate(everything) if i % 16 != 15} and len(everything) > 31
    assert 0 < len(contexts.kept_out([HOOK])[HOOK]) < len(everything[15::16]) * CTX
    texts_read = len(list(stream.texts.documents("train", tiny_lm)))
    assert len(contexts.documents) == texts_read


def test_what_does_not_fit_is_refused_before_anything_is_written(run, tiny_lm, tmp_path):
    sae, out = sae_of(run), tmp_path / "sae"
    other = build_tiny_llama(300, 32, 3, 4, 128)

    def refused(match, sae=sae, lm=tiny_lm, config=QUICK, **options):
        with pytest.raises(ValueError, match=match):
            finetune(sae, lm, config, out, **options)

    refused("whose weights are not those of", lm=other)
    refused(
        "batch_size=100 must be a multiple of the context length, 64 tokens.*Use 64",
        config=dataclasses.replace(QUICK, batch_size=100),
    )
    refused("grad_accumulation=3 must divide the 2", config=dataclasses.replace(QUICK, grad_accumulation=3))
    refused("feature_shards=2", config=dataclasses.replace(QUICK, feature_shards=2))
    refused("fvu_weight=-1", fvu_weight=-1.0)
    refused("both 0", fvu_weight=0.0, kl_weight=0.0)
    refused("split='tain'", split="tain")
    moved = sae_of(run)
    moved.provenance = dataclasses.replace(
        moved.provenance, origin=dict(moved.provenance.origin) | {"hook_name": "blocks.9.hook_resid_post"}
    )
    refused("blocks.9.hook_resid_post", sae=moved)
    with tiny_lm.steer(Shift(torch.ones(32))):
        refused("is being steered")
    assert not out.exists()


def test_another_call_for_the_same_folder_is_refused(run, tiny_lm, tmp_path):
    finetune(sae_of(run), tiny_lm, QUICK, tmp_path / "sae", progress=False)
    with pytest.raises(TrainingError, match="fvu_weight 0.5"):
        finetune(sae_of(run), tiny_lm, QUICK, tmp_path / "sae", fvu_weight=0.5, progress=False)


def test_micro_batches_and_the_fvu_alone(run, tiny_lm):
    """In micro-batches the gradient is nearly the same (each has its own variance); without the KL no `kl` is measured."""
    sae = sae_of(run)
    whole = finetune(sae, tiny_lm, QUICK, fvu_weight=0.0, progress=False)
    parts = finetune(sae, tiny_lm, dataclasses.replace(QUICK, grad_accumulation=2), fvu_weight=0.0, progress=False)
    moved = (whole.W_dec - sae.W_dec).norm()
    assert (whole.W_dec - parts.W_dec).norm() < 0.2 * moved
    alone = finetune(sae, tiny_lm, QUICK, kl_weight=0.0, progress=False)
    assert "kl" not in alone.provenance.trained["metrics"] and (alone.W_dec - whole.W_dec).norm() > 0.2 * moved


def test_the_command(run, tiny_lm, tiny_folder, tmp_path, capsys):
    for entry in ("cache", "sae"):
        shutil.copytree(run / entry, tmp_path / entry)
    options = [
        "--n-tokens",
        "512",
        "--batch-size",
        "128",
        "--model",
        str(tiny_folder),
        "--texts",
        str(run / "texts.jsonl"),
    ]
    before = saved(tmp_path / "sae")
    assert main(["finetune", str(tmp_path), *options]) == 0
    said = capsys.readouterr().out
    assert "Reading texts.jsonl, split 'train'" in said and "Reading contexts that were held out" in said
    assert "sae-finetuned" in said and saved(tmp_path / "sae") == before
    stamp = (tmp_path / "sae-finetuned" / "sae.safetensors").stat().st_mtime_ns
    assert main(["finetune", str(tmp_path), *options]) == 0  # the same call again: there is nothing left to do
    assert (tmp_path / "sae-finetuned" / "sae.safetensors").stat().st_mtime_ns == stamp
    assert main(["finetune", str(tmp_path), *options, "--name", "kl", "--fvu-weight", "0"]) == 2
    assert "holds 2 SAEs to finetune; name one of" in capsys.readouterr().err
    assert main(["finetune", str(tmp_path / "sae"), *options, "--name", "kl", "--fvu-weight", "0"]) == 0
    assert saelab.load_sae(tmp_path / "sae-kl").provenance.origin["in_model"]["fvu_weight"] == 0
    assert main(["finetune", str(tmp_path / "sae-kl"), *options, "--name", "kl"]) == 2
    assert "which is left as it is" in capsys.readouterr().err
    new = ["--from-scratch", "--variant", "batch_topk", "--d-sae", "48", "--k", "3"]
    assert main(["finetune", str(tmp_path), *options, *new]) == 0
    assert saelab.load_sae(tmp_path / "sae-end-to-end").d_sae == 48
    capsys.readouterr()
    assert main(["finetune", str(tmp_path / "sae"), *options, "--k", "3"]) == 2
    assert "--k: only with --from-scratch" in capsys.readouterr().err
    assert main(["finetune", str(tmp_path), *options, "--from-scratch", "--variant", "relu"]) == 2
    assert "relu cannot be trained inside a model" in capsys.readouterr().err
