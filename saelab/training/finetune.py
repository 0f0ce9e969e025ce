"""`saelab.finetune`: train an SAE inside its model, so that the model predicts the same with it as without.

After Braun et al. 2024 ("Identifying functionally important features with end-to-end sparse dictionary learning"), who train
SAEs from scratch by the KL divergence of the model's outputs with an L1 penalty, and Karvonen 2025 ("Revisiting end-to-end sparse
autoencoder training: a short finetune is all you need", arXiv 2503.17272), who finetunes trained SAEs briefly by KL + MSE. Ours:
the FVU in place of the MSE, a fixed weight instead of balancing both losses, the mask, and a tenth of the learning rate.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import math
from pathlib import Path
from typing import Any

import torch

from saelab.activation_cache.layout import config_hash
from saelab.evaluation.heldout import open_score_stream, own_texts
from saelab.identity import of_scoring
from saelab.models.differentiable import check_editable
from saelab.models.language_model import LanguageModel
from saelab.saes import SAE, VARIANTS
from saelab.saes.provenance import Provenance
from saelab.saes.selection import SelectionSAE
from saelab.saes.trained_hooks import check_is_sae
from saelab.tokens import Texts, check_split, load_texts
from saelab.tokens.mask import NORM_RULE_ROWS
from saelab.tokens.packing import PACKED
from saelab.training.config import TrainConfig
from saelab.training.contexts import BLOCK, Contexts
from saelab.training.data import open_data
from saelab.training.data_source import DataSource, Moments
from saelab.training.dead_features import PERIODS, TYPICAL_L0
from saelab.training.kept_out import LARGEST_SHARE
from saelab.training.loop import train
from saelab.training.optimizer import learning_rate
from saelab.training.sae_run import device_of, variant_of
from saelab.training.spliced_step import SplicedTraining

_LOG = logging.getLogger("saelab")

LR_SHARE = 0.1
"""Learning rate of a finetuning, as a fraction of the one that a new SAE is trained at."""


def finetune(
    sae: SAE,
    lm: LanguageModel,
    train_config: TrainConfig,
    out_dir: str | Path | None = None,
    *,
    texts: Any = None,
    split: str = "train",
    fvu_weight: float = 1.0,
    kl_weight: float = 1.0,
    progress: bool = True,
) -> SAE:
    """A copy of a trained SAE, trained further inside `lm` by `kl_weight` times the KL plus `fvu_weight` times its own loss.

    `texts=None` are those the SAE was trained on. `train_config.n_tokens` and `batch_size` count tokens of whole contexts, as
    long as those of the SAE's training; its `lr` is by default a tenth of the variant's own, and no feature counts as dead before
    it was silent for 400 mean intervals. Like `train`, a repeated call resumes bit for bit, and `out_dir` is an SAE folder.

    Raises `ValueError` for a variant that cannot be trained in a model, another model than that of the SAE, a hook that cannot be
    edited, and bad arguments, before anything is written.
    """
    _check_sae(sae, lm)
    if train_config.lr is None:
        peak = learning_rate(
            dataclasses.replace(train_config, warmup_steps=0, decay_fraction=0.0), sae.base_lr, sae.d_sae, 0
        )
        train_config = dataclasses.replace(train_config, lr=LR_SHARE * peak)
    if train_config.dead_after_tokens is None:
        l0 = sae.expected_l0(sae.config) or TYPICAL_L0
        train_config = dataclasses.replace(train_config, dead_after_tokens=math.ceil(PERIODS * sae.d_sae / l0))
    return _train(sae, lm, train_config, out_dir, texts, split, kl_weight, fvu_weight, progress)


def train_end_to_end(
    config: Any,
    data: Any,
    lm: LanguageModel,
    train_config: TrainConfig,
    out_dir: str | Path | None = None,
    *,
    texts: Any = None,
    split: str = "train",
    hook_name: str | None = None,
    fvu_weight: float = 1.0,
    kl_weight: float = 1.0,
    progress: bool = True,
) -> SAE:
    """Train a new SAE of `config` inside `lm` from its first step on. `data`, a cache, its path or a stream, says which hook,
    texts and mask, and what the input's mean and scale are; its rows are not read. All else is as in `finetune`."""
    if not _can_be_trained(variant_of(config)):
        raise _cannot_be_trained(variant_of(config).variant)
    if DataSource.whitens(config):
        raise ValueError(
            f"normalize={config.normalize!r} needs rows to whiten by, which are not read here: use 'center_and_scale', or train "
            "with saelab.train and finetune that."
        )
    view = open_data(data, hook_name).view(variant_of(config), config)
    sae = variant_of(config)(config, view.d_in, seed=train_config.seed)
    sae.set_normalization(*view.moments)
    sae.start_from(*view.moments)
    sae.provenance = Provenance(origin=view.origin)
    return _train(sae, lm, train_config, out_dir, texts, split, kl_weight, fvu_weight, progress)


