"""Commands for SAEs of other libraries."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from saelab.cli.answers import AsJson, answering
from saelab.files import check_writable
from saelab.hints.next_commands import after_training

_SOURCE = "A folder or file, or a hub id with the path of the SAE behind it (org/repo/path)."
_ASSUME = (
    "What the files leave open or say wrongly, as KEY=VALUE: k=64, pre_bias=False, hook_name=..., normalize=layer_norm."
)


def import_(
    source: Annotated[Positional[str], arg(metavar="SOURCE", help=_SOURCE)],
    run: Annotated[Positional[Path], arg(metavar="RUN", help="Run folder to create.")],
    format: Annotated[str | None, arg(help="Name of the format; None: it is found out.")] = None,
    model: Annotated[str | None, arg(help="Language model; None: the one named in the files.")] = None,
    texts: Annotated[str, arg(help="Texts to check it on, as for harvest.")] = "demo",
    assume: Annotated[tuple[str, ...], arg(help=_ASSUME)] = (),
    revision: Annotated[str | None, arg(help="Branch, tag or commit on the hub.")] = None,
    n_tokens: Annotated[int, arg(help="Tokens to check it on.")] = 4096,
    dtype: Annotated[
        Literal["bfloat16", "float32"] | None, arg(help="dtype of the model; None: bfloat16 where fast.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check an SAE of another library on real activations and put it into RUN/sae, where every other command works on it."""
    import torch

    import saelab
    from saelab.errors import SaelabError
    from saelab.interop.importing import import_sae, open_source
    from saelab.interop.reading import read_blueprint

    answers = dict(_answer(one) for one in assume)
    options: dict[str, Any] = {"format": format, "assume": answers, "revision": revision}
    with answering(as_json) as answer:
        if model is None:
            known = read_blueprint(open_source(source, revision), format, answers).origin.get("model")
            if known is None:
                raise SaelabError(f"{source} does not name its language model: pass --model.")
            model = str(known["name"])
        lm = saelab.load_model(model, dtype=getattr(torch, dtype) if dtype else None)
        found = import_sae(source, run, lm, texts, n_tokens=n_tokens, **options)
        kept = f"The SAE is in {found.folder}"
        answer(_content(found), _described(found), kept, after_training(found.folder))


StoreOrSaeFormat = Annotated[
    Literal[
        "saelab",
        "sae_lens",
        "sparsify",
        "dictionary_learning",
        "gemma_scope_2",
        "gguf",
        "directions",
        "sae_dashboard",
        "neuronpedia",
        "parquet",
        "csv",
    ],
    arg(
        help="Format to write; gguf, directions: steering vectors of features, in one file; sae_dashboard, neuronpedia, "
        "parquet, csv: the feature store, the last two as tables of features and of examples."
    ),
]


def export(
    run: Annotated[Positional[Path], arg(metavar="RUN", help="Run folder, or that of one of its SAEs.")],
    out: Annotated[Positional[Path], arg(metavar="OUT", help="Folder to write.")],
    format: StoreOrSaeFormat = "sae_lens",
    feature: Annotated[tuple[int, ...], arg(help="Features of a gguf or directions file.")] = (),
    strength: Annotated[float, arg(help="Their strength, in units of each feature's p99.")] = 2.0,
    plan: Annotated[
        Path | None, arg(help="File of a steering plan, for gguf or directions instead of features.")
    ] = None,
) -> None:
    """Write the SAE of RUN for another library, or its steering vectors, or its feature store. What a format cannot hold is
    refused."""
    import saelab

    if format in ("gguf", "directions"):
        _export_vectors(run, out, format, feature, strength, plan)
    elif format in ("sae_dashboard", "neuronpedia"):
        save_store = importlib.import_module(f"saelab.interop.{format}").save_store
        print(f"{len(save_store(saelab.load_features(run), out))} files with the features of {run} are in {out}")
    elif format in ("parquet", "csv"):
        from saelab.features.tables import save_tables

        files = save_tables(saelab.load_features(run), out, format=format)
        print(f"The features of {run} and their examples are in {' and '.join(map(str, files))}")
    elif feature or plan:
        raise ValueError(f"--feature and --plan are for the formats gguf and directions, not {format}.")
    else:
        print(f"The SAE is in {saelab.save_sae(saelab.load_sae(run), out, format=format)}, as {format} reads it")


def _export_vectors(
    run: Path, out: Path, format: str, features: tuple[int, ...], strength: float, plan: Path | None
) -> None:
    import saelab
    from saelab.interop.directions import save_directions, save_gguf

    if bool(features) == (plan is not None):
        raise ValueError(f"--format {format} needs features (--feature 17, or several) or a --plan, one of the two.")
    check_writable(out, "OUT")
    store = saelab.load_features(run)
    model = str((store.sae.provenance.origin.get("model") or {}).get("name") or "unknown")
    write = save_gguf if format == "gguf" else save_directions
    if plan is not None:
        print(f"The vectors of {plan} are in {write(saelab.steering.Plan.load(plan, store), out, model)}")
        return
    path = write([store.feature(i) * strength for i in features], out, model)
    print(f"{strength:g} times p99 of {', '.join(map(str, features))} is in {path}")


