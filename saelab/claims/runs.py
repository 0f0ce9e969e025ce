"""`run_claims`: run the experiments that test the papers' claims, once per seed, and judge each claim."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten

from tqdm.auto import tqdm

from saelab.benchmarks.claims import Verdict, check_all
from saelab.benchmarks.results import Rows, open_rows
from saelab.claims.registry import Experiment, experiments, labels
from saelab.claims.workspace import kept_in
from saelab.validation import check_integer

_LOG = logging.getLogger("saelab")

KEYS = ("data", "sae", "seed")


def run_claims(
    out_dir: str | Path,
    seeds: Sequence[int] = (0, 1, 2),
    *,
    only: Sequence[str] = (),
    progress: bool = True,
) -> list[Verdict]:
    """Run the experiments `only` (none named: all of them) on each seed, and judge the claims of all experiments on the rows
    of `out_dir`; a claim without rows is "not run".

    `rows.json` and `rows.csv` grow with each finished experiment and seed, which is not computed again. Raises `ValueError`
    for an unknown experiment, and for `seeds` that are none or empty.
    """
    if not seeds:
        raise ValueError("seeds is empty: list at least one.")
    for seed in seeds:
        check_integer("seed", seed, 0, 2**32 - 1)
    known = experiments()
    if unknown := [name for name in only if name not in known]:
        raise ValueError(f"only contains {unknown[0]!r}, which is no experiment; choose from {', '.join(known)}.")
    with open_rows(out_dir, {}, KEYS) as rows:
        runs = [(known[name], seed) for name in only or known for seed in seeds]
        bar = tqdm([one for one in runs if not _is_done(rows, *one)], "Claims", unit="run", disable=not progress)
        with kept_in(Path(out_dir) / "data"):
            for experiment, seed in bar:
                bar.set_postfix_str(f"{experiment.name}, seed {seed}")
                if progress:
                    _LOG.info(f"{experiment.name}, seed {seed}: {shorten(experiment.about, 100)}")
                _run(rows, experiment, seed)
        found = list(rows.rows)
    return [verdict for experiment in known.values() for verdict in check_all(experiment.claims, found)]


def _is_done(rows: Rows, experiment: Experiment, seed: int) -> bool:
    wanted = labels(experiment.claims)
    return all(rows.find(data=experiment.name, sae=label, seed=seed) is not None for label in wanted)


def _run(rows: Rows, experiment: Experiment, seed: int) -> None:
    start = time.perf_counter()
    measured = experiment.measure(seed)
    seconds = round(time.perf_counter() - start, 1)
    for label, measures in measured.items():
        row = {**measures, "experiment_seconds": seconds}
        rows.get(lambda row=row: row, data=experiment.name, sae=label, seed=seed)
