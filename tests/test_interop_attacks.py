"""What would be read or written wrongly in silence is refused by name: damaged numbers, configs that contradict their tensors,
answers of the wrong kind, folders that hold something else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_saes import build, rows

import saelab
from saelab.errors import SaelabError
from saelab.interop.names import model_id, module_of_hook

WEIGHTS = {"sae_lens": "sae_weights.safetensors", "sparsify": "sae.safetensors", "gemma_scope_2": "params.safetensors"}
CONFIG = {"sae_lens": "cfg.json", "sparsify": "cfg.json", "gemma_scope_2": "config.json"}
HOOK_OUT = "blocks.1.hook_mlp_out"


def written(variant: str, format: str, folder: Path) -> Path:
    sae = build(variant, "none")
    if variant.endswith("transcoder"):
        sae.provenance.origin.update({"hook_name": "blocks.1.mlp.hook_in", "hook_name_out": HOOK_OUT})
    return saelab.save_sae(sae, folder / "sae", format=format)


def with_tensor(folder: Path, format: str, name: str, change) -> None:
    path = folder / WEIGHTS[format]
    tensors = load_file(path)
    tensors[name] = change(tensors.get(name)).contiguous()
    save_file(tensors, path)


def with_config(folder: Path, format: str, **changes) -> None:
    path = folder / CONFIG[format]
    cfg = json.loads(path.read_text())
    cfg = {key: value for key, value in (cfg | changes).items() if value != "remove"}
    path.write_text(json.dumps(cfg))


def nan(tensor):
    return tensor.index_fill(0, torch.tensor([0]), torch.nan)


TENSORS = {
    "a NaN threshold": ("jumprelu", "sae_lens", "threshold", nan, "threshold holds NaN"),
    "a NaN threshold of Gemma Scope": ("jumprelu", "gemma_scope_2", "threshold", nan, "threshold holds NaN"),
    "a gate's infinite bias": ("gated", "sae_lens", "b_mag", lambda t: t + torch.inf, "b_mag hold NaN or infinite"),
    "a NaN skip": ("skip_transcoder", "sparsify", "W_skip", nan, "W_skip hold NaN"),
    "too few thresholds": (
        "jumprelu",
        "sae_lens",
        "threshold",
        lambda t: t[:-1],
        "threshold has shape .39,., but one number",
    ),
    "no thresholds": ("jumprelu", "gemma_scope_2", "threshold", lambda t: t[:0], "threshold has shape"),
    "integers": (
        "relu",
        "sae_lens",
        "W_enc",
        lambda t: t.int(),
        "W_enc as int32, strided, but weights",
    ),
    "a skip that is left out": ("topk", "sparsify", "W_skip", lambda _: torch.eye(12), "also holds W_skip"),
    "a threshold that is left out": ("relu", "sae_lens", "threshold", lambda _: torch.ones(40), "also holds threshold"),
}


@pytest.mark.parametrize("name", TENSORS)
def test_damaged_tensors_are_named(tmp_path, name):
    variant, format, tensor, change, said = TENSORS[name]
    folder = written(variant, format, tmp_path)
    with_tensor(folder, format, tensor, change)
    with pytest.raises(SaelabError, match=said):
        saelab.load_sae(folder)


CONFIGS = {
    "no architecture of a jumprelu": ("jumprelu", "sae_lens", {"architecture": "remove"}, "also holds threshold"),
    "another width": ("topk", "sae_lens", {"d_in": 17}, "says d_in=17, but the tensors have 12"),
    "another size": ("relu", "sae_lens", {"d_sae": 41}, "says d_sae=41, but the tensors have 40"),
    "another width of sparsify": ("topk", "sparsify", {"d_in": -1}, "says d_in=-1"),
    "a word for a switch": (
        "relu",
        "sae_lens",
        {"apply_b_dec_to_input": "many"},
        "apply_b_dec_to_input='many', but true",
    ),
    "a word for transcode": ("topk", "sparsify", {"transcode": "no"}, "transcode='no'"),
    "no word of the skip": ("skip_transcoder", "sparsify", {"skip_connection": None}, "also holds W_skip"),
    "a k that is a switch": ("topk", "sae_lens", {"k": True}, "k=True, but a whole number"),
    "a broken k": ("topk", "sparsify", {"k": 3.7}, "k=3.7, but a whole number"),
    "no k at all": ("topk", "sae_lens", {"k": 0}, "k=0, but a whole number"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_that_contradict_are_named(tmp_path, name):
    variant, format, changes, said = CONFIGS[name]
    folder = written(variant, format, tmp_path)
    with_config(folder, format, **changes)
    with pytest.raises(SaelabError, match=said):
        saelab.load_sae(folder)


def test_null_is_the_default_of_a_switch(tmp_path):
    folder = written("relu", "sae_lens", tmp_path)
    with_config(folder, "sae_lens", apply_b_dec_to_input=True)
    before = saelab.load_sae(folder)(rows(8)).x_hat
    with_config(folder, "sae_lens", apply_b_dec_to_input=None)
    assert torch.equal(saelab.load_sae(folder)(rows(8)).x_hat, before)


ANSWERS = [
    ({"k": True}, "whole number"),
    ({"k": "four"}, "whole number"),
    ({"k": 0}, "whole number"),
    ({"threshold": 1.0}, "a topk has no use"),
    ({"scale": 0}, "above 0"),
    ({"scale": float("nan")}, "above 0"),
    ({"scale": None}, "above 0"),
    ({"scale": "x"}, "above 0"),
    ({"pre_bias": "no"}, "True or False"),
    ({"pre_bias": None}, "True or False"),
    ({"normalize": "scale"}, "one of none, layer_norm"),
    ({"variant": "codebook"}, "one of topk"),
    ({"variant": None}, "one of topk"),
    ({"variant": ["a"]}, "one of topk"),
    ({"hook_name": 3}, "the name of a hook"),
    ({"hook_names": []}, "a list of names"),
    ({"hook_names": 3}, "a list of names"),
    ({"prepend_bos": "maybe"}, "True, False or a list"),
    ({"ctx_len": -1}, "whole number"),
    ({"model": None}, "the name of a model"),
    ({"scale_out": 2.0}, "a topk has no use"),
    ({"signed": True}, "a topk has no use"),
    ({"residual_threshold": 0.1}, "has no use"),
    ({"kk": 3}, "assume has 'kk'"),
]


@pytest.mark.parametrize(("given", "said"), ANSWERS, ids=str)
def test_answers_of_the_wrong_kind_are_named(tmp_path, given, said):
    folder = written("topk", "sparsify", tmp_path)
    with pytest.raises((ValueError, SaelabError), match=said):
        saelab.load_sae(folder, assume=given)


@pytest.mark.parametrize(
    "format", ["dictionary_learning", "qwen_scope", "mwhanna", "mntss", "openai", "sparsify", "goodfire"]
)
def test_a_format_that_is_not_there_is_refused(tmp_path, format):
    folder = written("topk", "sae_lens", tmp_path)
    (tmp_path / "empty").mkdir()
    for place in (folder, tmp_path / "empty"):
        with pytest.raises(SaelabError):
            saelab.load_sae(place, format=format)


@pytest.mark.parametrize("variant", ["batch_topk", "matryoshka", "mutual_choice", "feature_choice"])
@pytest.mark.parametrize("format", ["sae_lens", "gemma_scope_2", "dictionary_learning"])
def test_a_threshold_below_zero_is_not_written(tmp_path, variant, format):
    sae = build(variant, "none")
    sae.threshold.fill_(-0.3)
    with pytest.raises(SaelabError, match="threshold below 0|cannot hold"):
        saelab.save_sae(sae, tmp_path / "new" / "sae", format=format)
    assert not (tmp_path / "new").exists()


def test_refusals_leave_no_folder(tmp_path):
    with pytest.raises(SaelabError, match="cannot hold"):
        saelab.save_sae(build("topk", "none"), tmp_path / "new" / "sae", format="gemma_scope_2")
    with pytest.raises(SaelabError, match="hook_name_out"):
        saelab.save_sae(build("relu_transcoder", "none"), tmp_path / "new" / "sae", format="gemma_scope_2")
    sae = build("relu", "none")
    with torch.no_grad():
        sae.W_dec[0, 0] = torch.nan
    with pytest.raises(SaelabError, match="W_dec hold NaN"):
        saelab.save_sae(sae, tmp_path / "new" / "sae", format="sae_lens")
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(SaelabError, match="there is a file where a folder must be"):
        saelab.save_sae(build("relu", "none"), tmp_path / "file" / "sae", format="sae_lens")
    with pytest.raises(ValueError, match="is unknown"):
        saelab.save_sae(build("relu", "none"), tmp_path / "x", format="nothing")


@pytest.mark.parametrize("first", ["saelab", "sae_lens", "sparsify", "dictionary_learning"])
@pytest.mark.parametrize("second", ["saelab", "sae_lens", "sparsify", "dictionary_learning"])
def test_two_formats_do_not_share_a_folder(tmp_path, first, second):
    sae = build("topk", "none")
    folder = saelab.save_sae(sae, tmp_path / "sae", format=first)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    if first == second:
        saelab.save_sae(sae, folder, format=second)
        return
    with pytest.raises(SaelabError, match=f"already holds an SAE in the format {first}"):
        saelab.save_sae(sae, folder, format=second)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_folder_with_two_formats_says_so(tmp_path):
    folder = saelab.save_sae(build("topk", "none"), tmp_path / "sae")
    other = saelab.save_sae(build("relu", "none"), tmp_path / "other", format="sae_lens")
    for path in other.iterdir():
        path.rename(folder / path.name)
    with pytest.raises(SaelabError, match="several formats .saelab, sae_lens"):
        saelab.load_sae(folder)
    assert saelab.load_sae(folder, format="saelab").variant == "topk"


def test_a_file_of_ones_own_format_is_as_good_as_its_folder(tmp_path):
    folder = saelab.save_sae(build("topk", "none"), tmp_path / "sae")
    for name in ("sae.json", "sae.safetensors"):
        assert saelab.load_sae(folder / name).hash == saelab.load_sae(folder).hash


def test_names_of_modules_follow_the_family():
    assert (
        module_of_hook("blocks.3.hook_mlp_out", "google/gemma-3-270m")
        == "model.layers.3.post_feedforward_layernorm.output"
    )
    assert module_of_hook("blocks.3.hook_mlp_out", "smollm2") == "model.layers.3.mlp.output"
    assert (
        module_of_hook("blocks.3.mlp.hook_in", "gemma-v3-270m-pt") == "model.layers.3.pre_feedforward_layernorm.output"
    )
    assert module_of_hook("blocks.3.hook_resid_post", None) == "model.layers.3.output"
    assert model_id("smollm2") == "smollm2" and model_id("SmolLM2-135M") == "HuggingFaceTB/SmolLM2-135M"
