"""`saelab bench` and `saelab sweep`: their arguments, and the tables and plots they print and save."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import OmitArgPrefixes, OmitSubcommandPrefixes, Positional, arg, subcommand

from saelab.cli.answers import AsJson, answering
from saelab.hints.next_commands import check_has_cache, command, in_turn

LOSS_TOKENS = (
    "Of these, tokens to measure the loss on: four passes of the model each, most of the time; 0 measures none."
)
Seeds = Annotated[tuple[int, ...], arg(help="One full run per seed; tables show mean and standard deviation.")]


@dataclass
class Synthetic:
    """Train every variant on synthetic data with known features, and check the papers' claims against the results."""

    out_dir: Annotated[Path, arg(help="Folder for rows and plot; finished rows are not computed again.")] = Path(
        "runs/synthetic"
    )
    seeds: Seeds = (0, 1, 2)
    data: Annotated[
        tuple[str, ...],
        arg(
            help="Kinds of data: flat, zipf, mixed, signed, hierarchy, diffing, fsm.",
            help_behavior_hint="(default: all)",
        ),
    ] = ()
    steps: Annotated[int | None, arg(help="Training steps per SAE; None uses the default of each kind of data.")] = None
    as_json: AsJson = False

    def run(self) -> None:
        """Run the benchmark, then print tables and verdicts."""
        from saelab.benchmarks.claims import check_all
        from saelab.benchmarks.planted_claims import CLAIMS
        from saelab.benchmarks.synthetic import DATA, run_synthetic
        from saelab.benchmarks.tables import synthetic_picture, synthetic_tables

        with answering(self.as_json) as answer:
            rows = run_synthetic(self.seeds, self.out_dir, data=self.data or DATA, n_steps=self.steps)
            verdicts = check_all(CLAIMS, rows)
            claims = [{"claim": one.claim.text, "data": one.claim.data, "held": one.held} for one in verdicts]
            kept = _keep(self.out_dir, synthetic_picture(rows))
            data = {"folder": self.out_dir, "rows": rows, "claims": claims}
            answer(data, *synthetic_tables(rows), *map(str, verdicts), kept)


@dataclass
class Family:
    """Train every variant on the activations of RUN in one shared read, and evaluate each on held-out documents."""

    run_folder: Annotated[Positional[Path], arg(metavar="RUN", help="Folder of the run, with its cache.")]
    variants: Annotated[tuple[str, ...], arg(help="SAE variants.", help_behavior_hint="(default: all)")] = ()
    l0: Annotated[
        tuple[int, ...],
        arg(help="Target L0: the first for every variant, the others for the variants on the FVU-L0 curve."),
    ] = (32, 16, 64)
    d_sae: Annotated[int, arg(help="Number of features per SAE.")] = 4096
    steps: Annotated[int, arg(help="Training steps per SAE.")] = 400
    batch_size: Annotated[int, arg(help="Activations per step.")] = 2048
    seeds: Seeds = (0,)
    eval_tokens: Annotated[int | None, arg(help="Held-out tokens to evaluate on; None uses all.")] = None
    eval_tokens_ce: Annotated[int, arg(help=LOSS_TOKENS)] = 4096
    hook_name: Annotated[str | None, arg(help="Hook to train on, if the cache holds several.")] = None
    hook_name_out: Annotated[str | None, arg(help="Hook that transcoders predict; None skips transcoders.")] = None
    out_dir: Annotated[Path | None, arg(help="Folder for rows, SAEs and plot; None means RUN/family.")] = None
    as_json: AsJson = False

    def run(self) -> None:
        """Run the benchmark, then print the table and the comparisons."""
        from saelab.benchmarks.family import FamilyConfig, run_family
        from saelab.benchmarks.tables import comparisons, family_picture, family_tables

        check_has_cache(self.run_folder)
        sizes = self.d_sae, self.steps, self.batch_size, self.eval_tokens
        config = FamilyConfig(*sizes, self.hook_name, self.hook_name_out, self.eval_tokens_ce)
        out_dir = self.out_dir or self.run_folder / "family"
        options: dict[str, Any] = {"variants": self.variants or None, "l0": self.l0, "seeds": self.seeds}
        with answering(self.as_json) as answer:
            rows = run_family(self.run_folder, config, out_dir=out_dir, **options)
            drawn = any(row["table"] == "sae" for row in rows)  # transcoders alone have no curve
            kept = [_keep(out_dir, family_picture(rows))] if drawn else []
            compared = comparisons(rows)
            data = {"folder": out_dir, "rows": rows, "comparisons": compared}
            answer(data, *family_tables(rows), *compared, *kept)


