"""`saelab probe`: whether the features of an SAE tell labelled texts apart better than the activations that it reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Annotated

from tyro.conf import OmitArgPrefixes, arg

from saelab.cli.answers import AsJson, answering
from saelab.cli.commands import Dtype, OwnModel, Run, runs_of
from saelab.run_folder.opening import with_model

_SETS = "Names of labelled sets, or sae-probes (113 sets, 45 MB are fetched once) or concepts (WordNet, with saelab)."


# The fields of `ProbeConfig`, for a command line that imports no torch to print its help.
@dataclass(frozen=True)
class ProbeFlags:
    """Sizes of the run."""

    ks: Annotated[tuple[int, ...], arg(help="Features of the k-sparse probes.")] = (1, 16, 128)
    n_train: Annotated[int, arg(help="Most texts to train on, validation included.")] = 256
    n_test: Annotated[int, arg(help="Most texts to test on.")] = 256
    n_splits: Annotated[int, arg(help="Splits of every set into texts to train and to test on.")] = 3
    max_tokens: Annotated[int, arg(help="Of a longer text the last tokens are read.")] = 128
    few: Annotated[tuple[int, ...], arg(help="Regime of few examples: training texts.")] = (8, 32)
    imbalance: Annotated[tuple[float, ...], arg(help="Class imbalance: shares of yes in training.")] = (0.05, 0.2)
    noise: Annotated[tuple[float, ...], arg(help="Label noise: shares of training labels flipped.")] = (0.1, 0.3)
    n_hard_sets: Annotated[int, arg(help="Sets for these three regimes, spread over those of the run.")] = 5


def probe(
    run: Run,
    sets: Annotated[tuple[str, ...], arg(help=_SETS)] = ("sae-probes", "concepts"),
    flags: OmitArgPrefixes[ProbeFlags] = ProbeFlags(),  # noqa: B008
    list_sets: Annotated[bool, arg(help="Print the names of the sets and where each is from, and stop.")] = False,
    model: OwnModel = None,
    as_json: AsJson = False,
    dtype: Dtype = None,
) -> None:
    """Probe labelled texts with features of an SAE, one, a few and all of them, beside baselines on the activations. An
    interrupted run goes on; the report is in RUN/probing."""
    from saelab.probing.config import ProbeConfig
    from saelab.probing.labelled_sets import set_names, set_origins
    from saelab.probing.report_shown import save, told
    from saelab.probing.running import probe_sets

    names = set_names(sets)  # before the model, which takes longer to load
    if list_sets:
        with answering(as_json) as answer:
            origins = set_origins(names)
            answer({"sets": origins}, *(f"{name}: {origin}" for name, origin in origins.items()))
        return
    with answering(as_json) as answer:
        config = ProbeConfig(**asdict(flags))
        for found in runs_of(run, one=as_json):
            sae, lm = with_model(found.sae_dir, model, dtype)
            folder = found.report_path.parent / "probing"
            report = probe_sets(sae, lm, names, config, folder=folder)
            path, page = save(report, folder / found.report_path.name)
            answer(
                report.data(),
                f"SAE {found.sae_dir}",
                *told(report),
                f"The report is in {path} and, with the quiver, in {page}",
            )


PROBE: dict[str, tuple[Callable[..., None], str]] = {
    "probe": (
        probe,
        "saelab probe runs/demo\nsaelab probe runs/demo --sets glue_sst2 agnews_0 concepts --n-splits 5\n"
        "saelab probe runs/demo --sets concepts --ks 1 4 16 --n-hard-sets 0\nsaelab probe runs/demo --list-sets",
    )
}
