"""`saelab.collect_features`: one pass over held-out tokens, from texts to a finished feature store."""

from __future__ import annotations

import logging
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from saelab.errors import ModelError, SaelabError, StoreError
from saelab.evaluation.heldout import ScoreStream, check_scoring, open_score_stream
from saelab.features import schema
from saelab.features.manifest import read_manifest
from saelab.features.signed import SignedAccumulator
from saelab.features.store import FeatureStore
from saelab.features.writer import write_store
from saelab.files import claim_folder, fsync_dir, remove_leftovers, temporary_path, writing
from saelab.identity import ANY, differences, of_scoring, refusal, scoring_absent
from saelab.models import LanguageModel
from saelab.models.hooks import writes_to_residual
from saelab.models.multi_model import locate, together
from saelab.saes import SAE
from saelab.tokens import Texts, load_texts

_LOG = logging.getLogger("saelab")

TOP_LOGITS = 15


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
    progress: bool = True,
) -> FeatureStore:
    """Collect statistics, top examples and logits of every feature into a store in `out_dir`, and open it.

    `texts=None` reads the held-out tenth of the SAE's own text source; other texts are read whole; `split` overrides both.
    Packing, mask, `lm` and `hook_name` are as in `saelab.evaluate`. `n_tokens` is in whole contexts; `top_k` examples are kept
    per feature. The same call returns a finished store.

    Raises `ValueError` if the SAE does not fit the model, no token is left, or `out_dir` holds something else; `StoreError`
    if it holds a store made with other arguments, naming them.
    """
    numbers = {"n_tokens": n_tokens, "top_k": top_k, "batch_size": batch_size}
    check_scoring(sae, lm := together(lm), **numbers)
    out_dir = claim_folder(out_dir, schema.MANIFEST, "feature store").resolve()
    request = _request(sae, lm, source := _source(sae, lm, texts), split, hook_name, ctx_len) | numbers
    if (out_dir / schema.MANIFEST).exists():
        _refuse_other_request(out_dir, request)
        return FeatureStore(out_dir, sae)
    _check_replaceable(out_dir)
    stream = open_score_stream(
        sae, lm, source, split=split, allow_train=True, hook_name=hook_name,
        n_tokens=n_tokens, ctx_len=ctx_len, batch_size=batch_size,
    )  # fmt: skip
    top_logits, state = _top_logits(sae, lm, stream.hook_name), _run(sae, stream, top_k, progress)
    with _finished_folder(out_dir) as building:
        manifest = _manifest(sae, stream, state, out_dir) | {"request": request, "top_k": top_k}
        write_store(building, manifest, state, top_logits, _cosine(sae), stream)
    return FeatureStore(out_dir, sae)


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
        elsewhere = "remove that folder, or in Python give another out_dir"
        raise StoreError(refusal(out_dir, "feature store", different, elsewhere))


@torch.inference_mode()
def _run(sae: SAE, stream: ScoreStream, top_k: int, progress: bool) -> SignedAccumulator:
    _LOG.info(f"Collecting features on {stream.texts.describe(stream.split)}")
    ctx_len = stream.batches[0].ids.shape[1]
    state = SignedAccumulator(sae.d_sae, ctx_len, top_k)
    total = sum(int((batch.doc >= 0).sum()) for batch in stream.batches)
    with tqdm(total=total, unit="token", unit_scale=True, desc="Features", disable=not progress) as bar:
        for tokens, activations, keep in stream:
            rows = activations[keep]  # (kept, *sources, d_in)
            where = keep.cpu().flatten()
            number = torch.arange(len(where)) + tokens.first_context * ctx_len
            feature_acts = sae.encode(rows.float()).detach()
            feature_acts = type(feature_acts)(
                feature_acts.values.cpu(), feature_acts.features.cpu(), feature_acts.offsets.cpu(), feature_acts.d_sae
            )
            state.update(feature_acts, number[where], tokens.doc.flatten()[where])
            bar.update(int((tokens.doc >= 0).sum()))
    if not stream.n_tokens:
        raise ValueError(f"The mask leaves no token of {stream.texts.name}: {stream.n_masked}. Give more text.")
    return state


