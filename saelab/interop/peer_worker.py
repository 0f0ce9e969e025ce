"""The other side of `check_against_peers`: runs in the environment of the other libraries, which saelab is not part of.

`python peer_worker.py FOLDER` reads what saelab wrote into FOLDER/ours/FORMAT/KIND with the library of that format, and writes
SAEs of its own into FOLDER/theirs/FORMAT/KIND. Beside each it leaves `computed.safetensors`: feature activations and
reconstruction of FOLDER/x.safetensors, or `failed.txt` with the reason.
"""

from __future__ import annotations

import importlib
import json
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

D_IN, D_SAE, K = 16, 64, 4
Computes = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def library(name: str) -> Any:
    return importlib.import_module(name)


def randomized(module: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.5
            parameter.copy_(noise.abs() if "threshold" in name else noise)
    return module.eval()


def of_sae_lens(sae: Any) -> Computes:
    return lambda x: (sae.encode(x), sae(x))


def of_sparsify(coder: Any) -> Computes:
    def run(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x_hat, values, features, *_ = coder(x)
        dense = torch.zeros(len(x), coder.num_latents)
        return dense.scatter(1, features, values.float()), x_hat

    return run


def of_dictionary(dictionary: Any) -> Computes:
    return lambda x: (dictionary.encode(x), dictionary(x))


def read(format: str, folder: Path) -> Computes:
    """What the library of a format makes of a folder that saelab wrote."""
    if format == "sae_lens":
        return of_sae_lens(library("sae_lens").SAE.load_from_disk(folder))
    if format == "sparsify":
        return of_sparsify(library("sparsify").SparseCoder.load_from_disk(folder))
    return of_dictionary(library("dictionary_learning.utils").load_dictionary(str(folder), "cpu")[0])


def made_by_sae_lens(folder: Path) -> Iterator[tuple[Path, Computes]]:
    registry = library("sae_lens.registry")
    library("sae_lens")
    bases = ("standard", "topk", "abstopk", "gated", "jumprelu", "matching_pursuit")
    cases = [(name, {"apply_b_dec_to_input": bias}) for name in bases for bias in (True, False)]
    cases += [
        (name, {"normalize_activations": norm})
        for name in ("standard", "topk")
        for norm in ("layer_norm", "constant_norm_rescale")
    ]
    cases += [(name, {"rescale_acts_by_decoder_norm": True}) for name in ("topk", "abstopk")]
    kinds = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")
    cases += [(name, {"d_out": 12, "apply_b_dec_to_input": False}) for name in kinds]
    for name, options in cases:
        options = {**options, "k": K} if "topk" in name else options
        options = {**options, "max_iterations": 6} if name == "matching_pursuit" else options
        cls, config = registry.get_sae_class(name)
        sae = randomized(cls(config(d_in=D_IN, d_sae=D_SAE, **options)))
        if name == "matching_pursuit":
            sae.W_dec.data /= sae.W_dec.data.norm(dim=1, keepdim=True)
        kind = "-".join([name, *(f"{key}={value}" for key, value in options.items())])
        sae.save_model(folder / kind)
        yield folder / kind, of_sae_lens(sae)


def made_by_sparsify(folder: Path) -> Iterator[tuple[Path, Computes]]:
    sparsify = library("sparsify")
    for activation in ("topk", "groupmax"):
        for transcode, skip in ((False, False), (True, False), (True, True)):
            config = sparsify.SparseCoderConfig(
                activation=activation,
                num_latents=0,
                expansion_factor=D_SAE // D_IN,
                k=K,
                transcode=transcode,
                skip_connection=skip,
            )
            coder = randomized(sparsify.SparseCoder(D_IN, config))
            kind = f"{activation}{'-transcode' * transcode}{'-skip' * skip}"
            coder.save_to_disk(folder / kind)
            yield folder / kind, of_sparsify(coder)


def made_by_dictionary_learning(folder: Path) -> Iterator[tuple[Path, Computes]]:
    dictionaries, top = library("dictionary_learning.dictionary"), library("dictionary_learning.trainers.top_k")
    batch, nested = (
        library(f"dictionary_learning.trainers.{name}") for name in ("batch_top_k", "matryoshka_batch_top_k")
    )
    made = {
        "AutoEncoder": dictionaries.AutoEncoder(D_IN, D_SAE),
        "AutoEncoderNew": dictionaries.AutoEncoderNew(D_IN, D_SAE),
        "GatedAutoEncoder": dictionaries.GatedAutoEncoder(D_IN, D_SAE),
        "JumpReluAutoEncoder": dictionaries.JumpReluAutoEncoder(D_IN, D_SAE),
        "AutoEncoderTopK": top.AutoEncoderTopK(D_IN, D_SAE, K),
        "BatchTopKSAE": batch.BatchTopKSAE(D_IN, D_SAE, K),
        "MatryoshkaBatchTopKSAE": nested.MatryoshkaBatchTopKSAE(D_IN, D_SAE, K, [8, 24, 32]),
    }
    for kind, dictionary in made.items():
        randomized(dictionary)
        if "BatchTopK" in kind:
            dictionary.threshold.fill_(1.5)
        (folder / kind).mkdir(parents=True)
        torch.save(dictionary.state_dict(), folder / kind / "ae.pt")  # noqa: TID251  (as the library's training does)
        config = {"trainer": {"dict_class": kind, "k": K}, "buffer": {"ctx_len": 128}}
        (folder / kind / "config.json").write_text(json.dumps(config))
        yield folder / kind, of_dictionary(dictionary)


WRITERS = {
    "sae_lens": made_by_sae_lens,
    "sparsify": made_by_sparsify,
    "dictionary_learning": made_by_dictionary_learning,
}


@torch.no_grad()
def leave(folder: Path, run: Callable[[], Computes], x: torch.Tensor) -> None:
    try:
        feature_acts, x_hat = run()(x)
        save_file(
            {"acts": feature_acts.float().contiguous(), "x_hat": x_hat.float().contiguous()},
            folder / "computed.safetensors",
        )
    except Exception:
        (folder / "failed.txt").write_text(traceback.format_exc())


def main(root: Path) -> None:
    x = load_file(root / "x.safetensors")["x"]
    for format, writer in WRITERS.items():
        for folder in sorted((root / "ours" / format).iterdir()):
            leave(folder, lambda format=format, folder=folder: read(format, folder), x)
        for folder, computes in writer(root / "theirs" / format):
            leave(folder, lambda computes=computes: computes, x)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
