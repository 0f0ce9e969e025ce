"""The measurements of an SAE trained on a model's activations: quality on held-out documents, and training speed."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

from saelab.benchmarks.tables import L0_TOLERANCE
from saelab.evaluation import evaluate
from saelab.models import LanguageModel
from saelab.runs import sae_run
from saelab.saes import SAE
from saelab.training.metrics_log import read_lines

MEASURES = ("fvu", "l0", "ce_loss_recovered", "dead_fraction")


def measure(
    sae: SAE,
    lm: LanguageModel,
    level: int,
    eval_tokens: int | None,
    home: Path,
    *,
    n_tokens_ce: int = 4096,
    progress: bool = False,
) -> dict[str, Any]:
    """The columns of a row; `level` is the requested L0, `home` the folder of the benchmark.

    `wall_seconds` covers the SAE's own training steps and its evaluation. It excludes reading the cache, which all SAEs
    share; the model's forward pass on held-out text counts towards the first row only.
    """
    assert sae.provenance.folder is not None
    start = time.perf_counter()
    path = sae_run(sae.provenance.folder).report_path
    report = evaluate(sae, lm, n_tokens=eval_tokens, n_tokens_ce=n_tokens_ce, progress=progress, path=path)
    speeds = [line["tokens_per_second"] for line in read_lines(sae.provenance.folder / "metrics.jsonl")]
    speed = statistics.median(speeds) if speeds else None  # a baseline is not trained
    train_seconds = 0.0 if speed is None else sae.provenance.trained["n_tokens"] / speed
    return {
        **{name: getattr(report, name) for name in MEASURES},
        "l0_as_asked": abs(report.l0 - level) <= L0_TOLERANCE * level,
        "tokens_per_second": None if speed is None else round(speed),
        "train_seconds": round(train_seconds, 1),
        "wall_seconds": round(train_seconds + time.perf_counter() - start, 1),
        "n_tokens": report.n_tokens,
        "folder": str(sae.provenance.folder.relative_to(home)),
    }