@dataclass
class Large:
    """Train large dictionaries on thousands of planted Zipf features, reporting the dead fraction every million tokens."""

    out_dir: Annotated[Path, arg(help="Folder for rows and SAEs; the same command resumes an interrupted run.")] = Path(
        "runs/large"
    )
    variants: Annotated[tuple[str, ...], arg(help="SAE variants, trained one after the other.")] = (
        "topk",
        "batch_topk",
    )
    d_in: Annotated[int, arg(help="Width of the data.")] = 256
    n_features: Annotated[int, arg(help="Planted features.")] = 8192
    n_active: Annotated[int, arg(help="Mean number of planted features active per token.")] = 24
    d_sae: Annotated[int, arg(help="Number of features per SAE.")] = 16_384
    k: Annotated[int, arg(help="Features that fire per token.")] = 32
    n_tokens: Annotated[int, arg(help="Training tokens per SAE.")] = 12_000_000
    batch_size: Annotated[int, arg(help="Tokens per step.")] = 2048
    seed: Annotated[int, arg(help="Seed of the planted features, tokens and weights.")] = 0
    device: Annotated[str | None, arg(help="cpu, cuda, ...; None uses a GPU if there is one.")] = None
    every: Annotated[int, arg(help="Tokens between progress lines.")] = 1_000_000
    as_json: AsJson = False

    def run(self) -> None:
        """Train, printing a line every `every` tokens, then print the table."""
        from dataclasses import fields

        from saelab.benchmarks.large import LargeConfig, run_large
        from saelab.benchmarks.tables import large_table

        config = LargeConfig(**{field.name: getattr(self, field.name) for field in fields(LargeConfig)})
        with answering(self.as_json) as answer:
            rows = run_large(config, self.out_dir, variants=self.variants, every=self.every)
            kept = f"Rows are in {self.out_dir} (large.csv, large.json), and the SAEs next to them"
            answer({"folder": self.out_dir, "rows": rows}, large_table(rows), kept)


@dataclass
class Claims:
    """Test the papers' claims: run every experiment on each seed, and write one table of what held and what did not."""

    only: Annotated[
        tuple[str, ...],
        arg(help="Experiments, as the page names them.", help_behavior_hint="(default: all)"),
    ] = ()
    seeds: Seeds = (0, 1, 2)
    out_dir: Annotated[Path, arg(help="Folder for rows and page; the same command resumes an interrupted run.")] = Path(
        "runs/claims"
    )
    page: Annotated[Path | None, arg(help="Markdown file for the table; None means claims.md in the folder.")] = None
    as_json: AsJson = False

    def run(self) -> None:
        """Run the experiments, then print the verdicts."""
        from saelab.claims.page import claims_page
        from saelab.claims.registry import experiments
        from saelab.claims.runs import run_claims
        from saelab.files import atomic_write_text

        page = self.page or self.out_dir / "claims.md"
        with answering(self.as_json) as answer:
            verdicts = run_claims(self.out_dir, self.seeds, only=self.only)
            about = [(one.name, one.about) for one in experiments().values()]
            atomic_write_text(page, claims_page(verdicts, about))
            claims = [{"claim": one.claim.text, "data": one.claim.data, "verdict": one.word} for one in verdicts]
            shown = [str(one) for one in verdicts if one.pairs]
            answer({"folder": self.out_dir, "page": page, "claims": claims}, *shown, f"The table is in {page}")


def _described(command: type, examples: str) -> str:
    lines = "".join(f"  saelab bench {line}\n" for line in examples.split("\n"))
    return f"{command.__doc__}\n\nExamples:\n{lines}"


