"""`save_sae` and `load_sae`: bit-equal round trip, and refusal of whatever was altered, cut or is too new."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from saelab.errors import SaelabError
from saelab.io import load_sae, save_sae
from saelab.saes import VARIANTS, ReLUConfig, TopKConfig

CONFIGS = {"topk": TopKConfig(48, 6), "relu": ReLUConfig(48)}


def build(name="topk"):
    sae = VARIANTS[name](CONFIGS[name], 16, seed=1)
    x = torch.randn(500, 16, generator=torch.Generator().manual_seed(0)) * 4 + 1
    sae.set_normalization(x.mean(0), float(x.square().sum(1).mean()))
    sae.origin = {"hook_name": "blocks.1.hook_resid_post", "mask": {"max_norm": 12.5}}
    sae.trained = {"n_tokens": 5}
    sae.train_documents = torch.tensor([3, -9])
    return sae, x


@pytest.mark.parametrize("name", VARIANTS)
def test_round_trip_is_bit_equal(tmp_path, name):
    sae, x = build(name)
    save_sae(sae, tmp_path / "sae", x)
    back = load_sae(tmp_path / "sae")
    assert back.hash == sae.hash and back.config == sae.config and type(back) is type(sae)
    assert back.origin == sae.origin and back.trained == sae.trained
    assert torch.equal(back.train_documents, sae.train_documents)
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
