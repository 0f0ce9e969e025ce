"""`probe_sets`: an SAE and labelled sets in, a report out. What is finished stays on disk, and the same call goes on."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from saelab.errors import SaelabError
from saelab.evaluation.heldout import bos_of
from saelab.files import locked
from saelab.models import LanguageModel
from saelab.probing.config import ProbeConfig
from saelab.probing.fitting import Outcome, best_feature, outcome
from saelab.probing.labelled_sets import GROUPS, LabelledSet, set_names
from saelab.probing.methods import columns_of, methods
from saelab.probing.regimes import Regime, split
from saelab.probing.report import Draw, ProbedSet, ProbeReport
from saelab.probing.rows import Harvest, Rows
from saelab.saes import SAE
from saelab.saes.trained_hooks import check_is_sae, hooks_of
from saelab.steering.trial_file import TrialFile
from saelab.steering.unsteered import refuse_steered
from saelab.tokens.tokenizing import context_start

ROWS = "rows"
_VERSION = 1


def probe_sets(
    sae: SAE,
    lm: Any,
    sets: Sequence[str | LabelledSet] = GROUPS,
    config: ProbeConfig | None = None,
    *,
    folder: str | Path,
    hook_name: str | Sequence[str] | None = None,
    progress: bool = True,
) -> ProbeReport:
    """Train probes on the activations that `sae` reads and on its features, and compare them on texts they have not seen.

    `sets` are names of sets or groups (`labelled_sets.py`), or sets of your own. Activations are kept in `folder/rows`, finished
    splits in `folder/probe-HASH.jsonl`. Raises `ValueError` for an unknown set, an SAE that does not fit the model, or a model
    that is being steered; `SaelabError` if no set is large enough, or while another process probes in `folder`.
    """
    config = config or ProbeConfig()
    hooks = _checked(sae, lm, hook_name)
    names = [one for asked in sets for one in (set_names([asked]) if isinstance(asked, str) else [asked])]
    folder = Path(folder)
    with locked(folder, f"Another process is probing in {folder}: wait until it is done."):
        start = context_start(lm, bos_of(sae.provenance.origin, lm))
        sizes = {"n_texts": config.n_train + config.n_test, "max_tokens": config.max_tokens}
        harvest = Harvest(lm, hooks, folder / ROWS, start=start, **sizes)
        rows = harvest.collect(_once(names), progress)
        if not rows:
            raise SaelabError("None of the sets is large enough to probe: name larger ones.")
        settings = {"n_train": config.n_train, "n_test": config.n_test, "ks": list(config.ks), "sae": sae.hash}
        kept = TrialFile(folder, {"saelab_probing": _VERSION, **harvest.settings, **settings}, "probe")
        draws = _draws(sae, rows, config, kept, progress)
    probed = [ProbedSet(one.name, one.origin, one.positive, len(one.y)) for one in rows]
    return ProbeReport(probed, draws, config, {"sae": sae.hash, "model": lm.name, "hooks": list(hooks)})


def _checked(sae: SAE, lm: Any, hook_name: str | Sequence[str] | None) -> tuple[str, ...]:
    """The hooks that the SAE reads. Raises `ValueError` if it does not fit the model, or the model is being steered."""
    check_is_sae(sae, "probe_sets")
    if not isinstance(lm, LanguageModel):
        raise ValueError(f"Probing reads one language model, got a {type(lm).__name__}: probe an SAE of one model.")
    refuse_steered(lm)
    hooks = hooks_of(sae, hook_name).inputs
    for name in hooks:
        lm.check_hook(name)
        if lm.d_in(name) != sae.d_in:
            raise ValueError(f"{name} of {lm.name} has width {lm.d_in(name)}, but the SAE reads d_in={sae.d_in}.")
    return hooks


def _once(sets: Sequence[str | LabelledSet]) -> list[str | LabelledSet]:
    """Each set once. Raises `ValueError` for two different ones of one name, and for a name that is no file name."""
    found: dict[str, str | LabelledSet] = {}
    for one in sets:
        name = one if isinstance(one, str) else one.name
        if found.setdefault(name, one) is not one and not isinstance(one, str):
            raise ValueError(f"Two of the sets are named {name!r}: give each a name of its own.")
        if not re.fullmatch(r"\w[\w.+-]*", name):
            raise ValueError(f"A set is named {name[:60]!r}; expected letters, digits and any of _ . + - for its file.")
    return list(found.values())


def _plan(rows: Sequence[Rows], config: ProbeConfig) -> Iterator[tuple[Rows, list[Regime]]]:
    """Each set with the regimes that it is measured in."""
    n_hard = min(config.n_hard_sets, len(rows))
    hard = set(np.linspace(0, len(rows) - 1, n_hard).round().astype(int).tolist())
    for i, one in enumerate(rows):
        yield one, [Regime(), *(config.hard_regimes() if i in hard else ())]


@contextmanager
def _one_thread() -> Iterator[None]:
    """Matrices of a few hundred rows: more threads wait for each other, most of all on a busy machine."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)


def _draws(sae: SAE, rows: Sequence[Rows], config: ProbeConfig, kept: TrialFile, progress: bool) -> list[Draw]:
    """The outcomes of all sets, regimes and splits; those not in `kept` yet are measured."""
    plan, used, found = list(_plan(rows, config)), methods(config.ks), []
    total = sum(len(regimes) for _, regimes in plan) * config.n_splits
    with _one_thread(), tqdm(total=total, desc="Probe", unit="split", disable=not progress) as bar:
        for one, regimes in plan:
            columns: Any = None
            bar.set_postfix_str(one.name[:40], refresh=False)
            for regime in regimes:
                for number in range(config.n_splits):
                    key = f"{one.name} {one.fingerprint} / {regime} / {number}"
                    if key not in kept.batches:
                        columns = columns_of(one, sae) if columns is None else columns
                        drawn = split(one.name, one.y, regime, number, config.n_train, config.n_test)
                        scored = {name: outcome(method, columns, drawn, one.y) for name, method in used.items()}
                        kept.add(key, {"outcomes": scored, "feature": best_feature(columns, drawn)})
                    known = kept.batches[key]
                    outcomes = {name: Outcome(*values) for name, values in known["outcomes"].items()}
                    found.append(Draw(one.name, str(regime), number, outcomes, known["feature"]))
                    bar.update()
    return found