def push(
    run: Annotated[Positional[Path], arg(metavar="RUN", help="Run folder, or that of one of its SAEs.")],
    repo_id: Annotated[Positional[str], arg(metavar="REPO_ID", help="Repository: your-name/name-of-the-sae.")],
    private: Annotated[bool, arg(help="Create a private repository.")] = False,
    license: Annotated[str | None, arg(help="Licence of the SAE, as the hub writes it, such as apache-2.0.")] = None,
) -> None:
    """Upload the SAE of RUN to the Hugging Face hub, in one commit, with a model card."""
    from saelab.interop.hub_push import push as upload

    done = upload(run, repo_id, private=private, license=license)
    print(f"{len(done.files)} files are in {done.repo} at commit {done.commit}")
    print(f'Load it: saelab.load_sae("{done.repo}", revision="{done.commit[:12]}")')


def releases(
    words: Annotated[Positional[tuple[str, ...]], arg(metavar="WORDS", help="Words that must all occur.")] = (),
    limit: Annotated[int, arg(help="SAEs to list of the releases found.")] = 20,
    as_json: AsJson = False,
) -> None:
    """List released SAEs that saelab reads, from a table that needs no network: by release, then one by one."""
    from rich.table import Table

    from saelab.interop.releases import search

    found = search(words)
    if not found:
        raise ValueError(f"no release matches {' '.join(words)!r}; try fewer words, such as a model's name.")
    groups = dict[str, list[Any]]()
    for one in found:
        groups.setdefault(one.release, []).append(one)
    table = Table("release", "SAEs", "model", "format", "repository")
    rows = [(name, len(ones), ones[0].model, ones[0].format, ones[0].repo) for name, ones in groups.items()]
    for name, n, *others in rows:
        table.add_row(name, f"{n:,}", *others)
    listed = [f"{one.source}" + (f"  L0 {one.l0:g}" if one.l0 else "") for one in found[:limit]]
    left = len(found) - limit
    rest = f"... and {left:,} more; add words to narrow it down." if left > 0 else "Open one: saelab import SOURCE RUN"
    names = ("release", "n_saes", "model", "format", "repository")
    data = {
        "n_saes": len(found),
        "releases": [dict(zip(names, row, strict=True)) for row in rows],
        "saes": [{"source": one.source, "l0": one.l0} for one in found[:limit]],
    }
    with answering(as_json) as answer:
        answer(data, table, *listed, rest)


def _answer(word: str) -> tuple[str, Any]:
    """ "k=64" as a key and a number, bool or text."""
    key, equals, value = word.partition("=")
    if not equals:
        raise ValueError(f"--assume takes KEY=VALUE, such as k=64; got {word!r}.")
    try:
        return key, json.loads(value.lower() if value in ("True", "False") else value)
    except json.JSONDecodeError:
        return key, value


def _content(found: Any) -> dict[str, Any]:
    origin = found.sae.provenance.origin
    return {
        "folder": found.folder,
        **{key: origin["imported"][key] for key in ("source", "format", "assumed")},
        **{key: origin.get(key) for key in ("hook_name", "hook_name_out")},
        "variant": found.sae.variant,
        "d_sae": found.sae.d_sae,
        "check": found.check.to_json(),
        "warnings": found.check.warnings(),
        "report": None if found.report is None else json.loads(found.report.to_json()),
    }


def _described(found: Any) -> str:
    """What was read, assumed and measured."""
    origin, check = found.sae.provenance.origin, found.check
    imported = origin["imported"]
    hooks = origin["hook_name"] + (f" -> {origin['hook_name_out']}" if origin.get("hook_name_out") else "")
    lines = [f"{imported['source']}: {imported['format']}, {found.sae.variant}, {found.sae.d_sae:,} features, {hooks}"]
    if imported["assumed"]:
        said = ", ".join(f"{key}={value!r}" for key, value in imported["assumed"].items())
        lines.append(f"Assumed, as the files do not say: {said}")
    claim = "" if check.claimed_l0 is None else f" (claimed: {check.claimed_l0:g})"
    measured = f"On {check.n_tokens:,} tokens: L0 {check.assumed.l0:.1f}{claim}"
    if found.report is not None:
        recovered = found.report.ce_loss_recovered
        measured += f", FVU {check.assumed.fvu:.4f}"
        measured += f", CE recovered {recovered:.4f}" if recovered is not None else ", CE recovered not defined"
    lines.append(measured)
    tried = [f"{trial.name}: L0 {trial.l0:.1f}" + _fvu(trial.fvu) for trial in check.alternatives]
    lines.append("Tried instead: " + "; ".join(tried))
    verdict = [f"Warning: {said}" for said in check.warnings()] or ["None of these fits better."]
    return "\n".join(lines + verdict)


def _fvu(fvu: float | None) -> str:
    return "" if fvu is None else f", FVU {fvu:.4f}"


INTEROP: dict[str, tuple[Callable[..., None], str]] = {
    "import": (
        import_,
        "saelab import google/gemma-scope-2-270m-pt/resid_post/layer_9_width_16k_l0_medium runs/scope\n"
        "saelab import downloads/sae runs/other --model smollm2 --assume k=64 prepend_bos=False",
    ),
    "push": (push, "saelab push runs/demo my-name/my-sae --license apache-2.0"),
    "releases": (releases, "saelab releases gemma-scope-2 270m resid_post\nsaelab releases qwen3 transcoder"),
    "export": (
        export,
        "saelab export runs/demo runs/for-saelens --format sae_lens\n"
        "saelab export runs/mlp/sae-l1 out --format dictionary_learning\n"
        "saelab export runs/demo tables --format parquet\n"
        "saelab export runs/demo topic.gguf --format gguf --feature 2769 --strength 1.5\n"
        "saelab export runs/demo topic.gguf --format gguf --plan topic.json",
    ),
}
