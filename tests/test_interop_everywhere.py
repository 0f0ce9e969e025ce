"""What works on an SAE of our own works on every imported kind: evaluation, feature store, card, steering, training on."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_saes import CASES, D_OUT
from tiny_runs import write_texts

import saelab
from saelab.saes import Batch, StepInfo

HOOK, MLP_OUT, MLP_POST = "blocks.1.hook_resid_post", "blocks.1.hook_mlp_out", "blocks.1.mlp.hook_post"


def kinds(folder: Path) -> dict[str, str]:
    """A case of each combination of variant and switches."""
    found: dict[str, str] = {}
    for i, name in enumerate(CASES):
        sae = saelab.load_sae(CASES[name](folder / str(i)).path)
        names = ("hook_name_out", "hook_names", "k")
        later = {key: value for key, value in dataclasses.asdict(sae.config).items() if key not in names}
        units = [
            sae.config.normalize,
            bool((sae.scale != 1).any()),
            sae.shape,
            bool(sae.provenance.origin.get("partial")),
        ]
        found.setdefault(json.dumps([sae.variant, later, units], default=str), name)
    return found


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts") / "notes.jsonl")


def test_every_kind_everywhere(tmp_path, texts, tiny_lm):
    several = kinds(tmp_path / "kinds")
    assert len(several) >= 25
    for name in several.values():
        try:
            _works(name, tmp_path / name.replace("/", " "), texts, tiny_lm)
        except Exception as error:
            raise AssertionError(name) from error


def _works(name: str, folder: Path, texts: Path, lm: Any) -> None:
    foreign = CASES[name](folder / "files")
    sae: Any = saelab.load_sae(foreign.path)
    transcodes = "d_out" in sae.extra_dims
    wide = transcodes and sae.d_out == D_OUT
    hooks: dict[str, Any] = {"hook_name": HOOK, "prepend_bos": False, "ctx_len": 32}
    hooks |= {"hook_name_out": MLP_POST if wide else MLP_OUT} if transcodes else {}
    if sae.variant == "crosscoder":
        hooks = {"hook_names": [HOOK, "blocks.2.hook_resid_post"], "prepend_bos": False, "ctx_len": 32}
    sae = saelab.load_sae(foreign.path, assume=hooks)
    store = saelab.collect_features(sae, lm, texts, out_dir=folder / "features", n_tokens=300, progress=False)
    fired = int(store.column("density").argmax())
    feature = store.feature(fired)
    assert feature.examples(3) and "<" in feature._repr_html_()
    if foreign.partial or wide:  # a hook of that width is read through a bridge, where nothing is edited
        return
    report = saelab.evaluate(sae, lm, texts, n_tokens=300, n_tokens_ce=64, progress=False)
    assert report.l0 > 0 and report.fvu is not None and report.fvu >= 0
    before = lm.logits("a text")
    with lm.steer(feature * 2.0):
        assert not torch.equal(lm.logits("a text"), before)
    _trains_on(sae)


def _trains_on(sae: Any) -> None:
    """A loss with a gradient for the weights that decode."""
    x = torch.randn(16, sae.d_in, generator=torch.Generator().manual_seed(0))
    x = torch.stack([x, x], 1) if sae.variant == "crosscoder" else x
    y = x @ torch.ones(sae.d_in, sae.d_out) / sae.d_in if "d_out" in sae.extra_dims else x
    loss = sae.loss(Batch(x, y), StepInfo(torch.zeros(sae.d_sae, dtype=torch.bool), 10, 100))
    loss.total.backward()
    assert bool(loss.total.isfinite()) and float(sae.W_dec.grad.abs().sum()) > 0
