"""`saelab.collect_features`: one pass over held-out tokens, from texts to a finished feature store."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.distributed import rank_and_world_size
from saelab.errors import StoreError
from saelab.evaluation.heldout import ScoreStream, check_scoring, open_score_stream
from saelab.features import schema
from saelab.features.collecting.collector import Collector
from saelab.features.collecting.promoted import top_logits
from saelab.features.collecting.shared_pass import SharedPass, read_state
from saelab.features.collecting.writer import write_store
from saelab.features.manifest import read_manifest
from saelab.features.store import FeatureStore
from saelab.files import claim_folder, locked, writing
from saelab.identity import ANY, differences, of_scoring, refusal, scoring_absent
from saelab.models import LanguageModel
from saelab.models.multi_model import locate, together
from saelab.saes import SAE
from saelab.tokens import Texts, load_texts

_LOG = logging.getLogger("saelab")


def collect_features(
    sae: SAE,
    lm: LanguageModel | Sequence[LanguageModel],
    texts: Any = None,
    *,
    out_dir: str | Path,
    split: str | None = None,
    hook_name: str | Sequence[str] | None = None,
    n_tokens: int | None = None,
    ctx_len: int | None = None,
    batch_size: int = 16,
    top_k: int = 20,
    renew: bool = False,
    progress: bool = True,
) -> FeatureStore:
    """Collect statistics, examples and logits of every feature into a store in `out_dir`, and open it.

    `texts=None` reads the held-out tenth of the SAE's own text source; other texts are read whole; `split` overrides both.
    Packing, mask, `lm` and `hook_name` are as in `saelab.evaluate`. `n_tokens` is in whole contexts; `top_k` examples are kept
    per feature. The same call returns a finished store.

    An interrupted pass goes on, processes that torchrun started share it, and a larger `n_tokens` extends a finished store.
    `renew=True` replaces what is there. Raises `ValueError` if the SAE does not fit the model, no token is left, or `out_dir`
    holds something else; `StoreError` if it holds a store made with other arguments, naming them.
    """
    numbers = {"n_tokens": n_tokens, "top_k": top_k, "batch_size": batch_size}
    check_scoring(sae, lm := together(lm), **numbers)
    out_dir = _claimed(Path(out_dir))
    request = _request(sae, lm, source := _source(sae, lm, texts), split, hook_name, ctx_len) | numbers
    if (out_dir / schema.MANIFEST).exists() and not renew and not _extends(out_dir, request):
        _refuse_other_request(out_dir, request)
        return FeatureStore(out_dir, sae)
    stream = open_score_stream(
        sae, lm, source, split=split, allow_train=True, hook_name=hook_name,
        n_tokens=n_tokens, ctx_len=ctx_len, batch_size=batch_size,
    )  # fmt: skip
    with _writing_store(out_dir):
        if renew:
            _forget(out_dir)
        return _collected(sae, stream, out_dir, request, top_k, progress)


def _writing_store(out_dir: Path) -> AbstractContextManager[None]:
    """Hold the store's lock, on rank 0 for all ranks."""
    busy = f"Another process collects or reads the features in {out_dir}: wait until it has ended, or cancel it."
    return nullcontext() if rank_and_world_size()[0] else locked(out_dir, busy)


def _claimed(out_dir: Path) -> Path:
    """The folder, which is new, empty, or holds a store or the state of an unfinished one."""
    begun = sorted(out_dir.glob("state*.safetensors")) if not (out_dir / schema.MANIFEST).exists() else []
    return claim_folder(out_dir, begun[0].name if begun else schema.MANIFEST, "feature store").resolve()


def _collected(
    sae: SAE, stream: ScoreStream, out_dir: Path, request: dict[str, Any], top_k: int, progress: bool
) -> FeatureStore:
    before = _changed_at(out_dir / schema.MANIFEST)
    pass_ = SharedPass(out_dir, request, (sae.d_sae, stream.batches[0].ids.shape[1], top_k))
    for path in pass_.files():
        _refuse_other_state(path, request)
    _LOG.info(f"Collecting features on {stream.texts.describe(stream.split)}")
    with torch.inference_mode():
        state, masked = pass_.run(sae, stream, progress)
    if pass_.rank:
        wait_for(out_dir / schema.MANIFEST, before)
        return FeatureStore(out_dir, sae)
    if not state.n_tokens:
        raise ValueError(f"The mask leaves no token of {stream.texts.name}: {masked}. Give more text.")
    stream.n_tokens, stream.n_masked = state.n_tokens, masked
    manifest = _manifest(sae, stream, state, out_dir) | {"request": request, "top_k": top_k}
    if progress:
        _LOG.info(f"Labelling {sae.d_sae:,} features and writing their store to {out_dir}")
    logits = top_logits(sae, stream.lm, stream.hook_name)
    (out_dir / schema.MANIFEST).unlink(missing_ok=True)  # that of the store which is extended
    with writing(out_dir):
        write_store(out_dir, manifest, state, logits, _cosine(sae), stream)
    return FeatureStore(out_dir, sae)


def wait_for(path: Path, before: int | None) -> None:
    """Wait until another process has written a file, which was there `before` if its store is extended."""
    while _changed_at(path) in (None, before):
        time.sleep(0.5)


