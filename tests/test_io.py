"""`save_sae` and `load_sae`: bit-equal round trip, and refusal of whatever was altered, cut or is too new."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_saes import config_of

from saelab.errors import SaelabError
from saelab.io import load_sae, save_sae
from saelab.saes import VARIANTS, Batch, StepInfo


def build(name="topk"):
    sae: Any = VARIANTS[name](config_of(name, 48), 16, seed=1)
    x = torch.randn(500, 16, generator=torch.Generator().manual_seed(0)) * 4 + 1
    sae.set_normalization(x.mean(0), float(x.square().sum(1).mean()))
    with torch.no_grad():
        if not bool(sae.W_dec.any()):  # a transcoder's decoder starts at 0
            sae.W_dec.add_(torch.randn(sae.W_dec.shape, generator=torch.Generator().manual_seed(1)))
        # sets the threshold of those that have one
        sae.loss(Batch(x, x), StepInfo(torch.zeros(48, dtype=torch.bool), 10, 100))
    sae.provenance = replace(
        sae.provenance, origin={"hook_name": "blocks.1.hook_resid_post", "mask": {"max_norm": 12.5}}
    )
    sae.provenance = replace(sae.provenance, trained={"n_tokens": 5})
    sae.provenance = replace(sae.provenance, train_documents=torch.tensor([3, -9]))
    return sae, x


@pytest.mark.parametrize("name", VARIANTS)
def test_round_trip_is_bit_equal(tmp_path, name):
    sae, x = build(name)
    save_sae(sae, tmp_path / "sae", golden_inputs=x)
    back = load_sae(tmp_path / "sae")
    assert back.hash == sae.hash and back.config == sae.config and type(back) is type(sae)
    assert back.provenance.origin == sae.provenance.origin and back.provenance.trained == sae.provenance.trained
    assert torch.equal(back.provenance.train_documents, sae.provenance.train_documents)
    a, b = sae.encode(x), back.encode(x)
    assert torch.equal(a.values, b.values) and torch.equal(a.features, b.features)
    assert torch.equal(sae.decode(a), back.decode(b))
    assert len(load_file(tmp_path / "sae" / "golden.safetensors")["x"]) == 64


def test_without_golden_inputs_it_makes_its_own(tmp_path):
    sae, _ = build()
    save_sae(sae, tmp_path)
    assert load_sae(tmp_path).hash == sae.hash


@pytest.mark.parametrize("file", ["sae.safetensors", "golden.safetensors"])
def test_a_truncated_file_is_named(tmp_path, file):
    save_sae(*[build()[0], tmp_path])
    path = tmp_path / file
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(SaelabError, match=file):
        load_sae(tmp_path)


def test_altered_weights_are_refused(tmp_path):
    save_sae(build()[0], tmp_path)
    tensors = load_file(tmp_path / "sae.safetensors")
    tensors["W_dec"][0, 0] += 1e-3
    save_file(tensors, tmp_path / "sae.safetensors")
    with pytest.raises(SaelabError, match="altered"):
        load_sae(tmp_path)


def change(folder, **values):
    meta = json.loads((folder / "sae.json").read_text())
    (folder / "sae.json").write_text(json.dumps(meta | values))


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"format_version": 99}, "99.*update saelab"),
        ({"variant": "mystery"}, "mystery.*topk"),
        ({"config": {"d_sae": 48, "k": 2}}, "golden"),
        ({"config": {"d_sae": 50, "k": 2}}, "does not fit"),
    ],
)
def test_a_changed_meaning_is_refused(tmp_path, values, says):
    """A k that was edited changes the codes: the golden inputs show it although the weights are whole."""
    save_sae(build()[0], tmp_path)
    change(tmp_path, **values)
    with pytest.raises(SaelabError, match=says):
        load_sae(tmp_path)


def test_no_sae_there(tmp_path):
    with pytest.raises(SaelabError, match=r"no sae\.json"):
        load_sae(tmp_path)


def test_torn_json_is_named(tmp_path):
    save_sae(build()[0], tmp_path)
    (tmp_path / "sae.json").write_text('{"variant": ')
    with pytest.raises(SaelabError, match=r"sae\.json is not valid JSON"):
        load_sae(tmp_path)


def altered(path, change):
    value = json.loads(path.read_text())
    path.write_text(json.dumps(change(value) or value))


@pytest.mark.parametrize("key", ["format_version", "variant", "d_in", "config", "training", "sae_hash", "golden_hash"])
def test_a_key_that_sae_json_lacks_is_named(tmp_path, key):
    save_sae(build()[0], tmp_path)
    altered(tmp_path / "sae.json", lambda meta: meta.pop(key) and None)
    with pytest.raises(SaelabError, match=key):
        load_sae(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda meta: [1],
        lambda meta: meta.update(format_version="1"),
        lambda meta: meta.update(variant=[]),
        lambda meta: meta.update(config=None),
        lambda meta: meta["config"].update(z=1),
        lambda meta: meta["config"].update(d_sae="48"),
        lambda meta: meta.update(d_in="x"),
    ],
)
def test_foreign_values_in_sae_json_are_refused(tmp_path, change):
    save_sae(build()[0], tmp_path)
    altered(tmp_path / "sae.json", change)
    with pytest.raises(SaelabError, match="sae.json|variant"):
        load_sae(tmp_path)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("name", ["x", "values", "features", "offsets", "x_hat", "train_documents", "of another"])
def test_altered_golden_tensors_are_refused(tmp_path, name, version):
    """The list of training documents among them: without it, nothing would keep evaluation from scoring them."""
    save_sae(build()[0], tmp_path)
    golden = load_file(tmp_path / "golden.safetensors")
    if name == "of another":
        golden["features"] += 40
    else:
        del golden[name]
    save_file(golden, tmp_path / "golden.safetensors")
    if version == 1:
        altered(tmp_path / "sae.json", lambda meta: meta.update(format_version=1))
    with pytest.raises(SaelabError, match=r"golden\.safetensors was altered"):
        load_sae(tmp_path)


def test_emptied_training_documents_are_refused(tmp_path):
    save_sae(build()[0], tmp_path)
    golden = load_file(tmp_path / "golden.safetensors")
    save_file(golden | {"train_documents": golden["train_documents"][:0]}, tmp_path / "golden.safetensors")
    with pytest.raises(SaelabError, match=r"golden\.safetensors was altered: hash"):
        load_sae(tmp_path)


def test_the_public_call_writes_what_load_sae_reads_and_names_the_formats(tmp_path):
    import saelab

    sae, x = build()
    assert saelab.save_sae(sae, tmp_path / "sae", golden_inputs=x) == tmp_path / "sae"
    assert saelab.load_sae(tmp_path / "sae").hash == sae.hash
    with pytest.raises(ValueError, match="format='pickle' is unknown; saelab writes 'saelab'"):
        saelab.save_sae(sae, tmp_path / "other", format="pickle")
    assert not (tmp_path / "other").exists()