def _train(
    sae: SAE,
    lm: LanguageModel,
    train_config: TrainConfig,
    out_dir: str | Path | None,
    texts: Any,
    split: str,
    kl_weight: float,
    fvu_weight: float,
    progress: bool,
) -> SAE:
    """Check everything, then train on a source of contexts."""
    _check_sae(sae, lm)
    weights = {"kl_weight": kl_weight, "fvu_weight": fvu_weight}
    for name, weight in weights.items():
        if not 0 <= weight < math.inf:
            raise ValueError(f"{name}={weight} must be a number from 0 on.")
    if not any(weights.values()):
        raise ValueError("kl_weight and fvu_weight are both 0: there is nothing to train by.")
    check_split(split)
    source = own_texts(sae.provenance.origin, lm) if texts is None else load_texts(texts)
    if progress:
        _LOG.info(f"Reading {source.describe(split)}")
    contexts = _open_contexts(sae, lm, source, split, predicts=kl_weight > 0)
    _check_sizes(train_config, contexts.ctx_len)
    if train_config.device is None and device_of(train_config) != lm.device:
        train_config = dataclasses.replace(train_config, device=str(lm.device))
    if device_of(train_config) != lm.device:
        raise ValueError(f"device={train_config.device!r}, but {lm.name} is on {lm.device}: train where the model is.")
    made = functools.partial(SplicedTraining, lm=lm, **weights)
    data = _as_source(sae, contexts, made, weights)
    data.held_bytes = 16 * lm.d_vocab * train_config.batch_size * bool(kl_weight)
    return train(sae.config, data, train_config, out_dir, progress=progress)


def _check_sae(sae: SAE, lm: LanguageModel) -> None:
    """Raise `ValueError` for an SAE that cannot be trained in this model."""
    check_is_sae(sae, "finetune")
    if not _can_be_trained(type(sae)):
        raise _cannot_be_trained(sae.variant)
    then = sae.provenance.origin.get("model") or {}
    if then.get("hash", lm.hash) != lm.hash:
        raise ValueError(
            f"The SAE was trained on {then.get('name')}, whose weights are not those of {lm.name}: finetune it in its own model."
        )


def _can_be_trained(variant: type[SAE]) -> bool:
    """Whether it selects, and reconstructs the one hook that it reads."""
    return issubclass(variant, SelectionSAE) and variant.trains_in_model and not variant.extra_dims


def _cannot_be_trained(variant: str) -> ValueError:
    able = ", ".join(name for name, one in VARIANTS.items() if _can_be_trained(one))
    return ValueError(f"{variant} cannot be trained inside a model; {able} can.")


def _open_contexts(sae: SAE, lm: LanguageModel, texts: Texts, split: str, predicts: bool) -> Contexts:
    """The contexts, with the mask of the SAE's training. Raises `ValueError` if the SAE does not fit."""
    origin = sae.provenance.origin
    width = int(origin.get("ctx_len") or min(256, lm.max_ctx))
    n_tokens = max(NORM_RULE_ROWS, width)
    opened = open_score_stream(sae, lm, texts, split=split, allow_train=True, n_tokens=n_tokens, ctx_len=width)
    (hook_name,) = opened.hooks.all
    check_editable(lm, [hook_name])
    packing = origin.get("packing", PACKED)
    return Contexts(lm, texts, split, hook_name, opened.mask, width, opened.prepend_bos, packing, predicts)


def _check_sizes(train_config: TrainConfig, ctx_len: int) -> None:
    n, rest = divmod(train_config.batch_size, ctx_len)
    if rest or not n:
        raise ValueError(
            f"batch_size={train_config.batch_size} must be a multiple of the context length, {ctx_len} tokens: a step reads "
            f"whole contexts. Use {max(n, 1) * ctx_len}."
        )
    if n % train_config.grad_accumulation:
        raise ValueError(f"grad_accumulation={train_config.grad_accumulation} must divide the {n} contexts of a batch.")
    if train_config.feature_shards > 1:
        raise ValueError(f"feature_shards={train_config.feature_shards}: an SAE in its model is trained whole, use 1.")


def _as_source(sae: SAE, contexts: Contexts, made: Any, weights: dict[str, float]) -> DataSource:
    hooks = sae.hooks(sae.config, [contexts.hook_name])
    known = of_scoring(sae, contexts.lm, contexts.texts)
    del known["model"]["logits_probe"]  # its last digits depend on the machine
    known |= {"split": contexts.split, "block": BLOCK, "held_out": LARGEST_SHARE}
    named = " ".join(f"{name} {weight}" for name, weight in weights.items())
    fingerprint = f"contexts {config_hash(known)} {named}"
    start = {"sae_hash": sae.hash, "training": _plain(sae.provenance.trained)}
    texts = {"texts": contexts.texts.spec or contexts.texts.name, "split": contexts.split}
    model = {"model": {"name": contexts.lm.name, "hash": contexts.lm.hash}}
    origin = model | dict(sae.provenance.origin) | hooks.origin() | {"in_model": start | weights | texts}
    moments = Moments(torch.zeros(sae.d_in), torch.ones((), dtype=torch.float64))  # those of `start` replace them
    return DataSource(
        moments=lambda _: moments,
        batches=contexts.batches,
        choose=lambda *_: hooks,
        identity=lambda _: (fingerprint, origin),
        documents=lambda: torch.cat([sae.provenance.train_documents, contexts.documents]).unique(),
        kept_out=contexts.kept_out if contexts.has_held_out else None,
        start=sae,
        make_step=made,
    )


def _plain(values: Any) -> Any:
    """As JSON holds it."""
    return json.loads(json.dumps(dict(values)))
