"""`import_sae`: puts an SAE of another library into a RUN folder, after checking it on real activations."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saelab.errors import SaelabError
from saelab.evaluation.heldout import open_score_stream
from saelab.evaluation.report import Report, evaluate
from saelab.interop.blueprint import Blueprint
from saelab.interop.check import Check, check, context_length, with_check
from saelab.interop.hub import HubSource, parse
from saelab.interop.reading import build_from, read_blueprint
from saelab.interop.source import LocalSource, Source
from saelab.io import save_sae
from saelab.models import LanguageModel
from saelab.saes import SAE
from saelab.tokens import load_texts
from saelab.tokens.tokenizing import resolved_bos

_GOLDEN = 1024


class Imported(NamedTuple):
    """Where the SAE is, and what the check found."""

    folder: Path
    sae: SAE
    check: Check
    report: Report | None
    """L0, FVU and loss recovered on the same tokens; None for a part of a cross-layer transcoder."""


def open_source(source: str | Path, revision: str | None = None) -> Source:
    """The files at a path or hub id. Raises `SaelabError` if there is neither."""
    if Path(source).exists():
        return LocalSource(source)
    where = parse(str(source))
    if where is None:
        raise SaelabError(f"{source} does not exist, and is no id of the hub (org/repo/path).")
    return HubSource(where, revision)


def import_sae(
    source: str | Path,
    run: str | Path,
    lm: LanguageModel,
    texts: Any = "demo",
    *,
    format: str | None = None,
    assume: Mapping[str, Any] | None = None,
    revision: str | None = None,
    n_tokens: int = 4096,
    progress: bool = True,
) -> Imported:
    """Read an SAE, check it on `n_tokens` tokens of `texts` (`check.py`), and save it in RUN/sae.

    Its `sae.json` then names the model and the texts, so that every command works on RUN. Raises `SaelabError` if RUN holds
    another SAE, `ValueError` if model and SAE do not fit; RUN is then left as it was.
    """
    files = open_source(source, revision)
    plan = read_blueprint(files, format, assume)
    folder = _free(Path(run), plan)
    corpus = load_texts(texts)
    plan = _completed(plan, lm, corpus.spec)
    found = check(plan, lm, corpus, n_tokens, progress=progress)
    sae = with_check(build_from(plan, files.label), found)
    report = None
    if not plan.origin.get("partial"):
        sizes: dict[str, Any] = {
            "n_tokens": n_tokens,
            "n_tokens_ce": min(n_tokens, 1024),
            "ctx_len": context_length(plan, lm),
        }
        report = evaluate(sae, lm, corpus, split="all", progress=progress, **sizes)
    save_sae(sae, folder, golden_inputs=_golden_rows(sae, plan, lm, corpus))
    return Imported(folder, sae, found, report)


def _free(run: Path, plan: Blueprint) -> Path:
    """RUN/sae, unless it holds another SAE."""
    folder = run / "sae"
    if (folder / "sae.json").exists():
        from saelab.io import load_sae

        there = load_sae(folder).provenance.origin.get("imported") or {}
        if there.get("weights_sha256") != plan.origin["imported"]["weights_sha256"]:
            raise SaelabError(f"{folder} holds another SAE: import into another RUN folder, or remove it.")
    return folder


def _completed(plan: Blueprint, lm: LanguageModel, texts: dict[str, Any] | None) -> Blueprint:
    """With the model that is used, how it reads texts, and the texts."""
    origin = dict(plan.origin)
    if not origin.get("hook_name"):
        raise SaelabError(
            f"{origin['imported']['source']} does not say which hook it reads: pass --assume hook_name=blocks.N.hook_resid_post "
            "(in Python assume={'hook_name': ...})."
        )
    if origin.get("prepend_bos") is None:
        origin["prepend_bos"] = resolved_bos(lm, None)
        origin["imported"] = _assumed(origin["imported"], prepend_bos=bool(origin["prepend_bos"]))
    elif origin["prepend_bos"]:
        origin["prepend_bos"] = resolved_bos(lm, True)
    origin |= {"model": {"name": lm.name, "hash": lm.hash}, "tokenizer_hash": lm.tokenizer_hash, "texts": texts}
    origin["ctx_len"] = context_length(plan, lm)
    return dataclasses.replace(plan, origin=origin)


def _assumed(imported: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    return {**imported, "assumed": {**imported["assumed"], **more}}


@torch.no_grad()
def _golden_rows(sae: SAE, plan: Blueprint, lm: LanguageModel, texts: Any) -> Tensor:
    """Activations of real tokens."""
    stream = open_score_stream(sae, lm, texts, split="all", n_tokens=4 * _GOLDEN, ctx_len=context_length(plan, lm))
    rows, n = [], 0
    for _, batch, keep in stream.pairs():
        rows.append(batch.x[keep.to(batch.x.device)].float().cpu())
        n += len(rows[-1])
        if n >= _GOLDEN:
            break
    return torch.cat(rows)[:_GOLDEN]