@torch.inference_mode()
def _top_logits(sae: SAE, lm: LanguageModel, hook_name: str) -> dict[str, Tensor] | None:
    """Ids and logit changes of the tokens each decoder row promotes and suppresses most; None off the residual stream.

    The logit change is the direct effect of one unit along the decoder row: `logit_weights @ W_dec[f]`. A crosscoder's
    row is that of its last source. Warns, and returns None, where the logits do not follow from the unembedding.
    """
    if not writes_to_residual(hook_name):
        return None
    try:
        unembed = locate(lm, hook_name)[0].logit_weights().float().cpu()  # (vocab, d_model)
    except ModelError as error:
        warnings.warn(f"The store will hold no logits, so it cannot show what features promote. {error}", stacklevel=3)
        return None
    decoder, _ = sae.decoder()
    if unembed.shape[1] != decoder.shape[1]:
        return None
    n_top = min(TOP_LOGITS, len(unembed))
    parts = [_extremes(rows.float().cpu() @ unembed.T, n_top) for rows in decoder.detach().split(256)]
    names = ("positive", "positive_ids", "negative", "negative_ids")
    return {name: torch.cat(column) for name, column in zip(names, zip(*parts, strict=True), strict=True)}


def _extremes(
    logits: Float[Tensor, "n vocab"], n_top: int
) -> tuple[Float[Tensor, "n top"], Int[Tensor, "n top"], Float[Tensor, "n top"], Int[Tensor, "n top"]]:
    highest, lowest = logits.topk(n_top, 1), logits.topk(n_top, 1, largest=False)
    return highest.values, highest.indices, lowest.values, lowest.indices


def _cosine(sae: SAE) -> Float[Tensor, " d_sae"]:
    """Cosine between each feature's encoder and decoder rows (all sources concatenated); NaN where their widths differ."""
    encoder, decoder = (W.detach().float().transpose(0, -2).flatten(1) for W in (sae.W_enc, sae.W_dec))
    if encoder.shape != decoder.shape:
        return torch.full((sae.d_sae,), torch.nan)
    return torch.cosine_similarity(encoder, decoder, dim=1).clamp(-1, 1).cpu()


def _manifest(sae: SAE, stream: ScoreStream, state: SignedAccumulator, out_dir: Path) -> dict[str, Any]:
    folder = None
    if sae.provenance.folder is not None:
        folder = os.path.relpath(Path(sae.provenance.folder).resolve(), out_dir.resolve())
    nnz = int(state.n_fired.sum())
    lm, _ = locate(stream.lm, stream.hook_name)
    return {
        "sae": {"hash": sae.hash, "variant": sae.variant, "d_sae": sae.d_sae, "d_in": sae.d_in, "folder": folder},
        "hook_name": stream.hook_name,
        "sites": {"reads": list(stream.hooks.inputs), "writes": list(stream.hooks.outputs)},
        "model": {"name": lm.name, "hash": lm.hash},
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
        "signed": state.negative is not None,
        "l0": nnz / stream.n_tokens,
    }


def _check_replaceable(out_dir: Path) -> None:
    """Raise `SaelabError` before the pass over all tokens when `out_dir` cannot be replaced by the finished folder."""
    if out_dir == Path.cwd():
        raise SaelabError(f"{out_dir} is the current directory, which cannot be replaced: give a new folder inside it.")
    with _finished_folder(out_dir):
        pass  # try it with an empty folder


@contextmanager
def _finished_folder(out_dir: Path) -> Iterator[Path]:
    """A hidden folder next to `out_dir` to build in; on a clean exit it replaces `out_dir`, which is empty."""
    building = temporary_path(out_dir)
    with writing(out_dir):
        remove_leftovers(out_dir.parent, out_dir.name)
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir()
        try:
            yield building
            fsync_dir(building)
            building.replace(out_dir)
            fsync_dir(out_dir.parent)
        finally:
            shutil.rmtree(building, ignore_errors=True)