def _changed_at(path: Path) -> int | None:
    return path.stat().st_mtime_ns if path.exists() else None


def _forget(out_dir: Path) -> None:
    """Remove a store, its manifest first. Raises `ValueError` where other processes may have begun it already."""
    if rank_and_world_size()[1] > 1:
        raise ValueError(f"renew=True would remove what other processes write to {out_dir}: renew with one process.")
    for name in (schema.MANIFEST, schema.DATABASE, schema.TOKENS, schema.SAMPLE):
        (out_dir / name).unlink(missing_ok=True)
    for path in out_dir.glob("state*.safetensors"):
        path.unlink()


def _source(sae: SAE, lm: LanguageModel, texts: Any) -> Texts:
    if texts is None:
        texts = sae.provenance.origin.get("texts")
        if texts is None:
            raise ValueError("This SAE has no text source (it was trained on bare tensors): pass texts.")
        return load_texts(texts, chat=lm)
    return load_texts(texts)


def _request(
    sae: SAE,
    lm: LanguageModel,
    source: Texts,
    split: str | None,
    hook_name: str | Sequence[str] | None,
    ctx_len: int | None,
) -> dict[str, Any]:
    """What identifies a store, apart from the numeric arguments of the call."""
    return {
        "sae_hash": sae.hash,
        "model_hash": lm.hash,
        "hook_name": (hook_name if isinstance(hook_name, str) else ", ".join(hook_name or ()))
        or sae.provenance.origin.get("hook_name"),
        "texts": source.fingerprint(),
        "ctx_len": ctx_len or sae.provenance.origin.get("ctx_len") or 256,
        "split": split or ("held_out" if source.spec == sae.provenance.origin.get("texts") else "all"),
        "scoring": of_scoring(sae, lm, source),
    }


def _refuse_other_request(out_dir: Path, request: dict[str, Any]) -> None:
    manifest = read_manifest(out_dir)
    absent = {f"scoring.{key}": value for key, value in scoring_absent(manifest.get("tokenizer_hash")).items()}
    different = differences(manifest.get("request", {}), request, {"scoring": ANY, **absent})
    if different:
        elsewhere = "pass renew=True (--renew) to replace it, or in Python give another out_dir"
        raise StoreError(refusal(out_dir, "feature store", different, elsewhere))


def _extends(out_dir: Path, request: dict[str, Any]) -> bool:
    """Whether the store there is of the same request but for fewer tokens."""
    then = read_manifest(out_dir).get("request", {})
    few, many = then.get("n_tokens"), request["n_tokens"]
    grows = few is not None and (many is None or many > few) and (out_dir / schema.STATE).exists()
    return grows and not differences({**then, "n_tokens": many}, request, {})


def _refuse_other_state(path: Path, request: dict[str, Any]) -> None:
    then, _ = read_state(path)
    if different := differences({**then, "n_tokens": request["n_tokens"]}, json.loads(json.dumps(request)), {}):
        elsewhere = "pass renew=True (--renew) to begin again, or in Python give another out_dir"
        raise StoreError(refusal(path.parent, "unfinished feature store", different, elsewhere))


def _cosine(sae: SAE) -> Float[Tensor, " d_sae"]:
    """Cosine between each feature's encoder and decoder rows (all sources concatenated); NaN where their widths differ."""
    encoder, decoder = (W.detach().float().transpose(0, -2).flatten(1) for W in (sae.W_enc, sae.W_dec))
    if encoder.shape != decoder.shape:
        return torch.full((sae.d_sae,), torch.nan)
    return torch.cosine_similarity(encoder, decoder, dim=1).clamp(-1, 1).cpu()


def _manifest(sae: SAE, stream: ScoreStream, state: Collector, out_dir: Path) -> dict[str, Any]:
    folder = None
    if sae.provenance.folder is not None:
        folder = os.path.relpath(Path(sae.provenance.folder).resolve(), out_dir.resolve())
    nnz = int(state.ends.n_fired.sum())
    lm, _ = locate(stream.lm, stream.hook_name)
    products = {} if sae.additive else {"additive": False}
    sizes = {"d_sae": sae.d_sae, "d_in": sae.d_in}
    return {
        "sae": {"hash": sae.hash, "variant": sae.variant, **sizes, "folder": folder, **products},
        "hook_name": stream.hook_name,
        "sites": {"reads": list(stream.hooks.inputs), "writes": list(stream.hooks.outputs)},
        "model": {"name": lm.name, "hash": lm.hash},
        "n_heads": lm.backend.n_heads,
        "tokenizer_hash": stream.lm.tokenizer_hash,
        "texts": {"name": stream.texts.name, "spec": stream.texts.spec, "fingerprint": stream.texts.fingerprint()},
        "split": stream.split,
        "ctx_len": state.ctx_len,
        "prepend_bos": stream.prepend_bos,
        "mask": {"max_norm": stream.max_norm, "rule": stream.mask_rule},
        "n_tokens": stream.n_tokens,
        "n_masked": stream.n_masked,
        "n_documents": len({int(doc) for batch in stream.batches for doc in batch.doc.unique()} - {-1}),
        "n_sequences": sum(len(batch.ids) for batch in stream.batches),
        "nnz": nnz,
        "signed": state.ends.negative is not None,
        "l0": nnz / stream.n_tokens,
    }
