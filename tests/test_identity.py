"""The same call with another tokenizer, dtype, text or context length never returns the earlier result."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import build_tokenizer
from tokenizers.normalizers import Lowercase
from transformers import LlamaConfig

import saelab
from saelab.activation_cache.streaming import stream
from saelab.errors import SaelabError
from saelab.identity import ANY, differences
from saelab.models.hashing import checksum, hash_model, hash_tokenizer, hash_tokenizer_files
from saelab.saes import AbsTopKConfig, MatchingPursuitConfig, TopKConfig, TopKSAE
from saelab.tokens.mask import MASK_RULE
from saelab.training.sae_run import variant_of

HOOK = "blocks.1.hook_resid_post"
TEXTS = [f"The river runs past the old mill, {n} times; she said it was sold to the man." for n in range(40)]


def other_tokenizer():
    tokenizer = build_tokenizer()
    tokenizer.backend_tokenizer.normalizer = Lowercase()
    return tokenizer


def swapped_roles():
    """The same content, the same special tokens; what was BOS is EOS."""
    tokenizer = build_tokenizer()
    tokenizer.bos_token, tokenizer.eos_token = tokenizer.eos_token, tokenizer.bos_token
    return tokenizer


def changed(lm, what: str, monkeypatch) -> tuple[Any, dict[str, Any]]:
    """The model, and the arguments, of the second call."""
    if what in ("tokenizer", "roles"):
        tokenizer = other_tokenizer() if what == "tokenizer" else swapped_roles()
        return saelab.load_model(lm.name, tokenizer, dtype=torch.float32, device="cpu"), {}
    if what == "dtype":
        return saelab.load_model(lm.name, dtype=torch.bfloat16, device="cpu"), {}
    if what == "config":
        other = copy.deepcopy(lm.model)
        config = LlamaConfig(**{**other.config.to_dict(), "rms_norm_eps": 0.1})
        reset = type(other)(config).eval()
        reset.load_state_dict(other.state_dict())
        return saelab.load_model(reset, lm.tokenizer), {}
    if what == "weights":
        other = saelab.load_model(lm.model, lm.tokenizer, dtype=torch.float64)
        return saelab.load_model(other.model.float(), lm.tokenizer), {}
    more = {
        "texts": {"texts": TEXTS[1:]},
        "ctx_len": {"ctx_len": 48},
        "hook": {"hook": "blocks.0.hook_resid_post"},
        "bos": {"bos": True},
    }
    if what == "mask":
        monkeypatch.setattr("saelab.identity.MASK_RULE", {**MASK_RULE, "norm_factor": 6.0})
    else:
        in_place(lm, what)
    return lm, more.get(what, {})


def in_place(lm, what: str) -> None:
    """Change the model at hand, after its hash was taken."""
    weight = next(lm.model.parameters())
    with torch.no_grad():
        if what == "weights in place":
            weight.mul_(1.5)
        elif what == "weight.data":
            weight.data.mul_(1.5)
        elif what == "one row of weight.data":
            weight.data[lm.to_ids("the")[0, 0]] = 5.0
        elif what == "a hook of the user's":
            lm.model.model.layers[0].register_forward_hook(lambda module, args, output: 1.5 * output)
        elif what == "EOS in place":
            lm.tokenizer.eos_token = "<s>"
        elif what == "a token made special":
            lm.tokenizer.add_special_tokens({"additional_special_tokens": ["\u0120the"]})
        elif what == "special tokens written out are split":
            lm.tokenizer.split_special_tokens = True
        elif what == "tokenizer in place":
            lm.tokenizer.backend_tokenizer.normalizer = Lowercase()


def scored_sae(bos):
    sae = TopKSAE(TopKConfig(16, 2, normalize="none"), 32)
    sae.provenance = replace(sae.provenance, origin={"prepend_bos": bos})
    return sae


def harvest(lm, folder, texts=TEXTS, ctx_len=32, hook=HOOK, bos=None):
    options = {"ctx_len": ctx_len, "batch_size": 2, "prepend_bos": bos, "progress": False}
    return saelab.harvest(lm, texts, hook_names=[hook], n_tokens=400, out_dir=folder, **options)


def collect(lm, folder, texts=TEXTS, ctx_len=32, hook=HOOK, bos=False):
    options = {"hook_name": hook, "ctx_len": ctx_len, "batch_size": 2, "progress": False}
    return saelab.collect_features(scored_sae(bos), lm, texts, out_dir=folder, **options)


def train(lm, folder, **options):
    return trained(harvest(lm, folder.with_name(f"cache-{len(list(folder.parent.iterdir()))}"), **options), folder)


def train_streaming(lm, folder, texts=TEXTS, ctx_len=32, hook=HOOK, bos=None):
    options = {"ctx_len": ctx_len, "batch_size": 2, "prepend_bos": bos}
    return trained(stream(lm, texts, hook, shard_rows=64, pool_shards=2, **options), folder)


def trained(data, folder):
    config = saelab.TrainConfig(n_tokens=128, batch_size=64, device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return saelab.train(TopKConfig(16, 2), data, config, folder, progress=False)


REFUSING = {
    "harvest": harvest,
    "collect_features": collect,
    "train": train,
    "train on a stream": train_streaming,
}
CHANGES = ["tokenizer", "roles", "dtype", "weights", "texts", "ctx_len", "hook", "bos", "mask"]
CHANGES += ["weights in place", "weight.data", "one row of weight.data", "config", "a hook of the user's"]
CHANGES += ["tokenizer in place", "EOS in place", "a token made special", "special tokens written out are split"]


@pytest.fixture
def lm(tiny_folder):
    """A model of its own, whose hashes were taken: some tests write to it."""
    lm = saelab.load_model(tiny_folder, dtype=torch.float32, device="cpu")
    assert lm.hash and lm.tokenizer_hash
    return lm


@pytest.fixture(scope="module")
def made(tiny_lm, tmp_path_factory):
    """A folder of each call."""
    folders = {call: tmp_path_factory.mktemp("made") / "out" for call in REFUSING}
    for call, folder in folders.items():
        REFUSING[call](tiny_lm, folder)
    return folders


# A stream is known by a hash, and the probe of a model, the same on no two machines to the last digit, is no part of it.
UNSEEN = {("train on a stream", "a hook of the user's")}
PAIRS = [(call, what) for call in REFUSING for what in CHANGES if (call, what) not in UNSEEN]


@pytest.mark.parametrize("call, what", PAIRS)
def test_a_folder_made_another_way_is_refused(lm, made, call, what, monkeypatch):
    other, more = changed(lm, what, monkeypatch)
    with pytest.raises((ValueError, SaelabError), match=r"different arguments|holds the activations"):
        REFUSING[call](other, made[call], **more)


@pytest.mark.parametrize("call", REFUSING)
def test_a_folder_that_refused_others_answers_the_same_call(lm, made, call):
    before = {path: path.stat().st_mtime_ns for path in made[call].rglob("*.safetensors")}
    REFUSING[call](lm, made[call])
    assert before == {path: path.stat().st_mtime_ns for path in made[call].rglob("*.safetensors")}


def score(lm, path, texts=TEXTS, ctx_len=32, hook=HOOK, bos=False):
    options = {"hook_name": hook, "ctx_len": ctx_len, "n_tokens_ce": 64, "batch_size": 2, "progress": False}
    return saelab.evaluate(scored_sae(bos), lm, texts, path=path, **options)


@pytest.fixture(scope="module")
def report(tiny_lm, tmp_path_factory):
    """A report on disk; its cosine is changed, so that an answer from the file is known."""
    path = tmp_path_factory.mktemp("report") / "report.json"
    score(tiny_lm, path)
    return json.dumps(json.loads(path.read_text()) | {"cosine": 0.125})


@pytest.mark.parametrize("what", CHANGES)
def test_a_report_made_another_way_is_measured_again(lm, report, tmp_path, what, monkeypatch):
    path = tmp_path / "report.json"
    path.write_text(report)
    assert score(lm, path).cosine == 0.125
    other, more = changed(lm, what, monkeypatch)
    assert score(other, path, **more).cosine != 0.125
    assert json.loads(report)["request"] != json.loads(path.read_text())["request"]


SAME_WEIGHTS = {
    "config": (TopKConfig(16, 2, normalize="none"), TopKConfig(16, 4, normalize="none")),
    "variant": (TopKConfig(16, 2, normalize="none"), AbsTopKConfig(16, 2, normalize="none")),
    "signed": (MatchingPursuitConfig(16, 2, normalize="none"), MatchingPursuitConfig(16, 2, True, normalize="none")),
}


@pytest.mark.parametrize("what", SAME_WEIGHTS)
def test_the_same_weights_under_another_config_are_another_sae(lm, tmp_path, what):
    pair = [variant_of(config)(config, 32) for config in SAME_WEIGHTS[what]]
    assert pair[0].hash == pair[1].hash
    options = {"hook_name": HOOK, "ctx_len": 32, "batch_size": 2, "progress": False}
    reports = [
        saelab.evaluate(sae, lm, TEXTS, path=tmp_path / "report.json", n_tokens_ce=64, **options) for sae in pair
    ]
    assert reports[1] == saelab.evaluate(pair[1], lm, TEXTS, n_tokens_ce=64, **options) != reports[0]
    saelab.collect_features(pair[0], lm, TEXTS, out_dir=tmp_path / "store", **options)
    with pytest.raises(SaelabError, match="sae[.](config|variant).* -> "):
        saelab.collect_features(pair[1], lm, TEXTS, out_dir=tmp_path / "store", **options)


def test_what_lies_in_a_folder_now_is_not_the_model_that_was_loaded_from_it(lm, tiny_folder, tmp_path):
    copied = tmp_path / "model"
    shutil.copytree(tiny_folder, copied)
    loaded = saelab.load_model(copied, dtype=torch.float32)
    other = copy.deepcopy(loaded.model)
    next(other.parameters()).data.mul_(2)
    other.save_pretrained(copied)
    assert loaded.hash == saelab.load_model(loaded.model, lm.tokenizer).hash
    assert loaded.hash != saelab.load_model(copied, dtype=torch.float32).hash


def test_quantised_weights_are_hashed():
    def hashed(factor):
        torch.manual_seed(0)
        layer = torch.nn.Linear(8, 8)
        layer.weight.data.mul_(factor)
        linear = torch.nn.Sequential(layer)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return hash_model(torch.ao.quantization.quantize_dynamic(linear, {torch.nn.Linear}, dtype=torch.qint8))

    assert hashed(1.0) == hashed(1.0) != hashed(-1.0)


def test_two_numbers_that_change_places_change_the_checksum():
    linear = torch.nn.Linear(7, 3)
    seen = {checksum(linear)}
    for one, other in ((0, 1), (2, 12), (5, 20)):
        flat = linear.weight.data.view(-1)
        flat[[one, other]] = flat[[other, one]]
        seen.add(checksum(linear))
    assert len(seen) == 4


def test_the_merges_of_a_tokenizer_that_only_python_runs_count(tmp_path):
    def tokenizer(merges):
        from transformers import CTRLTokenizer

        vocab, file = tmp_path / "vocab.json", tmp_path / "merges.txt"
        vocab.write_text(json.dumps({token: n for n, token in enumerate(["<unk>", "a", "b", "ab", "a@@", "b@@"])}))
        file.write_text("#version: 0.2\n" + merges)
        return CTRLTokenizer(vocab, file)

    one, same, other = tokenizer("a b</w> 1\n"), tokenizer("a b</w> 1\n"), tokenizer("b a</w> 1\n")
    assert hash_tokenizer(one) == hash_tokenizer(other)
    assert hash_tokenizer_files(one) == hash_tokenizer_files(same) != ""
    assert hash_tokenizer_files(one) != hash_tokenizer_files(other)
    assert hash_tokenizer_files(build_tokenizer()) == hash_tokenizer_files(None) == ""


def test_another_tokenizer_than_the_sae_was_trained_with_is_named(tiny_lm, tmp_path):
    sae = train(tiny_lm, tmp_path / "sae")
    assert sae.provenance.origin["tokenizer_hash"] == tiny_lm.tokenizer_hash
    other = saelab.load_model(tiny_lm.model, other_tokenizer())
    with pytest.warns(UserWarning) as warned:
        saelab.evaluate(sae, other, ["The weather"] * 4, n_tokens_ce=16, progress=False)
    assert any("with other tokens, results mean little" in str(one.message) for one in warned)


def test_a_key_that_came_later_means_what_its_absence_meant():
    assert differences({"a": 1}, {"a": 1, "b": 2}) == ["b: (none) -> 2"]
    assert differences({"a": 1}, {"a": 1, "b": 2}, {"b": 2}) == []
    assert differences({"a": 1}, {"a": 1, "b": 2}, {"b": 3}) == ["b: 3 -> 2"]
    assert differences({"a": 1}, {"a": 1, "b": 2}, {"b": ANY}) == []
    assert differences({"a": 1}, {"a": 1, "b": {"c": 2}}, {"b": ANY}) == []
    assert differences({"logits_probe": [0.5, 1.0]}, {"logits_probe": [0.5004, 1.0]}) == []
    assert differences({"logits_probe": [0.5, 1.0]}, {"logits_probe": [0.52, 1.0]})
    halves = {"model_dtype": "bfloat16"}
    assert differences({"logits_probe": [0.5, 1.0], **halves}, {"logits_probe": [0.52, 1.0], **halves}) == []
    assert differences({"b": {"c": 1}}, {"b": {"c": 2}}, {"b": ANY}) == ["b.c: 1 -> 2"]
