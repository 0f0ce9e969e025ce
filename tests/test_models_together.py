"""Two models read side by side: one cache of both, a crosscoder on it, its report, its features, its steering."""

import json

import pytest
import torch
from conftest import build_tiny_llama

import saelab
from saelab.activation_cache import layout
from saelab.activation_cache.reader import ActivationCache
from saelab.models import load_model
from saelab.models.multi_model import ModelsTogether, hook_keys, locate, together
from saelab.saes.trained_hooks import hooks_of
from saelab.steering import FeatureHandle

HOOK = "blocks.1.hook_resid_post"
A, B = f"tiny-llama/{HOOK}", f"other/{HOOK}"
OPTIONS = {"n_tokens": 4000, "ctx_len": 32, "batch_size": 4, "shard_rows": 512, "pool_shards": 2, "progress": False}


pytestmark = pytest.mark.usefixtures("early_norm_rule")


@pytest.fixture(scope="module")
def other_lm(tmp_path_factory):
    """Other weights, the same tokenizer."""
    folder = build_tiny_llama(tmp_path_factory.mktemp("models") / "other", seed=1)
    return load_model(folder, dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    lines = [json.dumps({"text": f"{i} sheep and {i * i} goats in the field {i} of part {i % 7}"}) for i in range(300)]
    path.write_text("\n".join(lines))
    return saelab.load_texts(str(path))


@pytest.fixture(scope="module")
def cache(tiny_lm, other_lm, texts, tmp_path_factory):
    return saelab.harvest([tiny_lm, other_lm], texts, HOOK, out_dir=tmp_path_factory.mktemp("two") / "cache", **OPTIONS)


@pytest.fixture(scope="module")
def sae(cache, tmp_path_factory):
    config = saelab.TrainConfig(n_tokens=20_000, batch_size=200, warmup_steps=5, checkpoint_every=0)
    folder = tmp_path_factory.mktemp("two") / "sae"
    saelab.train(saelab.saes.CrosscoderConfig(d_sae=64, k=8), cache, config, folder, progress=False)
    return saelab.load_sae(folder)


def test_rows_of_both_models_are_the_same_tokens(cache, tiny_lm, other_lm):
    assert cache.hook_names == [A, B]
    ids, _ = cache.tokens()
    for name, lm in ((A, tiny_lm), (B, other_lm)):
        x, index = next(cache.shards(name))
        acts = next(iter(lm.stream_activations([ids.long()], [HOOK])))[HOOK]
        torch.testing.assert_close(x, acts[index["seq"].long(), index["pos"].long()].bfloat16(), rtol=2e-2, atol=2e-2)
    assert not torch.equal(next(cache.shards(A))[0], next(cache.shards(B))[0])


def test_a_row_goes_when_either_model_masks_it(tiny_lm, other_lm, texts, tmp_path, monkeypatch):
    monkeypatch.setattr("saelab.tokens.mask.NORM_RULE_ROWS", 200)
    monkeypatch.setattr("saelab.tokens.mask.NORM_RULE_FACTOR", 1.2)
    both = saelab.harvest([tiny_lm, other_lm], texts, HOOK, out_dir=tmp_path / "both", **OPTIONS)
    one, two = (
        saelab.harvest(lm, texts, HOOK, out_dir=tmp_path / lm.name[-3:], **OPTIONS) for lm in (tiny_lm, other_lm)
    )
    assert both.n_rows < min(one.n_rows, two.n_rows)
    assert both.manifest["max_norm"] == {A: one.manifest["max_norm"][HOOK], B: two.manifest["max_norm"][HOOK]}
    for name, limit in both.manifest["max_norm"].items():
        norms = torch.cat([x.float().norm(dim=1) for x, _ in both.shards(name)])
        assert float(norms.max()) <= limit * 1.01


def test_stopped_and_repeated_gives_the_same_bytes(cache, tiny_lm, other_lm, texts, tmp_path):
    class Stops(ModelsTogether):
        def _read(self, ids, wanted):
            self.read = getattr(self, "read", 0) + 1
            if self.read == 25:
                raise KeyboardInterrupt
            return super()._read(ids, wanted)

    with pytest.raises(KeyboardInterrupt, match="activations are in"):
        saelab.harvest(Stops([tiny_lm, other_lm]), texts, HOOK, out_dir=tmp_path / "cache", **OPTIONS)
    again = saelab.harvest([tiny_lm, other_lm], texts, HOOK, out_dir=tmp_path / "cache", **OPTIONS)
    files = sorted(p.relative_to(cache.path) for p in cache.path.rglob("*.safetensors"))
    assert len(files) > 5 and files == sorted(p.relative_to(again.path) for p in again.path.rglob("*.safetensors"))
    for file in files:
        assert (cache.path / file).read_bytes() == (again.path / file).read_bytes(), file
    with pytest.raises(ValueError, match="different arguments"):
        saelab.harvest([other_lm, tiny_lm], texts, HOOK, out_dir=tmp_path / "cache", **OPTIONS)


def test_the_estimate_counts_every_model(cache):
    config = cache.manifest["config"]
    size = sum(p.stat().st_size for p in cache.path.rglob("*.safetensors"))
    estimate = layout.estimate_bytes(cache.manifest["n_sequences"], 32, config["hooks"], config["shard_rows"])
    assert size * 0.7 < estimate < size * 1.6


def test_origins_name_the_model_of_each_hook(cache, tiny_lm, other_lm):
    assert cache.origin(A)["model"] == {"name": tiny_lm.name, "hash": tiny_lm.hash}
    assert cache.origin(B)["model"] == {"name": other_lm.name, "hash": other_lm.hash}
    assert list(ActivationCache(cache.path).models) == ["tiny-llama", "other"]


def test_an_sae_of_one_of_the_models_knows_it_by_itself(cache, other_lm, tiny_lm):
    config = saelab.TrainConfig(n_tokens=2000, batch_size=200, checkpoint_every=0)
    sae = saelab.train(saelab.saes.TopKConfig(64, 8), cache, config, hook_name=B, progress=False)
    assert sae.provenance.origin["hook_name"] == HOOK and sae.provenance.origin["model"]["hash"] == other_lm.hash
    assert "models" not in sae.provenance.origin
    assert saelab.evaluate(sae, other_lm, n_tokens_ce=0, progress=False).hook_name == HOOK
    with pytest.warns(UserWarning, match="its weights differ"):
        saelab.evaluate(sae, tiny_lm, n_tokens_ce=0, progress=False)


def test_a_crosscoder_of_two_models_is_measured(sae, tiny_lm, other_lm, cache):
    assert sae.provenance.origin["hook_names"] == [A, B] and list(sae.provenance.origin["models"]) == [
        "tiny-llama",
        "other",
    ]
    report = saelab.evaluate(sae, [tiny_lm, other_lm], n_tokens_ce=300, progress=False)
    assert report.hook_name == f"{A}, {B}" and report.split == "held_out"
    assert report.fvu is not None and report.fvu < 0.9 and report.mask["max_norm"] == cache.manifest["max_norm"]
    options = {"hook_name": HOOK, "texts": _own(sae), "ctx_len": 32, "n_tokens_ce": 300, "split": "held_out"}
    each = [saelab.evaluate(_rebuilder(), lm, progress=False, **options) for lm in (tiny_lm, other_lm)]
    assert report.ce_loss == pytest.approx(sum(one.ce_loss or 0 for one in each) / 2, rel=1e-4)
    assert report.ce_loss_recovered is not None and report.kl is not None and report.kl > 0


def _own(sae):
    return saelab.load_texts(sae.provenance.origin["texts"])


def _rebuilder():
    sae = saelab.saes.ReLUSAE(saelab.saes.ReLUConfig(64, normalize="none"), 32)
    eye = torch.eye(32)
    with torch.no_grad():
        sae.W_enc.copy_(torch.cat([eye, -eye]))
        sae.W_dec.copy_(torch.cat([eye, -eye]))
    return sae


def test_one_model_is_not_enough_and_the_order_matters(sae, tiny_lm, other_lm):
    with pytest.raises(ValueError, match=r"reads 2 models \(tiny-llama, other\): give a list"):
        saelab.evaluate(sae, tiny_lm, progress=False)
    with pytest.warns(UserWarning, match="its weights differ"):
        saelab.evaluate(sae, [other_lm, tiny_lm], n_tokens_ce=0, progress=False)


def test_features_and_steering_are_of_the_last_model(sae, tiny_lm, other_lm, tmp_path):
    store = saelab.collect_features(sae, [tiny_lm, other_lm], out_dir=tmp_path / "features", progress=False)
    assert store.hook_name == B and store.manifest["model"] == {"name": other_lm.name, "hash": other_lm.hash}
    fired = store.table("density", limit=1)[0]["feature"]
    decoder, scale = sae.W_dec[1, fired].detach(), float(sae.scale[1])
    logits = other_lm.logit_weights() @ decoder
    assert store.feature(fired).top_logits.positive[0][1] == pytest.approx(logits.max().item(), rel=1e-4)
    edit = store.feature(fired).add(3.0, unit="raw")
    x = torch.zeros(1, 2, 32)
    torch.testing.assert_close(edit.apply(x, torch.tensor([[0, 1]]))[0, 1], 3 * decoder / scale)
    with other_lm.steer(edit):
        other_lm.logits("The weather")
    first = FeatureHandle(sae, fired, A)
    torch.testing.assert_close(
        first.add(1.0, "raw").apply(x, torch.tensor([[0, 1]]))[0, 1], (sae.W_dec[0, fired] / sae.scale[0]).detach()
    )


def test_models_with_other_tokenizers_are_refused(tiny_lm, tmp_path):
    class Other(type(tiny_lm)):
        tokenizer_hash = "another"

    odd = object.__new__(Other)
    odd.__dict__ |= {k: v for k, v in tiny_lm.__dict__.items() if k != "tokenizer_hash"}
    with pytest.raises(ValueError, match="need the same tokenizer.*another"):
        saelab.harvest([tiny_lm, odd], ["a"], HOOK, 10, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_names_and_hooks(tiny_lm, other_lm):
    both = together([tiny_lm, other_lm, tiny_lm])
    assert isinstance(both, ModelsTogether)
    assert list(both.models) == ["tiny-llama", "other", "tiny-llama--2"]
    assert hook_keys(together([tiny_lm, other_lm]), ["h", "other/g"]) == ["other/g", "tiny-llama/h", "other/h"]
    assert hook_keys(tiny_lm, "h") == ["h"] and together([tiny_lm]) is tiny_lm
    assert locate(both, B) == (other_lm, HOOK) and locate(tiny_lm, HOOK) == (tiny_lm, HOOK)
    assert both.hash != tiny_lm.hash and both.d_in(B) == 32
    for wrong in (HOOK, f"nobody/{HOOK}", "other/"):
        with pytest.raises(ValueError, match="tiny-llama/HOOK or other/HOOK"):
            both.check_hook(wrong)
    with pytest.raises(ValueError, match="blocks.9"):
        both.check_hook("other/blocks.9.hook_resid_post")
    with pytest.raises(ValueError, match="one of them"):
        both.logits("The weather")
    with pytest.raises(ValueError, match="give a language model"):
        together([])


def test_a_steered_model_among_them_is_refused(tiny_lm, other_lm, sae, tmp_path):
    edit = FeatureHandle(sae, 0).add(1.0, "raw")
    with other_lm.steer(edit), pytest.raises(ValueError, match="being steered"):
        saelab.harvest([tiny_lm, other_lm], ["a"], HOOK, 10, tmp_path / "cache")


def test_sites_of_the_trained_crosscoder(sae):
    assert hooks_of(sae).inputs == (A, B) and hooks_of(sae).outputs == (A, B)
