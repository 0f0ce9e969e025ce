"""`diff_report`: read held-out text with both models, and judge which features of their crosscoder belong to one of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from saelab.diffing import judging
from saelab.diffing.judged import DiffFeature
from saelab.diffing.measuring import Measured, Tokens, measure
from saelab.diffing.report import DiffReport
from saelab.evaluation.heldout import ScoreStream, check_scoring, open_score_stream
from saelab.features.sides import CLASSES
from saelab.features.token_text import display_groups
from saelab.models import LanguageModel
from saelab.models.multi_model import together
from saelab.saes import SAE, CrosscoderSAE
from saelab.saes.trained_hooks import hooks_of
from saelab.tokens import document_id, load_texts

N_BLOCKS = 32
"""Blocks of neighbouring contexts that are resampled for the intervals."""
_TOKENS_SHOWN = 8
_MOST_PLOTTED = 4000


def sources_to_compare(sae: SAE, a: int | str | None = None, b: int | str | None = None) -> tuple[int, int]:
    """The two sources of a crosscoder to compare, by number; `a` and `b` are numbers or hook names. Raises `ValueError` for an
    SAE of one source, and one of three or more unless both are named."""
    if not isinstance(sae, CrosscoderSAE) or sae.n_sources < 2:
        what = (
            f"This SAE (variant {sae.variant}) reads one source" if isinstance(sae, SAE) else f"sae={sae!r} is no SAE"
        )
        raise ValueError(
            f"{what}; a diff compares two. Harvest with both models, saelab.harvest([base, tuned], ...), and train a crosscoder "
            "on that cache: saelab train RUN --variant crosscoder."
        )
    names = _names(sae)
    if sae.n_sources > 2 and (a is None or b is None):
        raise ValueError(
            f"This crosscoder reads {sae.n_sources} sources, {', '.join(names)}: name two of them (--a and --b)."
        )
    found = [_source(one, default, names) for one, default in ((a, 0), (b, 1))]
    if found[0] == found[1]:
        raise ValueError(f"a={a!r} and b={b!r} are the same source, {names[found[0]]}: name two different ones.")
    return found[0], found[1]


def _names(sae: CrosscoderSAE) -> list[str]:
    try:
        return list(hooks_of(sae).inputs)
    except ValueError:  # trained on tensors
        return [f"source {number}" for number in range(sae.n_sources)]


def _source(given: int | str | None, default: int, names: Sequence[str]) -> int:
    if given is None:
        return default
    if isinstance(given, str) and given in names:
        return names.index(given)
    if str(given).isdecimal() and int(given) < len(names):
        return int(given)
    raise ValueError(
        f"{given!r} is no source of this crosscoder: give a number from 0 to {len(names) - 1}, or one of {', '.join(names)}."
    )


def diff_report(
    sae: SAE,
    lm: LanguageModel | Sequence[LanguageModel],
    texts: Any = None,
    *,
    a: int | str | None = None,
    b: int | str | None = None,
    changed: Any = None,
    store: Any = None,
    split: str | None = None,
    allow_train: bool = False,
    n_tokens: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool = True,
) -> DiffReport:
    """Judge the features of a crosscoder that look specific to source a or b by their decoder norms, on text that it was not
    trained on, as `saelab.evaluate` reads it.

    `lm` is the list of models, in the order of the harvest (one model for two layers of it). `changed` are texts that show what
    training changed, where that is known: the report then says which features fire in more of those among the documents read.
    `store` gives labels and tokens. Raises `ValueError` as `sources_to_compare` and `evaluate` do, and if no document read is
    among `changed`.
    """
    pair = sources_to_compare(sae, a, b)
    assert isinstance(sae, CrosscoderSAE)
    if store is not None and store.manifest["sae"]["hash"] != sae.hash:
        raise ValueError(f"The feature store {store.folder} is of another SAE: collect it again, or leave store out.")
    check_scoring(sae, lm := together(lm), n_tokens=n_tokens)
    stream = open_score_stream(
        sae, lm, texts, split=split, allow_train=allow_train, n_tokens=n_tokens, batch_size=batch_size
    )
    shows = None if changed is None else _that_show(stream, changed)
    blocks = min(N_BLOCKS, sum(len(batch.ids) for batch in stream.batches))
    found = measure(sae, _tokens(stream, blocks, progress), *pair, n_blocks=blocks, changed=shows, seed=seed)
    if not found.n_tokens.sum():
        raise ValueError(f"No token of {stream.texts.name} is left under the mask: {stream.n_masked}. Give more text.")
    return judged_report(sae, found, _about(sae, pair, stream), store, seed)


def _about(sae: CrosscoderSAE, pair: tuple[int, int], stream: ScoreStream) -> dict[str, Any]:
    """What is compared on which text."""
    names = _names(sae)
    about = {"a": names[pair[0]], "b": names[pair[1]], "sources": names, "kind": _kind(sae, names, pair)}
    return about | {"model": stream.lm.name, "texts": stream.texts.name, "split": stream.split}


def _that_show(stream: ScoreStream, changed: Any) -> set[int]:
    """The documents of the stream, by number, that are among these texts. Raises `ValueError` if none is."""
    known = {document_id(one) for one in load_texts(changed).documents("all", stream.lm)}
    if shows := {number for number, one in enumerate(stream.document_ids) if one in known}:
        return shows
    raise ValueError(
        f"None of the {len(stream.document_ids):,} documents of {stream.texts.name} that are read (split={stream.split!r}) "
        "is among the texts that show the change: both must hold the same documents, letter by letter."
    )


def judged_report(
    sae: CrosscoderSAE, found: Measured, about: Mapping[str, Any], store: Any = None, seed: int = 0
) -> DiffReport:
    """The report on what was measured."""
    counts = np.bincount(judging.kinds(found.delta), minlength=len(CLASSES)).tolist()
    fired, often = found.n_fired.sum(0), judging.enough(found)
    documents = found.documents
    changed = None
    if documents is not None:
        n_changed, n_other = documents.n
        changed = {"n_changed": n_changed, "n_other": n_other, "enough": min(documents.n) >= judging.MIN_DOCUMENTS}
    numbers = {
        "sae": sae.hash, "d_sae": sae.d_sae, "n_tokens": int(found.n_tokens.sum()), "n_blocks": len(found.n_tokens),
        "counts": dict(zip(CLASSES, counts, strict=True)), "n_dead": int((fired == 0).sum()),
        "n_rare": int(((fired > 0) & ~often).sum()), "baseline": judging.baseline(found), "changed": changed,
        "fvu": dict(zip("ab", found.fvu, strict=True)),
        "l0": float(found.n_fired.sum() / max(found.n_tokens.sum(), 1)),
        "norms": [float(np.nanmin(found.delta)), float(np.nanmax(found.delta))],
        "thresholds": {"nu_error": judging.NU_ERROR, "nu_reconstruction": judging.NU_RECONSTRUCTION,
                       "min_tokens": judging.MIN_TOKENS, "min_blocks": judging.MIN_BLOCKS},
    }  # fmt: skip
    features = [_labelled(one, store) for one in judging.judge(found, seed)]
    return DiffReport({**about, **numbers}, tuple(features), _cloud(found, often, seed))


def _tokens(stream: ScoreStream, n_blocks: int, progress: bool) -> Iterator[Tokens]:
    n_contexts = sum(len(batch.ids) for batch in stream.batches)
    bar = tqdm(stream.pairs(), "Diffing", total=len(stream.batches), disable=not progress)
    first = 0
    for tokens, batch, keep in bar:
        context = torch.arange(first, first + len(tokens.ids))
        first += len(tokens.ids)
        block = (context * n_blocks // n_contexts)[:, None].expand(tokens.ids.shape)
        kept = keep.cpu()
        yield Tokens(batch.x[keep.to(batch.x.device)].float(), block[kept], tokens.doc[kept])


def _kind(sae: CrosscoderSAE, names: Sequence[str], pair: tuple[int, int]) -> str:
    """ "models", or "layers" where both sources are of one model."""
    labels = {names[one].partition("/")[0] for one in pair}
    return "models" if sae.provenance.origin.get("models") and len(labels) == 2 else "layers"


def _labelled(one: DiffFeature, store: Any) -> DiffFeature:
    if store is None:
        return one
    ids = [token for token, _ in store.peak_tokens(one.feature)[:_TOKENS_SHOWN]]
    tokens = tuple(display_groups([piece])[0].text for piece in store.pieces(ids))
    return one._replace(label=store.feature(one.feature).label, tokens=tokens)


def _cloud(found: Measured, often: np.ndarray, seed: int) -> dict[str, list[Any]]:
    """Features that fire often enough, of very many a random few thousand and all candidates."""
    here = np.flatnonzero(often)
    candidates = here[np.isin(judging.kinds(found.delta[here]), (0, 2))]
    if len(here) > _MOST_PLOTTED:
        drawn = np.random.default_rng(seed).choice(here, _MOST_PLOTTED, replace=False)
        here = np.union1d(drawn, candidates)
    error, reconstruction = judging.nu(found)[:, here]
    values = {"delta": found.delta[here], "nu_error": error, "nu_reconstruction": reconstruction}
    return {"feature": here.tolist()} | {name: [round(float(one), 4) for one in row] for name, row in values.items()}
