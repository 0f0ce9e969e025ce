"""The same call with another tokenizer, dtype, text or context length never returns the earlier result."""

from __future__ import annotations

import json
import warnings
from typing import Any

import pytest
import torch
from conftest import build_tokenizer
from tokenizers.normalizers import Lowercase

import saelab
from saelab.errors import SaelabError
from saelab.identity import ANY, differences
from saelab.saes import TopKConfig, TopKSAE

HOOK = "blocks.1.hook_resid_post"
TEXTS = [f"The river runs past the old mill, {n} times; she said it was sold to the man." for n in range(40)]


def other_tokenizer():
    tokenizer = build_tokenizer()
    tokenizer.backend_tokenizer.normalizer = Lowercase()
    return tokenizer


def changed(lm, what: str) -> tuple[Any, dict[str, Any]]:
    """The model, and the arguments, of the second call."""
    if what == "tokenizer":
        return saelab.load_model(lm.name, other_tokenizer(), dtype=torch.float32, device="cpu"), {}
    if what == "dtype":
        return saelab.load_model(lm.name, dtype=torch.bfloat16, device="cpu"), {}
    if what == "weights":
        other = saelab.load_model(lm.model, lm.tokenizer, dtype=torch.float64)
        with torch.no_grad():
            next(other.model.parameters()).mul_(1.5)
        return saelab.load_model(other.model.float(), lm.tokenizer), {}
    return lm, {"texts": TEXTS[1:]} if what == "texts" else {"ctx_len": 48}


def harvest(lm, folder, texts=TEXTS, ctx_len=32):
    return saelab.harvest(
        lm, texts, hook_names=[HOOK], n_tokens=400, out_dir=folder, ctx_len=ctx_len, batch_size=2, progress=False
    )


def collect(lm, folder, texts=TEXTS, ctx_len=32):
    sae = TopKSAE(TopKConfig(16, 2, normalize="none"), 32)
    return saelab.collect_features(
        sae, lm, texts, out_dir=folder, hook_name=HOOK, ctx_len=ctx_len, batch_size=2, progress=False
    )


def train(lm, folder, texts=TEXTS, ctx_len=32):
    cache = harvest(
        lm,
        folder.with_name(f"cache-{lm.tokenizer_hash[:4]}{lm.hash[:4]}{lm.dtype}{len(texts)}{ctx_len}"),
        texts,
        ctx_len,
    )
    config = saelab.TrainConfig(n_tokens=128, batch_size=64, device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return saelab.train(TopKConfig(16, 2), cache, config, folder, progress=False)


REFUSING = {"harvest": harvest, "collect_features": collect, "train": train}
CHANGES = ["tokenizer", "dtype", "weights", "texts", "ctx_len"]


@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.parametrize("call", REFUSING)
def test_a_folder_made_another_way_is_refused(tiny_lm, tmp_path, call, what):
    REFUSING[call](tiny_lm, tmp_path / "out")
    lm, more = changed(tiny_lm, what)
    with pytest.raises((ValueError, SaelabError), match=r"other arguments|another run"):
        REFUSING[call](lm, tmp_path / "out", **more)
    REFUSING[call](tiny_lm, tmp_path / "out")  # the same call is answered as before


@pytest.mark.parametrize("what", CHANGES)
def test_a_report_made_another_way_is_measured_again(tiny_lm, tmp_path, what):
    def evaluate(lm, texts=TEXTS, ctx_len=32):
        sae = TopKSAE(TopKConfig(16, 2, normalize="none"), 32)
        path = tmp_path / "report.json"
        return saelab.evaluate(
            sae, lm, texts, hook_name=HOOK, ctx_len=ctx_len, n_tokens_ce=64, batch_size=2, path=path, progress=False
        )

    first = evaluate(tiny_lm)
    path = tmp_path / "report.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"cosine": 0.125}))
    assert evaluate(tiny_lm).cosine == 0.125  # the same call is answered from the file
    lm, more = changed(tiny_lm, what)
    assert evaluate(lm, **more).cosine != 0.125
    assert first.request != json.loads(path.read_text())["request"]


def test_another_tokenizer_than_the_sae_was_trained_with_is_named(tiny_lm, tmp_path):
    sae = train(tiny_lm, tmp_path / "sae")
    assert sae.origin["tokenizer_hash"] == tiny_lm.tokenizer_hash
    other = saelab.load_model(tiny_lm.model, other_tokenizer())
    with pytest.warns(UserWarning) as warned:
        saelab.evaluate(sae, other, ["The weather"] * 4, n_tokens_ce=16, progress=False)
    assert any("on other tokens its numbers mean little" in str(one.message) for one in warned)


def test_a_key_that_came_later_means_what_its_absence_meant():
    assert differences({"a": 1}, {"a": 1, "b": 2}) == ["b: (none) -> 2"]
    assert differences({"a": 1}, {"a": 1, "b": 2}, {"b": 2}) == []
    assert differences({"a": 1}, {"a": 1, "b": 2}, {"b": 3}) == ["b: 3 -> 2"]
    assert differences({"a": 1}, {"a": 1, "b": 2}, {"b": ANY}) == []
    assert differences({"a": 1}, {"a": 1, "b": {"c": 2}}, {"b": ANY}) == []
    assert differences({"b": {"c": 1}}, {"b": {"c": 2}}, {"b": ANY}) == ["b.c: 1 -> 2"]
