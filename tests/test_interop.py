"""SAEs of other libraries: what saelab reads from their files computes what those libraries compute."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_saes import CASES, D_IN, D_SAE, Foreign
from safetensors.torch import load_file, save_file

import saelab
from saelab.cli import main
from saelab.edits.feature_handle import FeatureHandle
from saelab.errors import SaelabError
from saelab.interop import reading
from saelab.interop.formats import FORMATS
from saelab.interop.releases import Release, known, releases, search

every = pytest.mark.parametrize("name", CASES)


def tokens(n: int = 200) -> torch.Tensor:
    """Of sizes from 0.3 to 10, with a mean."""
    generator = torch.Generator().manual_seed(7)
    sizes = torch.logspace(-0.5, 1, n)[torch.randperm(n, generator=generator)]
    return sizes[:, None] * torch.randn(n, D_IN, generator=generator) + 0.5


def close(got: torch.Tensor, want: torch.Tensor) -> bool:
    """To 1e-5 of the size of the whole."""
    return float((got - want).norm()) <= 1e-5 * float(want.norm())


@every
@torch.no_grad()
def test_it_computes_what_its_library_computes(name, tmp_path):
    foreign: Foreign = CASES[name](tmp_path / "sae")
    sae, x = saelab.load_sae(foreign.path, assume=foreign.assume), foreign.inputs(tokens())
    acts, x_hat = foreign.run(x)
    output = sae(x)
    assert close(output.acts.to_dense(), acts) and close(output.x_hat, x_hat)
    assert torch.equal(output.acts.to_dense() != 0, acts != 0)
    assert 1 < float((acts != 0).sum(1).float().mean()) < D_SAE


@every
def test_its_format_is_found_and_recorded(name, tmp_path):
    foreign: Foreign = CASES[name](tmp_path / "sae")
    origin = saelab.load_sae(foreign.path, assume=foreign.assume).provenance.origin
    imported = origin["imported"]
    assert imported["format"] == foreign.format and imported["source"] == str(foreign.path)
    assert set(imported["assumed"]) == set(foreign.assumed)
    assert {key: origin.get(key) for key in foreign.origin} == foreign.origin
    assert bool(origin.get("partial")) == foreign.partial
    assert len(imported["weights_sha256"]) == 64


@every
def test_it_is_saved_and_opened_as_any_other(name, tmp_path):
    foreign: Foreign = CASES[name](tmp_path / "sae")
    sae, x = saelab.load_sae(foreign.path, assume=foreign.assume), foreign.inputs(tokens())
    again = saelab.load_sae(saelab.save_sae(sae, tmp_path / "copy"))
    assert again.hash == sae.hash and torch.equal(again(x).x_hat, sae(x).x_hat)
    assert again.selection_rule == sae.selection_rule and again.provenance.origin == sae.provenance.origin


def test_every_format_has_a_case(tmp_path):
    assert {CASES[name](tmp_path / str(i)).format for i, name in enumerate(CASES)} == set(FORMATS)


# Bad input: one sentence each, with the fix, and nothing is read half.


def edit_json(path: Path, **changes: Any) -> None:
    known = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in (known | changes).items() if value is not None}))


def edit_tensors(path: Path, **changes: torch.Tensor | None) -> None:
    known = load_file(path) | changes
    save_file({name: tensor.contiguous() for name, tensor in known.items() if tensor is not None}, path)


def write(name: str, tmp_path: Path) -> Path:
    return CASES[name](tmp_path / "sae").path


class Runs:
    """A pickle of it touches a file when it is loaded."""

    def __init__(self, touched: Path) -> None:
        self.touched = touched

    def __reduce__(self) -> Any:
        return (Path.touch, (self.touched,))


BAD: dict[str, tuple[str, Callable[[Path], Any], str | None]] = {
    "no config": (
        "sae_lens standard",
        lambda p: (p / "cfg.json").unlink(),
        "is of no format that saelab reads. It holds sae_weights",
    ),
    "not JSON": ("sae_lens standard", lambda p: (p / "cfg.json").write_text("{"), "cfg.json is not JSON"),
    "a list": ("sae_lens standard", lambda p: (p / "cfg.json").write_text("[]"), "a mapping was expected"),
    "no weights tensor": (
        "sae_lens standard",
        lambda p: edit_tensors(p / "sae_weights.safetensors", b_enc=None),
        "a standard SAE, has no b_enc",
    ),
    "truncated": (
        "sae_lens standard",
        lambda p: (p / "sae_weights.safetensors").write_bytes(b"12345"),
        "is truncated or damaged",
    ),
    "unknown architecture": (
        "sae_lens standard",
        lambda p: edit_json(p / "cfg.json", architecture="temporal"),
        "SAELens architecture 'temporal'; saelab reads",
    ),
    "unknown normalisation": (
        "sae_lens standard",
        lambda p: edit_json(p / "cfg.json", normalize_activations="cube"),
        "normalize_activations='cube'",
    ),
    "a scale that stands nowhere": (
        "sae_lens standard",
        lambda p: edit_json(p / "cfg.json", normalize_activations="expected_average_only_in"),
        r"does not say scale: pass assume=\{'scale'",
    ),
    "whitening that stands nowhere": (
        "sae_lens standard",
        lambda p: edit_json(p / "cfg.json", normalize_activations="covariance_whitening"),
        "activation_whitening.safetensors is missing",
    ),
    "a k that stands nowhere": (
        "sae_lens topk",
        lambda p: edit_json(p / "cfg.json", k=None),
        r"does not say k: pass assume=\{'k'",
    ),
    "a k of no number": (
        "sae_lens topk",
        lambda p: edit_json(p / "cfg.json", k="many"),
        "says k='many', but a whole number of 1 or more was expected",
    ),
    "a k of more than all": (
        "sae_lens topk",
        lambda p: edit_json(p / "cfg.json", k=999),
        "k=999 must be between 1 and d_sae=96",
    ),
    "a head alone": (
        "sae_lens standard",
        lambda p: edit_json(p / "cfg.json", metadata={"hook_head_index": 3, "sae_lens_version": "6.0"}),
        "reads head 3 alone",
    ),
    "a matrix transposed": (
        "sae_lens standard",
        lambda p: edit_tensors(
            p / "sae_weights.safetensors", W_dec=load_file(p / "sae_weights.safetensors")["W_dec"].T
        ),
        "W_enc is of 96 features and width 32, W_dec of 32 features and width 96",
    ),
    "a bias of another width": (
        "sae_lens standard",
        lambda p: edit_tensors(p / "sae_weights.safetensors", b_enc=torch.zeros(5)),
        "b_enc has shape",
    ),
    "not finite": (
        "sae_lens standard",
        lambda p: edit_tensors(p / "sae_weights.safetensors", b_dec=torch.full((32,), torch.nan)),
        "b_dec hold NaN or infinite",
    ),
    "a config against its tensors": (
        "sparsify topk",
        lambda p: edit_json(p / "cfg.json", num_latents=99),
        "cfg.json says 99 latents, sae.safetensors holds 96",
    ),
    "a skip that is missing": (
        "sparsify topk transcode",
        lambda p: edit_json(p / "cfg.json", skip_connection=True),
        "has no W_skip",
    ),
    "groups of unequal size": (
        "sparsify groupmax",
        lambda p: edit_json(p / "cfg.json", k=7),
        "d_sae=96 is not a multiple of k=7",
    ),
    "a threshold that was never set": (
        "dictionary_learning BatchTopKSAE",
        lambda p: torch.save(
            torch.load(p / "ae.pt", weights_only=True) | {"threshold": torch.tensor(-1.0)}, p / "ae.pt"
        ),
        r"its threshold is -1, never set\) does not say threshold: pass assume",
    ),
    "a class that is none": (
        "dictionary_learning AutoEncoder",
        lambda p: edit_json(p / "config.json", trainer={"dict_class": "CrossCoder"}),
        "holds the class CrossCoder; saelab reads",
    ),
    "a class that it is not": (
        "dictionary_learning AutoEncoder",
        lambda p: edit_json(p / "config.json", trainer={"dict_class": "GatedAutoEncoder"}),
        "its tensors lack 'gate_bias'",
    ),
    "a class that cannot be told": (
        "dictionary_learning AutoEncoderTopK",
        lambda p: (p / "config.json").unlink(),
        "tells an AutoEncoderTopK",
    ),
    "several files": (
        "qwen_scope",
        lambda p: shutil.copy(p, p.with_name("layer8.sae.pt")),
        None,
    ),
    "a pickle with code": (
        "qwen_scope",
        lambda p: p.write_bytes(pickle.dumps(Runs(p.with_name("touched")))),
        "which could run code when loaded",
    ),
    "batchtopk without threshold": (
        "llamascopium relu, inference",
        lambda p: edit_json(p / "config.json", act_fn="batchtopk"),
        "has act_fn='batchtopk'",
    ),
    "a batch's norm": (
        "llamascopium relu, inference",
        lambda p: edit_json(p / "config.json", norm_activation="batch-wise"),
        "depends on its batch",
    ),
    "a GLU": (
        "llamascopium relu, inference",
        lambda p: edit_json(p / "config.json", use_glu_encoder=True),
        "has a GLU encoder",
    ),
    "another architecture": (
        "gemma_scope_2 mlp_out/layer_9_width_16k_l0_60",
        lambda p: edit_json(p / "config.json", architecture="topk"),
        "has architecture='topk'",
    ),
    "a layer without a decoder": (
        "gemma_scope_2 clt",
        lambda p: p.rename(p.with_name("layer_7_width_16k.safetensors")),
        None,
    ),
    "a crosscoder of several gates": (
        "llamascopium crosscoder, inference",
        lambda p: edit_json(p / "config.json", act_fn="jumprelu"),
        "whose heads each have a gate",
    ),
    "a norm that stands nowhere": (
        "llama_scope",
        lambda p: edit_json(p / "hyperparams.json", dataset_average_activation_norm=None),
        "does not say scale",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_files_are_refused_by_name(what, tmp_path):
    name, spoil, message = BAD[what]
    path = write(name, tmp_path)
    spoil(path)
    source = (
        path if message else path.parent if what == "several files" else path.with_name("layer_7_width_16k.safetensors")
    )
    messages = {
        "several files": "holds 2 SAEs: name one",
        "a layer without a decoder": "layer 7 has no decoder among 3",
    }
    with pytest.raises(SaelabError, match=message or messages[what]) as error:
        saelab.load_sae(source)
    assert len(str(error.value)) < 1500 and "\n" not in str(error.value)
    assert not path.with_name("touched").exists()


def test_what_is_asked_wrongly_is_refused(tmp_path):
    path = write("sae_lens topk", tmp_path)
    with pytest.raises(ValueError, match="assume has 'kk'; it takes variant, k, threshold"):
        saelab.load_sae(path, assume={"kk": 3})
    with pytest.raises(ValueError, match="format='lens' is unknown; saelab reads saelab, sae_lens"):
        saelab.load_sae(path, format="lens")
    with pytest.raises(SaelabError, match=r"does not hold what openai files hold|has no"):
        saelab.load_sae(path, format="llama_scope")
    shutil.copy(CASES["sparsify topk"](tmp_path / "other").path / "sae.safetensors", path / "sae.safetensors")
    with pytest.raises(
        SaelabError, match=r"matches several formats \(sae_lens, sparsify\): say which, format='sae_lens'"
    ):
        saelab.load_sae(path)
    assert saelab.load_sae(path, format="sae_lens").config.k == 4
    own = saelab.save_sae(saelab.load_sae(path, format="sae_lens"), tmp_path / "own")
    with pytest.raises(ValueError, match=r"is in saelab's own format, whose sae.json says everything: omit assume"):
        saelab.load_sae(own, assume={"k": 2})


def test_what_is_assumed_can_be_changed(tmp_path):
    path = write("sae_lens topk", tmp_path)
    changes = {
        "k": 2,
        "pre_bias": False,
        "normalize": "layer_norm",
        "score": "decoder_norm",
        "prepend_bos": True,
        "model": "a/b",
    }
    sae = saelab.load_sae(path, assume=changes)
    assert (sae.config.k, sae.config.pre_bias, sae.config.normalize, sae.config.score) == (
        2,
        False,
        "layer_norm",
        "decoder_norm",
    )
    origin = sae.provenance.origin
    assert (
        origin["prepend_bos"] is True and origin["model"] == {"name": "a/b"} and origin["imported"]["given"] == changes
    )
    edit_json(path / "cfg.json", k=None)
    assert saelab.load_sae(path, assume={"k": 3}).config.k == 3


def test_a_layer_of_a_cross_layer_transcoder_is_only_browsed(tmp_path, tiny_lm):
    sae = saelab.load_sae(write("mntss", tmp_path))
    reason = "one layer of a cross-layer transcoder"
    with pytest.raises(ValueError, match=rf"cannot be scored: it is {reason}"):
        saelab.evaluate(sae, tiny_lm, ["a text"])
    with pytest.raises(ValueError, match=rf"cannot be steered: it is {reason}"):
        FeatureHandle(sae, 3).add(1.0, "raw")


def test_the_list_of_releases_needs_no_network():
    found = search(["gemma-scope-2", "270m", "resid_post/layer_9_", "16k"])
    assert {one.format for one in found} == {"gemma_scope_2"} and all(one.l0 for one in found)
    assert any(one.source == "google/gemma-scope-2-270m-pt/resid_post/layer_9_width_16k_l0_medium" for one in found)
    assert {one.format for one in releases()} <= set(FORMATS) and len(releases()) > 13_000
    families = {"gemma_scope", "gemma_scope_2", "llama_scope", "qwen_scope", "goodfire", "mwhanna", "mntss", "sae_lens"}
    assert families <= {one.format for one in releases()}
    assert all("/" in one.model or one.model == "gpt2" for one in releases() if one.format.startswith("gemma"))
    assert search(["NO SUCH"]) == [] and known("tiny/other/sae") is None


def test_what_is_listed_fills_what_the_files_leave_out(tmp_path, monkeypatch):
    path = write("sae_lens standard", tmp_path)
    edit_json(
        path / "cfg.json", normalize_activations="expected_average_only_in", metadata={"sae_lens_version": "6.0.0"}
    )
    with pytest.raises(SaelabError, match="does not say scale"):
        saelab.load_sae(path)
    entry = Release("r", "a/b", "c", "sae_lens", "meta-llama/Llama-3.1-8B", 50.0, 0.25)
    monkeypatch.setattr(reading, "known", lambda label: entry)
    sae = saelab.load_sae(path)
    assert float(sae.scale) == 0.25 and sae.provenance.origin["imported"]["assumed"] == {"scale": 0.25}
    assert sae.provenance.origin["claims"] == {"l0": 50.0} and sae.provenance.origin["model"]["name"] == entry.model


def test_releases_are_listed_on_the_command_line(capsys):
    assert main.main(["releases", "gemma-scope-2", "270m", "--limit", "2"]) == 0
    said = capsys.readouterr().out
    assert "gemma-scope-2-270m-pt-res" in said and "google/gemma-3-270m" in said and "more; add words" in said
    assert said.count("google/gemma-scope-2-270m-it/") >= 2
    assert main.main(["releases", "nothing-like-it"]) == 2
    assert "no release matches 'nothing-like-it'" in capsys.readouterr().err


def test_export_on_the_command_line(tmp_path, capsys):
    saelab.save_sae(saelab.load_sae(write("sae_lens jumprelu", tmp_path)), tmp_path / "run" / "sae")
    assert main.main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--format", "gemma_scope_2"]) == 0
    assert (tmp_path / "out" / "params.safetensors").exists()
    assert main.main(["export", str(tmp_path / "run"), str(tmp_path / "no"), "--format", "sparsify"]) == 2
    assert "The format sparsify cannot hold a jumprelu" in capsys.readouterr().err
