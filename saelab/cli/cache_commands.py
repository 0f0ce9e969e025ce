"""`saelab cache`: shows what a cache holds, verifies its files and rebuilds damaged ones."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import OmitArgPrefixes, OmitSubcommandPrefixes, Positional, arg, subcommand

if TYPE_CHECKING:
    from saelab.activation_cache.reader import ActivationCache

Folder = Annotated[Positional[Path], arg(metavar="RUN", help="Run folder, or the cache folder itself.")]


@dataclass
class Info:
    """Show what the cache of RUN holds, or the progress of an unfinished one."""

    run_folder: Folder

    def run(self) -> None:
        """Print the table."""
        from saelab.activation_cache import layout
        from saelab.activation_cache.journal import rows_on_disk

        folder = _folder(self.run_folder)
        if not (folder / layout.MANIFEST).exists() and (folder / layout.JOURNAL).exists():
            print(
                f"{folder} is unfinished with {rows_on_disk(folder):,} rows on disk: repeat the same harvest to resume it."
            )
            return
        cache = _open(self.run_folder)
        manifest, config = cache.manifest, cache.manifest["config"]
        size = sum(known["bytes"] for known in cache.files().values())
        masked = ", ".join(f"{n:,} {reason}" for reason, n in manifest["masked"].items())
        _table(
            {
                "hooks": ", ".join(f"{hook} ({width} wide)" for hook, width in config["hooks"].items()),
                "model": f"{manifest['model_name']}, {config['model_dtype']}",
                "texts": f"{(manifest['texts'] or {}).get('source', 'given in Python')}, split {config['split']}",
                "rows": f"{cache.n_rows:,} in {len(manifest['shards'])} shards, {config['dtype']}",
                **_lost(cache, cache.hook_names),
                "tokens": f"{manifest['n_tokens']:,} of {manifest['n_documents']:,} documents",
                "masked": masked,
                "contexts": f"{manifest['n_sequences']:,} of {config['ctx_len']} tokens",
                "order": f"shuffled with seed {config['seed']}" if config.get("shuffle", True) else "as in the texts",
                "size": layout.human_bytes(size),
                "format": manifest["format_version"],
            }
        )


@dataclass
class Verify:
    """Check every file of RUN's cache against its SHA-256; names damaged files and exits with status 2."""

    run_folder: Folder

    def run(self) -> None:
        """Print that all files are intact. Raises `CacheError` naming those that are not."""
        cache = _open(self.run_folder)
        cache.verify(progress=True)
        print(f"All {len(cache.files())} files of {cache.path} are intact.")


@dataclass
class Repair:
    """Rebuild only the damaged files of RUN's cache, from its texts and its model."""

    run_folder: Folder
    texts: Annotated[str | None, arg(help="Where the texts are now; None means where they were.")] = None
    column: Annotated[str, arg(help="Column that holds the text.")] = "text"

    def run(self) -> None:
        """Repair, and print what was rebuilt."""
        from saelab.activation_cache.repair import repair
        from saelab.evaluation.heldout import own_texts
        from saelab.tokens import load_texts

        cache = _open(self.run_folder)
        lm, known = _model_of(cache), cache.origin(cache.hook_names[0])
        chat = lm if "chat" in (known["texts"] or {}) else None
        texts = load_texts(self.texts, column=self.column, chat=chat) if self.texts else own_texts(known, lm)
        rebuilt = repair(cache, lm, texts)
        for file, same in rebuilt.items():
            print(
                f"{file}: rebuilt, {'byte for byte' if same else 'up to rounding (different torch version or machine)'}"
            )
        print(f"{len(rebuilt)} of {len(cache.files())} files of {cache.path} were damaged.")


@dataclass
class Stats:
    """Show norms and means of each hook in RUN's cache; percentages are of the mean squared norm."""

    run_folder: Folder

    def run(self) -> None:
        """Print one block per hook."""
        cache = _open(self.run_folder)
        for hook in cache.hook_names:
            stats = cache.stats(hook)
            mean_square = stats["second_moment"].sum()
            mean = f"{stats['mean'].norm():.4g}, {stats['mean'].square().sum() / mean_square:.1%} of the squared norm"
            largest = stats["second_moment"].topk(min(3, cache.d_in(hook)))
            dims = ", ".join(
                f"{dim} ({share:.1%})"
                for dim, share in zip(largest.indices.tolist(), largest.values / mean_square, strict=True)
            )
            print(f"{hook}, {stats['n']:,} rows")
            _table(
                {
                    "mean norm": f"{stats['mean_norm']:.4g}",
                    "median norm": f"{stats['median_norm']:.4g} (first 16,384 rows)",
                    "largest norm kept": f"{cache.manifest['max_norm'][hook]:.4g}",
                    "norm of the mean": mean,
                    "largest dimensions": dims,
                    **_lost(cache, [hook]),
                }
            )


def _described(command: type, example: str) -> str:
    return f"{command.__doc__}\n\nExamples:\n  saelab cache {example}\n"


Command = (
    Annotated[Info, subcommand("info", description=_described(Info, "info runs/demo"))]
    | Annotated[Verify, subcommand("verify", description=_described(Verify, "verify runs/demo"))]
    | Annotated[Repair, subcommand("repair", description=_described(Repair, "repair runs/demo"))]
    | Annotated[Stats, subcommand("stats", description=_described(Stats, "stats runs/demo"))]
)


def cache(what: OmitSubcommandPrefixes[OmitArgPrefixes[Command]]) -> None:  # pyright: ignore[reportInvalidTypeArguments]
    """Inspect, verify or repair the activation cache of RUN."""
    what.run()


def _lost(cache: ActivationCache, hooks: list[str]) -> dict[str, str]:
    """Quantisation error of these hooks for a storage other than bfloat16, and the columns int8 keeps in bfloat16."""
    told: list[str] = []
    for hook in hooks if "storage" in cache.manifest else ():
        columns = cache.manifest["storage"]["outliers"].get(hook)
        beside = f", columns in bfloat16: {', '.join(map(str, columns))}" if columns else ""
        name = f"{hook} " if len(hooks) > 1 else ""
        told.append(f"{name}{cache.storage_error(hook):.4%} of the variance{beside}")
    return {"quantisation error": "; ".join(told)} if told else {}


def _folder(run: Path) -> Path:
    return run / "cache" if (run / "cache").is_dir() else run


def _open(run: Path) -> ActivationCache:
    from saelab.activation_cache.reader import ActivationCache

    return ActivationCache(_folder(run))


def _model_of(cache: ActivationCache) -> Any:
    """The model or models that a cache was harvested from, in the dtype used then."""
    import torch

    from saelab.models import load_model
    from saelab.models.multi_model import together

    names = [one["name"] for one in cache.models.values()] or [cache.manifest["model_name"]]
    dtypes = [part.removeprefix("torch.") for part in cache.manifest["config"]["model_dtype"].split(" + ")]
    dtypes = dtypes if len(dtypes) == len(names) else dtypes * len(names)
    return together([load_model(name, dtype=getattr(torch, dtype)) for name, dtype in zip(names, dtypes, strict=True)])


def _table(lines: dict[str, Any]) -> None:
    for name, value in lines.items():
        print(f"  {name:<20}{value}")
