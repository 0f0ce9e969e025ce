"""`saelab cache`: shows what a cache holds, verifies its files and rebuilds damaged ones."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import OmitArgPrefixes, OmitSubcommandPrefixes, Positional, arg, subcommand

from saelab.cli.answers import AsJson, answering

if TYPE_CHECKING:
    from saelab.activation_cache.reader import ActivationCache

Folder = Annotated[Positional[Path], arg(metavar="RUN", help="Run folder, or the cache folder itself.")]


@dataclass
class Info:
    """Show what the cache of RUN holds, or the progress of an unfinished one."""

    run_folder: Folder
    as_json: AsJson = False

    def run(self) -> None:
        """Print the table."""
        from saelab.activation_cache import layout
        from saelab.activation_cache.journal import rows_on_disk

        folder = _folder(self.run_folder)
        with answering(self.as_json) as answer:
            if not (folder / layout.MANIFEST).exists() and (folder / layout.JOURNAL).exists():
                rows = rows_on_disk(folder)
                unfinished = f"{folder} is unfinished with {rows:,} rows on disk: repeat the same harvest to resume it."
                answer({"folder": folder, "finished": False, "n_rows": rows}, unfinished)
                return
            cache = _open(self.run_folder)
            answer({"folder": cache.path, "finished": True, **_content(cache)}, _table(_described_content(cache)))


@dataclass
class Verify:
    """Check every file of RUN's cache against its SHA-256; names damaged files and exits with status 2."""

    run_folder: Folder
    as_json: AsJson = False

    def run(self) -> None:
        """Print that all files are intact. Raises `CacheError` naming those that are not."""
        with answering(self.as_json) as answer:
            cache = _open(self.run_folder)
            cache.verify(progress=True)
            n = len(cache.files())
            answer({"folder": cache.path, "n_files": n}, f"All {n} files of {cache.path} are intact.")


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
    as_json: AsJson = False

    def run(self) -> None:
        """Print one block per hook."""
        with answering(self.as_json) as answer:
            cache = _open(self.run_folder)
            found = {hook: _statistics(cache, hook) for hook in cache.hook_names}
            blocks = [
                f"{hook}, {one['n_rows']:,} rows\n{_table(_described(cache, hook, one))}" for hook, one in found.items()
            ]
            answer({"folder": cache.path, "hooks": found}, *blocks)


def _statistics(cache: ActivationCache, hook: str) -> dict[str, Any]:
    """Norms and means of a hook; shares are of the mean squared norm."""
    from saelab.activation_cache.columns import gradient_of

    stats = cache.stats(hook)
    mean_square = stats["second_moment"].sum()
    largest = stats["second_moment"].topk(min(3, cache.d_in(hook)))
    shares = (largest.values / mean_square).tolist()
    return {
        "n_rows": stats["n"],
        "mean_norm": float(stats["mean_norm"]),
        "median_norm": float(stats["median_norm"]),
        "max_norm": cache.manifest["max_norm"][hook],
        "mean_norm_gradient": float(cache.stats(gradient_of(hook))["mean_norm"]) if cache.gradients else None,
        "norm_of_mean": float(stats["mean"].norm()),
        "share_of_mean": float(stats["mean"].square().sum() / mean_square),
        "largest_dimensions": dict(zip(largest.indices.tolist(), shares, strict=True)),
    }


def _described(cache: ActivationCache, hook: str, found: dict[str, Any]) -> dict[str, Any]:
    dims = ", ".join(f"{dim} ({share:.1%})" for dim, share in found["largest_dimensions"].items())
    return {
        "mean norm": f"{found['mean_norm']:.4g}",
        "median norm": f"{found['median_norm']:.4g} (first 16,384 rows)",
        "largest norm kept": f"{found['max_norm']:.4g}",
        **({"mean norm, gradient": f"{found['mean_norm_gradient']:.4g}"} if cache.gradients else {}),
        "norm of the mean": f"{found['norm_of_mean']:.4g}, {found['share_of_mean']:.1%} of the squared norm",
        "largest dimensions": dims,
        **_lost(cache, [hook]),
    }


def _help(command: type, example: str) -> str:
    return f"{command.__doc__}\n\nExamples:\n  saelab cache {example}\n"


Command = (
    Annotated[Info, subcommand("info", description=_help(Info, "info runs/demo"))]
    | Annotated[Verify, subcommand("verify", description=_help(Verify, "verify runs/demo"))]
    | Annotated[Repair, subcommand("repair", description=_help(Repair, "repair runs/demo"))]
    | Annotated[Stats, subcommand("stats", description=_help(Stats, "stats runs/demo"))]
)


def cache(what: OmitSubcommandPrefixes[OmitArgPrefixes[Command]]) -> None:  # pyright: ignore[reportInvalidTypeArguments]
    """Inspect, verify or repair the activation cache of RUN."""
    what.run()


def _content(cache: ActivationCache) -> dict[str, Any]:
    """What a finished cache holds."""
    manifest, config = cache.manifest, cache.manifest["config"]
    measured = manifest["storage"]["error"] if "storage" in manifest else []
    return {
        "hooks": config["hooks"],
        "gradients": cache.gradients,
        "model": manifest["model_name"],
        "model_dtype": config["model_dtype"],
        "texts": (manifest["texts"] or {}).get("source"),
        "split": config["split"],
        "n_rows": cache.n_rows,
        "n_shards": len(manifest["shards"]),
        "storage": config["dtype"],
        "quantisation_error": {hook: cache.storage_error(hook) for hook in measured},
        "n_tokens": manifest["n_tokens"],
        "n_documents": manifest["n_documents"],
        "masked": manifest["masked"],
        "n_contexts": manifest["n_sequences"],
        "ctx_len": config["ctx_len"],
        "shuffled": config.get("shuffle", True),
        "seed": config["seed"],
        "bytes": sum(known["bytes"] for known in cache.files().values()),
        "format_version": manifest["format_version"],
    }


def _described_content(cache: ActivationCache) -> dict[str, Any]:
    from saelab.activation_cache.layout import human_bytes

    found = _content(cache)
    return {
        "hooks": ", ".join(f"{hook} ({width} wide)" for hook, width in found["hooks"].items()),
        **({"gradients": f"at each hook, of the {found['gradients']}"} if found["gradients"] else {}),
        "model": f"{found['model']}, {found['model_dtype']}",
        "texts": f"{found['texts'] or 'given in Python'}, split {found['split']}",
        "rows": f"{found['n_rows']:,} in {found['n_shards']} shards, {found['storage']}",
        **_lost(cache, list(found["quantisation_error"])),
        "tokens": f"{found['n_tokens']:,} of {found['n_documents']:,} documents",
        "masked": ", ".join(f"{n:,} {reason}" for reason, n in found["masked"].items()),
        "contexts": f"{found['n_contexts']:,} of {found['ctx_len']} tokens",
        "order": f"shuffled with seed {found['seed']}" if found["shuffled"] else "as in the texts",
        "size": human_bytes(found["bytes"]),
        "format": found["format_version"],
    }


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


def _table(lines: dict[str, Any]) -> str:
    return "\n".join(f"  {name:<20}{value}" for name, value in lines.items())
