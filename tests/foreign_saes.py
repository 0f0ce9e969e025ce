"""Files of other libraries, written here tensor by tensor, and what those libraries compute from them.

Each case is independent of `saelab.interop`: names and orientations are those of the libraries, and `encode`/`decode` are their
formulas in dense torch. `CASES` maps a name to a function that writes the files and returns a `Foreign`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

D_IN, D_OUT, D_SAE = 32, 64, 96


@dataclass
class Foreign:
    """A written SAE: where it is, its format, and what it computes."""

    path: Path
    format: str
    run: Callable[[Tensor], tuple[Tensor, Tensor]]
    """x -> dense feature activations, reconstruction"""
    assume: dict[str, Any] = field(default_factory=dict)
    origin: dict[str, Any] = field(default_factory=dict)
    """What `sae.json` must say."""
    assumed: tuple[str, ...] = ()
    partial: bool = False
    n_sources: int = 1

    def inputs(self, x: Tensor) -> Tensor:
        """Tokens `(n, d_in)`, or several sources of them."""
        return x if self.n_sources == 1 else torch.stack([x.roll(i, 0) for i in range(self.n_sources)], dim=1)


Case = Callable[[Path], Foreign]
CASES: dict[str, Case] = {}


def case(name: str) -> Callable[[Case], Case]:
    def register(make: Case) -> Case:
        CASES[name] = make
        return make

    return register


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def weights(d_out: int = D_IN) -> dict[str, Tensor]:
    """In mathematical orientation: W_enc (d_sae, d_in), W_dec (d_sae, d_out); decoder rows of unequal norm."""
    W_dec = rand(D_SAE, d_out, seed=2) * torch.linspace(0.3, 2, D_SAE)[:, None]
    return {
        "W_enc": rand(D_SAE, D_IN, seed=1),
        "W_dec": W_dec,
        "b_enc": 0.3 * rand(D_SAE),
        "b_dec": rand(d_out, seed=3),
    }


def topk(u: Tensor, k: int) -> Tensor:
    return torch.zeros_like(u).scatter(1, u.topk(k, dim=1).indices, 1.0) * u.relu()


def jump(u: Tensor, threshold: Tensor | float) -> Tensor:
    return u.relu() * (u > threshold)


# SAELens ---------------------------------------------------------------------------------------------------------------


def lens(path: Path, architecture: str, tensors: dict[str, Tensor], **cfg: Any) -> Path:
    metadata = {"sae_lens_version": "6.54.0", "model_name": "gpt2-small", "hook_name": "blocks.1.hook_resid_pre"}
    metadata |= cfg.pop("metadata", {})
    base = {"architecture": architecture, "d_in": D_IN, "d_sae": D_SAE, "dtype": "float32", "device": "cpu"}
    base |= {"apply_b_dec_to_input": True, "normalize_activations": "none", "reshape_activations": "none"}
    path.mkdir(parents=True, exist_ok=True)
    (path / "cfg.json").write_text(json.dumps(base | cfg | {"metadata": metadata}))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / "sae_weights.safetensors")
    return path


def lens_tensors(w: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"W_enc": w["W_enc"].T, "W_dec": w["W_dec"], "b_enc": w["b_enc"], "b_dec": w["b_dec"]}


def lens_sae(
    activation: Callable[[Tensor, dict[str, Tensor]], Tensor], pre_bias: bool = True, norm: str = "none"
) -> Any:
    """What SAELens computes: normalise, subtract b_dec, encode, activate, decode, undo the normalisation."""
    w = weights()

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        mean, size, eps = torch.zeros(len(x), 1), torch.ones(len(x), 1), 0.0
        if norm == "layer_norm":
            mean, size, eps = x.mean(1, keepdim=True), x.std(1, keepdim=True), 1e-5
        if norm == "constant_norm_rescale":
            size = x.norm(dim=1, keepdim=True) / D_IN**0.5
        inside = (x - mean) / (size + eps) - (w["b_dec"] if pre_bias else 0)
        z = activation(inside @ w["W_enc"].T + w["b_enc"], w)
        return z, (z @ w["W_dec"] + w["b_dec"]) * size + mean

    return run


ORIGIN = {"model": {"name": "gpt2"}, "hook_name": "blocks.1.hook_resid_pre"}


@case("sae_lens standard")
def _(path: Path) -> Foreign:
    lens(path, "standard", lens_tensors(weights()), metadata={"prepend_bos": False, "context_size": 64})
    origin = ORIGIN | {"prepend_bos": False, "ctx_len": 64}
    return Foreign(path, "sae_lens", lens_sae(lambda u, w: u.relu()), origin=origin)


@case("sae_lens standard, b_dec not subtracted")
def _(path: Path) -> Foreign:
    lens(path, "standard", lens_tensors(weights()), apply_b_dec_to_input=False)
    return Foreign(path, "sae_lens", lens_sae(lambda u, w: u.relu(), False), origin=ORIGIN)


for norm in ("layer_norm", "constant_norm_rescale"):

    @case(f"sae_lens standard, {norm}")
    def _(path: Path, norm: str = norm) -> Foreign:
        lens(path, "standard", lens_tensors(weights()), normalize_activations=norm)
        return Foreign(path, "sae_lens", lens_sae(lambda u, w: u.relu(), norm=norm))


@case("sae_lens before version 6: topk by activation_fn_str")
def _(path: Path) -> Foreign:
    path.mkdir(parents=True)
    cfg = {
        "d_in": D_IN,
        "d_sae": D_SAE,
        "dtype": "float32",
        "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": 4},
    }
    cfg |= {"hook_point": "blocks.1.hook_resid_pre", "model_name": "gpt2-small", "normalize_activations": False}
    (path / "cfg.json").write_text(json.dumps(cfg))
    save_file({k: v.contiguous() for k, v in lens_tensors(weights()).items()}, path / "sae_weights.safetensors")
    return Foreign(path, "sae_lens", lens_sae(lambda u, w: topk(u, 4)), origin=ORIGIN)


@case("sae_lens before version 6: scaling factor")
def _(path: Path) -> Foreign:
    factor = torch.linspace(0.5, 2, D_SAE)
    lens(path, "standard", lens_tensors(weights()) | {"scaling_factor": factor}, finetuning_scaling_factor=True)
    w = weights()

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        z = ((x - w["b_dec"]) @ w["W_enc"].T + w["b_enc"]).relu()
        return z, (z * factor) @ w["W_dec"] + w["b_dec"]

    return Foreign(path, "sae_lens", run)


@case("sae_lens topk")
def _(path: Path) -> Foreign:
    lens(path, "topk", lens_tensors(weights()), k=4, rescale_acts_by_decoder_norm=False)
    return Foreign(path, "sae_lens", lens_sae(lambda u, w: topk(u, 4)))


def rescaled(activation: Callable[[Tensor], Tensor]) -> Any:
    w = weights()
    norms = w["W_dec"].norm(dim=1)

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        z = activation(((x - w["b_dec"]) @ w["W_enc"].T + w["b_enc"]) * norms)
        return z, (z / norms) @ w["W_dec"] + w["b_dec"]

    return run


@case("sae_lens topk, activations rescaled by decoder norms")
def _(path: Path) -> Foreign:
    lens(path, "topk", lens_tensors(weights()), k=4, rescale_acts_by_decoder_norm=True)
    return Foreign(path, "sae_lens", rescaled(lambda u: topk(u, 4)))


@case("sae_lens abstopk")
def _(path: Path) -> Foreign:
    lens(path, "abstopk", lens_tensors(weights()), k=4, rescale_acts_by_decoder_norm=False)

    def absolute(u: Tensor, w: dict[str, Tensor]) -> Tensor:
        return torch.zeros_like(u).scatter(1, u.abs().topk(4, dim=1).indices, 1.0) * u

    return Foreign(path, "sae_lens", lens_sae(absolute))


@case("sae_lens jumprelu")
def _(path: Path) -> Foreign:
    threshold = torch.linspace(0, 1.5, D_SAE)
    lens(path, "jumprelu", lens_tensors(weights()) | {"threshold": threshold}, apply_b_dec_to_input=False)
    return Foreign(path, "sae_lens", lens_sae(lambda u, w: jump(u, threshold), False))


@case("sae_lens training checkpoint of batchtopk, scaled")
def _(path: Path) -> Foreign:
    tensors = lens_tensors(weights()) | {"topk_threshold": torch.tensor(0.8, dtype=torch.float64)}
    lens(
        path,
        "batchtopk",
        tensors,
        k=4,
        rescale_acts_by_decoder_norm=True,
        normalize_activations="expected_average_only_in",
    )
    (path / "activation_scaler.json").write_text(json.dumps({"scaling_factor": 0.4, "has_whitening": False}))
    inner = rescaled(lambda u: jump(u, 0.8))

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        z, x_hat = inner(0.4 * x)
        return z, x_hat / 0.4

    return Foreign(path, "sae_lens", run)


@case("sae_lens training checkpoint, whitened")
def _(path: Path) -> Foreign:
    lens(path, "standard", lens_tensors(weights()), normalize_activations="covariance_whitening")
    M = torch.linalg.qr(rand(D_IN, D_IN))[0] * torch.linspace(0.5, 2, D_IN)
    mean = rand(D_IN, seed=9)
    whitening = {"mean": mean.double(), "matrix": M.double(), "inverse_matrix": M.double().inverse()}
    save_file({k: v.contiguous() for k, v in whitening.items()}, path / "activation_whitening.safetensors")
    inner = lens_sae(lambda u, w: u.relu())

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        z, x_hat = inner((x - mean) @ M)
        return z, x_hat @ M.inverse() + mean

    return Foreign(path, "sae_lens", run)


@case("sae_lens gated")
def _(path: Path) -> Foreign:
    w, gate = (
        weights(),
        {"b_gate": 0.2 * rand(D_SAE, seed=5), "b_mag": 0.2 * rand(D_SAE, seed=6), "r_mag": rand(D_SAE, seed=7)},
    )
    tensors = {key: value for key, value in lens_tensors(w).items() if key != "b_enc"}
    lens(path, "gated", tensors | gate)

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        u = (x - w["b_dec"]) @ w["W_enc"].T
        z = (u + gate["b_gate"] > 0) * (gate["r_mag"].exp() * u + gate["b_mag"]).relu()
        return z, z @ w["W_dec"] + w["b_dec"]

    return Foreign(path, "sae_lens", run)


@case("sae_lens matching_pursuit")
def _(path: Path) -> Foreign:
    w = weights()
    rows = w["W_dec"] / w["W_dec"].norm(dim=1, keepdim=True)
    cfg = {"residual_threshold": 0.5, "max_iterations": 6, "stop_on_duplicate_support": True}
    lens(path, "matching_pursuit", {"W_dec": rows, "b_dec": w["b_dec"]}, **cfg)

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        z = torch.zeros(len(x), D_SAE)
        for i, r in enumerate(x - w["b_dec"]):
            for _ in range(6):
                u = rows @ r
                j = int(u.argmax())
                known = bool(z[i, j])
                z[i, j] += u[j].relu()
                r = r - u[j].relu() * rows[j]
                if known or u[j] <= 0 or r.norm() < 0.5:
                    break
        return z, z @ rows + w["b_dec"]

    return Foreign(path, "sae_lens", run)


for kind in ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder"):

    @case(f"sae_lens {kind}")
    def _(path: Path, kind: str = kind) -> Foreign:
        w, threshold, skip = weights(D_OUT), torch.linspace(0.1, 1.5, D_SAE), rand(D_OUT, D_IN, seed=8)
        more = {"threshold": threshold} if "jumprelu" in kind else {}
        more |= {"W_skip": skip} if "skip" in kind else {}
        hooks = {"hook_name": "blocks.1.hook_mlp_in", "hook_name_out": "blocks.1.hook_mlp_out"}
        hooks |= {"hf_hook_name": "model.layers.1.pre_feedforward_layernorm.output", "model_name": "gemma-2-2b"}
        lens(path, kind, lens_tensors(w) | more, d_out=D_OUT, apply_b_dec_to_input=False, metadata=hooks)

        def run(x: Tensor) -> tuple[Tensor, Tensor]:
            u = x @ w["W_enc"].T + w["b_enc"]
            z = jump(u, threshold) if "jumprelu" in kind else u.relu()
            y = z @ w["W_dec"] + w["b_dec"]
            return z, y + x @ skip.T if "skip" in kind else y

        origin = {"hook_name": "blocks.1.mlp.hook_in", "hook_name_out": "blocks.1.hook_mlp_out"}
        return Foreign(path, "sae_lens", run, origin=origin | {"model": {"name": "google/gemma-2-2b"}})


# sparsify --------------------------------------------------------------------------------------------------------------

for activation in ("topk", "groupmax"):
    for transcode in (False, True):
        for skip_connection in (False, True) if transcode else (False,):

            @case(f"sparsify {activation}{' transcode' * transcode}{' skip' * skip_connection}")
            def _(
                path: Path,
                activation: str = activation,
                transcode: bool = transcode,
                skip_connection: bool = skip_connection,
            ) -> Foreign:
                w, skip = weights(), rand(D_IN, D_IN, seed=8)
                folder = path / "layers.3.mlp"
                folder.mkdir(parents=True)
                cfg = {"activation": activation, "expansion_factor": 3, "num_latents": 0, "k": 4, "d_in": D_IN}
                cfg |= {"normalize_decoder": True, "skip_connection": skip_connection, "transcode": transcode}
                (folder / "cfg.json").write_text(json.dumps(cfg))
                (path / "config.json").write_text(json.dumps({"model": "EleutherAI/pythia-70m", "ctx_len": 128}))
                tensors = {
                    "encoder.weight": w["W_enc"],
                    "encoder.bias": w["b_enc"],
                    "W_dec": w["W_dec"],
                    "b_dec": w["b_dec"],
                }
                save_file(tensors | ({"W_skip": skip} if skip_connection else {}), folder / "sae.safetensors")

                def run(x: Tensor) -> tuple[Tensor, Tensor]:
                    u = (x - (0 if transcode else w["b_dec"])) @ w["W_enc"].T + w["b_enc"]
                    if activation == "topk":
                        z = topk(u, 4)
                    else:
                        z = torch.cat([topk(part, 1) for part in u.split(D_SAE // 4, dim=1)], dim=1)
                    return z, z @ w["W_dec"] + w["b_dec"] + (x @ skip.T if skip_connection else 0)

                origin = {"model": {"name": "EleutherAI/pythia-70m"}, "ctx_len": 128}
                origin |= {"hook_name": "blocks.3.mlp.hook_in" if transcode else "blocks.3.hook_mlp_out"}
                origin |= {"hook_name_out": "blocks.3.hook_mlp_out"} if transcode else {}
                return Foreign(folder, "sparsify", run, origin=origin, assumed=("prepend_bos",))


# dictionary_learning ---------------------------------------------------------------------------------------------------


def dictionary(path: Path, kind: str, tensors: dict[str, Tensor]) -> Path:
    path.mkdir(parents=True)
    torch.save(tensors, path / "ae.pt")
    trainer = {"dict_class": kind, "lm_name": "google/gemma-2-2b", "layer": 12, "submodule_name": "resid_post_layer_12"}
    (path / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"ctx_len": 1024}}))
    return path


def linear(w: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"encoder.weight": w["W_enc"], "encoder.bias": w["b_enc"], "decoder.weight": w["W_dec"].T}


DICTIONARY_ORIGIN = {"model": {"name": "google/gemma-2-2b"}, "hook_name": "blocks.12.hook_resid_post", "ctx_len": 1024}
K, THRESHOLD = torch.tensor(4, dtype=torch.int32), torch.tensor(0.7)
DICTIONARIES: dict[str, tuple[dict[str, Tensor], Any, bool]] = {
    "AutoEncoder": (linear(weights()) | {"bias": weights()["b_dec"]}, lambda u, w: u.relu(), True),
    "AutoEncoderNew": (linear(weights()) | {"decoder.bias": weights()["b_dec"]}, lambda u, w: u.relu(), False),
    "AutoEncoderTopK": (
        linear(weights()) | {"b_dec": weights()["b_dec"], "k": K, "threshold": THRESHOLD},
        lambda u, w: topk(u, 4),
        True,
    ),
    "BatchTopKSAE": (
        linear(weights()) | {"b_dec": weights()["b_dec"], "k": K, "threshold": THRESHOLD},
        lambda u, w: jump(u, 0.7),
        True,
    ),
    "MatryoshkaBatchTopKSAE": (
        lens_tensors(weights()) | {"k": K, "threshold": THRESHOLD, "group_sizes": torch.tensor([8, 24, 64])},
        lambda u, w: jump(u, 0.7),
        True,
    ),
    "JumpReluAutoEncoder": (
        lens_tensors(weights()) | {"threshold": torch.linspace(0, 1, D_SAE)},
        lambda u, w: jump(u, torch.linspace(0, 1, D_SAE)),
        False,
    ),
}
for kind, (tensors, activation, pre_bias) in DICTIONARIES.items():

    @case(f"dictionary_learning {kind}")
    def _(
        path: Path, kind: str = kind, tensors: Any = tensors, activation: Any = activation, pre: bool = pre_bias
    ) -> Foreign:
        dictionary(path, kind, tensors)
        return Foreign(path, "dictionary_learning", lens_sae(activation, pre), origin=DICTIONARY_ORIGIN)


@case("dictionary_learning GatedAutoEncoder")
def _(path: Path) -> Foreign:
    w, r, gate, mag = weights(), rand(D_SAE, seed=7), 0.2 * rand(D_SAE, seed=5), 0.2 * rand(D_SAE, seed=6)
    tensors = {key: value for key, value in linear(w).items() if key != "encoder.bias"}
    tensors |= {"decoder_bias": w["b_dec"], "r_mag": r, "gate_bias": gate, "mag_bias": mag}
    dictionary(path, "GatedAutoEncoder", tensors)

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        u = (x - w["b_dec"]) @ w["W_enc"].T
        z = (u + gate > 0) * (r.exp() * u + mag).relu()
        return z, z @ w["W_dec"] + w["b_dec"]

    return Foreign(path, "dictionary_learning", run, origin=DICTIONARY_ORIGIN)


@case("dictionary_learning checkpoint without its class")
def _(path: Path) -> Foreign:
    (path / "checkpoints").mkdir(parents=True)
    torch.save(linear(weights()) | {"bias": weights()["b_dec"]}, path / "checkpoints" / "ae_500.pt")
    return Foreign(path / "checkpoints" / "ae_500.pt", "dictionary_learning", lens_sae(lambda u, w: u.relu()))


# Gemma Scope -----------------------------------------------------------------------------------------------------------


def scope(path: Path, name: str, w: dict[str, Tensor], threshold: Tensor) -> Path:
    folder = path / name
    folder.mkdir(parents=True)
    arrays = lens_tensors(w) | {"threshold": threshold}
    np.savez(folder / "params.npz", **{key: value.numpy() for key, value in arrays.items()})  # pyright: ignore[reportArgumentType]
    return folder


for repo, hooks in {
    "gemma-scope-2b-pt-res": ("blocks.12.hook_resid_post",),
    "gemma-scope-9b-it-mlp": ("blocks.12.hook_mlp_out",),
    "gemma-scope-2b-pt-att": ("blocks.12.attn.hook_z",),
    "gemma-scope-2b-pt-transcoders": ("blocks.12.mlp.hook_in", "blocks.12.hook_mlp_out"),
}.items():

    @case(f"gemma_scope {repo}")
    def _(path: Path, repo: str = repo, hooks: tuple[str, ...] = hooks) -> Foreign:
        threshold = torch.linspace(0.1, 1, D_SAE)
        folder = scope(path, f"{repo}/layer_12/width_16k/average_l0_82", weights(), threshold)
        model = {"name": "google/gemma-2-9b-it" if "9b" in repo else "google/gemma-2-2b"}
        origin = {"model": model, "prepend_bos": True, "ctx_len": 1024, "claims": {"l0": 82.0}}
        origin |= dict(zip(("hook_name", "hook_name_out"), hooks, strict=False))
        return Foreign(folder, "gemma_scope", lens_sae(lambda u, w: jump(u, threshold), False), origin=origin)


@case("gemma_scope embedding")
def _(path: Path) -> Foreign:
    threshold, w = torch.linspace(0.1, 1, D_SAE), weights()
    folder = scope(path, "gemma-scope-2b-pt-res/embedding/width_4k/average_l0_111", w, threshold)

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        z = jump(x @ w["W_enc"].T / D_IN**0.5 + w["b_enc"], threshold)
        return z, z @ (w["W_dec"] * D_IN**0.5) + w["b_dec"]

    return Foreign(folder, "gemma_scope", run, origin={"hook_name": "hook_embed"})


def scope_2(folder: Path, w: dict[str, Tensor], config: dict[str, Any] | None, **more: Tensor) -> Path:
    folder.mkdir(parents=True)
    tensors = {"w_enc": w["W_enc"].T, "w_dec": w["W_dec"], "b_enc": w["b_enc"], "b_dec": w["b_dec"]}
    save_file({k: v.contiguous() for k, v in (tensors | more).items()}, folder / "params.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps({"architecture": "jump_relu"} | config))
    return folder


for name, hooks in {
    "resid_post/layer_9_width_16k_l0_medium": ("blocks.9.hook_resid_post",),
    "attn_out/layer_9_width_16k_l0_medium": ("blocks.9.attn.hook_z",),
    "mlp_out/layer_9_width_16k_l0_60": ("blocks.9.hook_mlp_out",),
    "transcoder_all/layer_9_width_16k_l0_small_affine": ("blocks.9.mlp.hook_in", "blocks.9.hook_mlp_out"),
}.items():
    for with_config in (True, False):

        @case(f"gemma_scope_2 {name}{'' if with_config else ', no config.json'}")
        def _(path: Path, name: str = name, hooks: tuple[str, ...] = hooks, with_config: bool = with_config) -> Foreign:
            threshold, w, inside = torch.linspace(0.1, 1, D_SAE), weights(), "model.layers.9."
            points = {"resid_post": ("output",), "attn_out": ("self_attn.o_proj.input",)}
            points |= {"mlp_out": ("post_feedforward_layernorm.output",)}
            found = points.get(
                name.split("/")[0], ("pre_feedforward_layernorm.output", "post_feedforward_layernorm.output")
            )
            config = {"model_name": "gemma-v3-270m-pt", "hf_hook_point_in": inside + found[0]}
            config |= {"hf_hook_point_out": inside + found[-1], "affine_connection": True} if len(found) > 1 else {}
            skip = rand(D_IN, D_IN, seed=8)
            more = {"threshold": threshold} | ({"affine_skip_connection": skip} if len(found) > 1 else {})
            folder = path / "google" / "gemma-scope-2-270m-pt" / name
            scope_2(folder, w, config if with_config else None, **more)
            inner = lens_sae(lambda u, w: jump(u, threshold), False)

            def run(x: Tensor) -> tuple[Tensor, Tensor]:
                z, x_hat = inner(x)
                return z, x_hat + x @ skip if len(found) > 1 else x_hat  # (d_in, d_out): not transposed

            origin = {"model": {"name": "google/gemma-3-270m"}, "prepend_bos": True, "ctx_len": 1024}
            origin |= dict(zip(("hook_name", "hook_name_out"), hooks, strict=False))
            return Foreign(folder, "gemma_scope_2", run, origin=origin)


@case("gemma_scope_2 clt")
def _(path: Path) -> Foreign:
    threshold, w, W_dec = torch.linspace(0.1, 1, D_SAE), weights(), rand(D_SAE, 3, D_IN, seed=4)
    folder = path / "gemma-scope-2-270m-pt" / "clt" / "width_16k"
    folder.mkdir(parents=True)
    tensors = {"w_enc": w["W_enc"].T, "w_dec": W_dec, "b_enc": w["b_enc"], "b_dec": w["b_dec"], "threshold": threshold}
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "layer_1_width_16k.safetensors")

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        z = jump(x @ w["W_enc"].T + w["b_enc"], threshold)
        return z, z @ W_dec[:, 1] + w["b_dec"]

    file = folder / "layer_1_width_16k.safetensors"
    return Foreign(file, "gemma_scope_2", run, origin={"hook_name": "blocks.1.mlp.hook_in"}, partial=True)


# OpenAI, Goodfire, Llama Scope, llamascopium, Qwen Scope, mwhanna, mntss -------------------------------------------------


@case("openai TopK")
def _(path: Path) -> Foreign:
    w, folder = weights(), path / "gpt2-small" / "resid_post_mlp_v5_32k" / "autoencoders"
    folder.mkdir(parents=True)
    state = {
        "encoder.weight": w["W_enc"],
        "decoder.weight": w["W_dec"].T,
        "pre_bias": w["b_dec"],
        "latent_bias": w["b_enc"],
    }
    state |= {"stats_last_nonzero": torch.zeros(D_SAE), "latents_activation_frequency": torch.zeros(D_SAE)}
    more: dict[str, Any] = {"activation": "TopK", "activation_state_dict": {"k": 4, "postact_fn": "ReLU"}}
    torch.save(state | more, folder / "8.pt")

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        mean = x.mean(1, keepdim=True)
        std = (x - mean).std(1, keepdim=True)
        z = topk(((x - mean) / (std + 1e-5) - w["b_dec"]) @ w["W_enc"].T + w["b_enc"], 4)
        return z, (z @ w["W_dec"] + w["b_dec"]) * std + mean

    origin = {"hook_name": "blocks.8.hook_resid_post", "model": {"name": "gpt2"}}
    return Foreign(folder / "8.pt", "openai", run, origin=origin, assumed=("prepend_bos",))


@case("openai ReLU")
def _(path: Path) -> Foreign:
    w = weights()
    path.mkdir(parents=True)
    state = {
        "encoder.weight": w["W_enc"],
        "decoder.weight": w["W_dec"].T,
        "pre_bias": w["b_dec"],
        "latent_bias": w["b_enc"],
    }
    torch.save(state | {"activation": "ReLU", "activation_state_dict": {}}, path / "8.pt")
    return Foreign(path / "8.pt", "openai", lens_sae(lambda u, w: u.relu()), assumed=("prepend_bos",))


for encoder, decoder, named in (
    ("encoder_linear", "decoder_linear", "Llama-3.3-70B-Instruct-SAE-l50.pt"),
    ("encoder", "decoder", "DeepSeek-R1-SAE-l37.pt"),
):

    @case(f"goodfire {encoder}")
    def _(path: Path, encoder: str = encoder, decoder: str = decoder, named: str = named) -> Foreign:
        w = weights()
        path.mkdir(parents=True)
        state = {f"{encoder}.weight": w["W_enc"], f"{encoder}.bias": w["b_enc"]}
        torch.save(state | {f"{decoder}.weight": w["W_dec"].T, f"{decoder}.bias": w["b_dec"]}, path / named)
        layer = 50 if "l50" in named else 37
        origin = {"hook_name": f"blocks.{layer}.hook_resid_post"}
        return Foreign(path / named, "goodfire", lens_sae(lambda u, w: u.relu(), False), origin=origin)


@case("llama_scope")
def _(path: Path) -> Foreign:
    w = weights()
    (path / "checkpoints").mkdir(parents=True)
    cfg = {"d_model": D_IN, "d_sae": D_SAE, "jump_relu_threshold": 0.6, "hook_point_in": "blocks.5.hook_resid_post"}
    cfg |= {"hook_point_out": "blocks.5.hook_resid_post", "dataset_average_activation_norm": {"in": 7.0, "out": 7.0}}
    (path / "hyperparams.json").write_text(json.dumps(cfg))
    tensors = linear(w) | {"decoder.bias": w["b_dec"]}
    save_file({k: v.contiguous() for k, v in tensors.items()}, path / "checkpoints" / "final.safetensors")
    scale = D_IN**0.5 / 7.0

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        z = jump(scale * x @ w["W_enc"].T + w["b_enc"], 0.6)
        return z, (z @ w["W_dec"] + w["b_dec"]) / scale

    return Foreign(path, "llama_scope", run, origin={"hook_name": "blocks.5.hook_resid_post", "prepend_bos": True})


for act_fn in ("relu", "jumprelu", "topk"):
    for by_norm in (True, False):
        for how in ("dataset-wise", "inference", "token-wise"):
            for transcodes in (True, False) if act_fn != "topk" else (False,):

                @case(f"llamascopium {act_fn}, {how}{', by decoder norm' * by_norm}{', transcoder' * transcodes}")
                def _(
                    path: Path,
                    act_fn: str = act_fn,
                    by_norm: bool = by_norm,
                    how: str = how,
                    transcodes: bool = transcodes,
                ) -> Foreign:
                    w, log_threshold = weights(), torch.linspace(-2, 0.5, D_SAE)
                    path.mkdir(parents=True)
                    hooks = ("blocks.5.ln2.hook_normalized", "blocks.5.hook_mlp_out")[: 1 + transcodes]
                    cfg = {"sae_type": "sae", "d_model": D_IN, "expansion_factor": 3.0, "act_fn": act_fn, "top_k": 4}
                    cfg |= {"norm_activation": how, "sparsity_include_decoder_norm": by_norm, "use_decoder_bias": True}
                    cfg |= {"hook_point_in": hooks[0], "hook_point_out": hooks[-1]}
                    (path / "config.json").write_text(json.dumps(cfg))
                    tensors = {"W_E": w["W_enc"].T, "b_E": w["b_enc"], "W_D": w["W_dec"], "b_D": w["b_dec"]}
                    if act_fn == "jumprelu":
                        tensors["activation_function.log_jumprelu_threshold"] = log_threshold
                    factors = [D_IN**0.5 / norm for norm in (5.0, 3.0)]
                    for hook, factor in zip(hooks, factors, strict=False):
                        tensors[f"dataset_average_activation_norm.{hook}"] = torch.tensor(D_IN**0.5 / factor)
                    save_file({k: v.contiguous() for k, v in tensors.items()}, path / "sae_weights.safetensors")
                    norms = w["W_dec"].norm(dim=1) if by_norm else torch.ones(D_SAE)

                    def run(x: Tensor) -> tuple[Tensor, Tensor]:
                        into, out = torch.ones(1, 1), torch.ones(1, 1)
                        if how == "dataset-wise":
                            into, out = torch.tensor(factors[0]), torch.tensor(factors[transcodes])
                        if how == "token-wise":
                            into = D_IN**0.5 / x.norm(dim=1, keepdim=True)
                            out = torch.ones(1, 1) if transcodes else into
                        u = (into * x @ w["W_enc"].T + w["b_enc"]) * norms
                        z = {"relu": u.relu(), "topk": topk(u, 4), "jumprelu": jump(u, log_threshold.exp())}[
                            act_fn
                        ] / norms
                        return z, (z @ w["W_dec"] + w["b_dec"]) / out

                    origin: dict[str, Any] = dict(zip(("hook_name", "hook_name_out"), hooks, strict=False))
                    return Foreign(path, "llamascopium", run, origin=origin)


for how in ("dataset-wise", "inference"):

    @case(f"llamascopium crosscoder, {how}")
    def _(path: Path, how: str = how) -> Foreign:
        W_E, W_D, b_E, b_D = rand(2, D_IN, D_SAE), rand(2, D_SAE, D_IN), rand(2, D_SAE), rand(2, D_IN)
        path.mkdir(parents=True)
        hooks, sizes = ["blocks.1.hook_resid_post", "blocks.2.hook_resid_post"], (5.0, 9.0)
        cfg = {
            "sae_type": "crosscoder",
            "d_model": D_IN,
            "expansion_factor": 3.0,
            "act_fn": "relu",
            "norm_activation": how,
        }
        (path / "config.json").write_text(json.dumps(cfg | {"hook_points": hooks}))
        norms = {
            f"dataset_average_activation_norm.{h}": torch.tensor(size) for h, size in zip(hooks, sizes, strict=True)
        }
        save_file({"W_E": W_E, "W_D": W_D, "b_E": b_E, "b_D": b_D, **norms}, path / "sae_weights.safetensors")
        by = torch.tensor([D_IN**0.5 / size for size in sizes])[:, None] if how == "dataset-wise" else torch.ones(2, 1)

        def run(x: Tensor) -> tuple[Tensor, Tensor]:
            z = (torch.einsum("nhd,hdm->nm", x * by, W_E) + b_E.sum(0)).relu()
            return z, (torch.einsum("nm,hmd->nhd", z, W_D) + b_D) / by

        origin = {"hook_names": hooks, "hook_name": hooks[-1]}
        return Foreign(path, "llamascopium", run, origin=origin, n_sources=2)


@case("qwen_scope")
def _(path: Path) -> Foreign:
    w, folder = weights(), path / "SAE-Res-Qwen3-1.7B-Base-W32K-L0_4"
    folder.mkdir(parents=True)
    torch.save(
        {"W_enc": w["W_enc"], "W_dec": w["W_dec"].T, "b_enc": w["b_enc"], "b_dec": w["b_dec"]}, folder / "layer7.sae.pt"
    )
    origin = {"hook_name": "blocks.7.hook_resid_post", "model": {"name": "Qwen/Qwen3-1.7B-Base"}}
    run = lens_sae(lambda u, w: topk(u, 4), False)
    return Foreign(folder / "layer7.sae.pt", "qwen_scope", run, origin=origin, assumed=("prepend_bos",))


@case("mwhanna")
def _(path: Path) -> Foreign:
    w, folder = weights(), path / "qwen3-4b-transcoders"
    folder.mkdir(parents=True)
    save_file(w, folder / "layer_7.safetensors")
    (folder / "config.yaml").write_text("model_name: Qwen/Qwen3-4B\n")
    origin = {
        "hook_name": "blocks.7.mlp.hook_in",
        "hook_name_out": "blocks.7.hook_mlp_out",
        "model": {"name": "Qwen/Qwen3-4B"},
    }
    run = lens_sae(lambda u, w: u.relu(), False)
    return Foreign(folder / "layer_7.safetensors", "mwhanna", run, origin=origin, assumed=("prepend_bos",))


@case("mntss")
def _(path: Path) -> Foreign:
    w, W_dec = weights(), rand(D_SAE, 3, D_IN, seed=4)
    path.mkdir(parents=True)
    encoder = {"W_enc_1": w["W_enc"], "b_enc_1": w["b_enc"], "b_dec_1": w["b_dec"]}
    save_file(encoder, path / "W_enc_1.safetensors")
    save_file({"W_dec_1": W_dec}, path / "W_dec_1.safetensors")
    named = "model_name: google/gemma-2-2b\nfeature_input_hook: mlp.hook_in\nfeature_output_hook: hook_mlp_out\n"
    (path / "config.yaml").write_text(named)

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        z = (x @ w["W_enc"].T + w["b_enc"]).relu()
        return z, z @ W_dec[:, 0] + w["b_dec"]

    origin = {"hook_name": "blocks.1.mlp.hook_in", "model": {"name": "google/gemma-2-2b"}}
    return Foreign(path / "W_enc_1.safetensors", "mntss", run, origin=origin, assumed=("prepend_bos",), partial=True)
