"""SAEs written in other libraries' formats: read back they compute the same, and what a format cannot hold is refused by name."""

import json
from typing import Any

import pytest
import torch
from foreign_saes import CASES
from tiny_saes import D_IN, build, rows

import saelab
from saelab.errors import SaelabError
from saelab.interop.formats import FORMATS
from saelab.saes import VARIANTS

WRITTEN = [name for name, one in FORMATS.items() if one.save]
ORIGIN = {
    "model": {"name": "google/gemma-3-270m"},
    "hook_name": "blocks.3.hook_resid_post",
    "prepend_bos": True,
    "ctx_len": 64,
}
UNITS = ("none", "scale", "center_and_scale")

WRITTEN_AS = {"gba": "relu"}  # a variant that only saelab has, written as one that computes the same
# format -> variant -> why it cannot be written; all others can
PLAIN = ("crosscoder", "codebook", "top_afa", "poly", "icfl", "itda", "cross_layer_transcoder")
NO_PLAIN = {name: f"An? {name} is in no other library's format" for name in PLAIN}
ONLY_THRESHOLDS = {
    name: "only thresholds"
    for name in ("topk", "masked_topk", "csr", "gradient", "abs_topk", "gated", "matching_pursuit")
}
CANNOT: dict[str, dict[str, str]] = {
    "sae_lens": {"transcoder": "a TopK transcoder", "skip_transcoder": "a TopK transcoder"},
    "sparsify": {
        name: f"a {WRITTEN_AS.get(name, name)} \\(only a k per token\\)"
        for name in VARIANTS
        if name not in ("topk", "masked_topk", "csr", "gradient", "transcoder", "skip_transcoder", *NO_PLAIN)
    },
    "dictionary_learning": {
        name: f"a {name}"
        for name in (
            "abs_topk",
            "matching_pursuit",
            "transcoder",
            "skip_transcoder",
            "batch_topk_transcoder",
            "relu_transcoder",
            "jumprelu_transcoder",
        )
    },
    "gemma_scope_2": ONLY_THRESHOLDS | {"transcoder": "only thresholds", "skip_transcoder": "only thresholds"},
}


def of_origin(sae: Any) -> Any:
    import dataclasses

    origin = ORIGIN | ({"hook_name_out": "blocks.3.hook_mlp_out"} if "d_out" in sae.extra_dims else {})
    sae.provenance = dataclasses.replace(sae.provenance, origin=origin)
    return sae


def close(got: torch.Tensor, want: torch.Tensor) -> bool:
    return float((got - want).norm()) <= 1e-5 * float(want.norm())


@pytest.mark.parametrize("normalize", UNITS)
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("format", WRITTEN)
@torch.no_grad()
def test_written_and_read_it_computes_the_same(format, name, normalize, tmp_path):
    sae, x = of_origin(build(name, normalize)), rows(50)
    if name == "skip_transcoder":
        sae.W_skip.normal_(generator=torch.Generator().manual_seed(0))
    reason = NO_PLAIN.get(name) or CANNOT[format].get(name)
    if name == "matching_pursuit" and normalize != "none" and format in WRITTEN:
        reason = reason if name in NO_PLAIN else "scales its input by|" + (reason or "its encoder is its decoder")
    if reason:
        with pytest.raises(SaelabError, match=reason):
            saelab.save_sae(sae, tmp_path / "out", format=format)
        assert not list(tmp_path.glob("out/*"))
        return
    folder = saelab.save_sae(sae, tmp_path / "out", format=format)
    again = saelab.load_sae(folder)
    output, want = again(x), sae(x)
    assert close(output.acts.to_dense(), want.acts.to_dense()) and close(output.x_hat, want.x_hat)
    assert torch.equal(output.acts.to_dense() != 0, want.acts.to_dense() != 0)
    assert again.provenance.origin["imported"]["format"] == format
    if format != "sparsify":  # whose folder and run config say it
        assert again.provenance.origin["hook_name"] == ORIGIN["hook_name"]
        assert again.provenance.origin["model"] == ORIGIN["model"]


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_every_imported_kind_is_written_or_refused(name, tmp_path):
    """SAEs of other libraries are written as ours are."""
    foreign = CASES[name](tmp_path / "sae")
    sae = saelab.load_sae(foreign.path, assume=foreign.assume)
    x = 3 * torch.randn(50, sae.d_in, generator=torch.Generator().manual_seed(1))
    done = 0
    for format in WRITTEN:
        try:
            again = saelab.load_sae(saelab.save_sae(sae, tmp_path / format, format=format))
        except SaelabError as error:
            assert "cannot hold" in str(error) or "in no other library's format" in str(error), error
            continue
        done += 1
        output, want = again(x), sae(x)
        assert close(output.acts.to_dense(), want.acts.to_dense()) and close(output.x_hat, want.x_hat), format
    assert (
        done
        or "groupmax transcode" in name
        or "token-wise" in name
        or "by decoder norm" in name
        or "crosscoder" in name
    )


@torch.no_grad()
def test_a_transcoder_whose_norms_were_folded_is_refused(tmp_path):
    sae = build("transcoder")
    sae.fold_decoder_norms()
    with pytest.raises(SaelabError, match="in the units before its decoder norms were folded"):
        saelab.save_sae(sae, tmp_path / "out", format="sparsify")


def test_the_file_says_which_version_it_is_for(tmp_path):
    folder = saelab.save_sae(of_origin(build("relu")), tmp_path / "out", format="sae_lens")
    cfg = json.loads((folder / "cfg.json").read_text())
    assert cfg["metadata"]["sae_lens_version"] == "6.54.0" and cfg["normalize_activations"] == "none"
    assert cfg["metadata"]["model_name"] == "google/gemma-3-270m" and cfg["metadata"]["context_size"] == 64


def test_what_is_asked_wrongly_is_refused(tmp_path):
    sae = build("relu")
    with pytest.raises(ValueError, match="format='lens' is unknown; saelab writes 'saelab', 'sae_lens'"):
        saelab.save_sae(sae, tmp_path, format="lens")
    with pytest.raises(ValueError, match="format='openai' is unknown; saelab writes"):
        saelab.save_sae(sae, tmp_path, format="openai")
    with pytest.raises(ValueError, match="golden_inputs are stored in saelab's own format alone"):
        saelab.save_sae(sae, tmp_path, format="sae_lens", golden_inputs=torch.randn(3, D_IN))