_SYNTHETIC = _described(Synthetic, "synthetic\nsynthetic --data zipf mixed --seeds 0 1 2 3 4")
_FAMILY = _described(Family, "family runs/demo\nfamily runs/demo --variants topk batch_topk relu --l0 32 --seeds 0 1 2")
_LARGE = _described(
    Large, "large\nlarge --d-in 768 --n-features 16384 --d-sae 32768 --n-tokens 50_000_000 --device cuda"
)
_CLAIMS = _described(Claims, "claims\nclaims --only hierarchy signed\nclaims --page docs/claims.md")
BENCHES: dict[str, tuple[Any, str]] = {
    "synthetic": (Synthetic, _SYNTHETIC),
    "family": (Family, _FAMILY),
    "large": (Large, _LARGE),
    "claims": (Claims, _CLAIMS),
}
"""The benchmarks as commands of their own, with their descriptions."""
Bench = (
    Annotated[Synthetic, subcommand("synthetic", description=_SYNTHETIC)]
    | Annotated[Family, subcommand("family", description=_FAMILY)]
    | Annotated[Large, subcommand("large", description=_LARGE)]
    | Annotated[Claims, subcommand("claims", description=_CLAIMS)]
)


def bench(what: OmitSubcommandPrefixes[OmitArgPrefixes[Bench]]) -> None:  # pyright: ignore[reportInvalidTypeArguments]
    """Compare the variants: on data with known features, on the activations of RUN, or by dead features of large SAEs."""
    what.run()


def sweep(
    run: Annotated[Positional[Path], arg(metavar="RUN", help="Folder of the run, with its cache.")],
    n_tokens: Annotated[int, arg(help="Training tokens per SAE.")],
    variants: Annotated[tuple[str, ...], arg(help="SAE variants.")] = ("topk",),
    k: Annotated[
        tuple[int, ...], arg(help="Features per token: k, or target_l0 for variants with a sparsity penalty.")
    ] = (32,),
    d_sae: Annotated[tuple[int, ...], arg(help="Numbers of features.")] = (4096,),
    lr: Annotated[tuple[float | None, ...], arg(help="Learning rates; None means the variant's default.")] = (None,),
    seeds: Annotated[
        tuple[int, ...], arg(help="Seeds of weights and batch order; the cache is read once per seed.")
    ] = (0,),
    batch_size: Annotated[int, arg(help="Activations per step.")] = 2048,
    eval_tokens: Annotated[int | None, arg(help="Held-out tokens to evaluate on; None uses all.")] = None,
    eval_tokens_ce: Annotated[int, arg(help=LOSS_TOKENS)] = 4096,
    hook_name: Annotated[str | None, arg(help="Hook to train on, if the cache holds several.")] = None,
    hook_name_out: Annotated[str | None, arg(help="Hook that transcoders predict.")] = None,
    out_dir: Annotated[Path | None, arg(help="Folder for SAEs and table; None means RUN.")] = None,
    as_json: AsJson = False,
) -> None:
    """Train an SAE on RUN/cache for each combination of the lists, side by side, and evaluate all in one table."""
    from saelab.benchmarks.sweep import SweepConfig, run_sweep
    from saelab.benchmarks.tables import sweep_table
    from saelab.distributed import is_main_process

    check_has_cache(run)
    config = SweepConfig(n_tokens, batch_size, eval_tokens, hook_name, hook_name_out, eval_tokens_ce)
    lists: dict[str, Any] = {"variants": variants, "d_sae": d_sae, "k": k, "lr": lr, "seeds": seeds}
    home = out_dir or run
    with answering(as_json) as answer:
        rows = run_sweep(run, config, out_dir=home, **lists)
        if not is_main_process():
            return
        kept = f"The SAEs are in {home}, and the table in {home / 'sweep.csv'} and {home / 'sweep.json'}"
        following = in_turn(command("features", home), command("dash", home))
        answer({"folder": home, "rows": rows}, sweep_table(rows), kept, following)


def _keep(out_dir: Path, picture: str) -> str:
    """Save the picture; returns where everything is."""
    from saelab.files import atomic_write_text

    atomic_write_text(out_dir / "picture.svg", picture)
    return f"Rows and plot are in {out_dir} (rows.csv, rows.json, picture.svg)"
