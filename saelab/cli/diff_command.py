"""`saelab diff`: which features of a crosscoder belong to one of its two models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import arg

from saelab.cli.answers import AsJson, answering
from saelab.cli.commands import Column, Dtype, OwnTexts, Run, Split, runs_of
from saelab.errors import SaelabError
from saelab.files import check_writable, read_json
from saelab.hints.next_commands import command
from saelab.run_folder.opening import with_model

_SOURCE = "Source to compare, as a number or a hook name; needed where there are three or more."
_CHANGED = (
    "Texts that show what training changed, if you know it (texts as for harvest): the report then says which features fire in "
    "more of those among the documents that are read."
)


def diff(
    run: Run,
    a: Annotated[str | None, arg(help=_SOURCE)] = None,
    b: Annotated[str | None, arg(help=_SOURCE)] = None,
    changed: Annotated[str | None, arg(help=_CHANGED)] = None,
    report: Annotated[Path | None, arg(help="Also write the report to this HTML file.")] = None,
    model: Annotated[
        tuple[str, ...],
        arg(
            help="Language models, in the order of the harvest.",
            help_behavior_hint="(default: those it was trained on)",
        ),
    ] = (),
    texts: OwnTexts = None,
    column: Column = "text",
    split: Split = None,
    n_tokens: Annotated[int | None, arg(help="Maximum number of tokens to read; None means all of them.")] = None,
    allow_train: Annotated[bool, arg(help="Read documents the crosscoder was trained on instead of refusing.")] = False,
    as_json: AsJson = False,
    dtype: Dtype = None,
) -> None:
    """Judge which features of a crosscoder are specific to one of two models, on held-out text; writes RUN/diff.json."""
    import saelab
    from saelab.diffing import diff_path, diff_report
    from saelab.diffing.report_html import told
    from saelab.diffing.running import sources_to_compare

    if report is not None:
        check_writable(report, "--report")
    found = _crosscoder(run)
    sources_to_compare(saelab.load_sae(found.sae_dir), a, b)  # before the models, which take longer to load
    corpus, marked = (saelab.load_texts(one, column=column) if one else None for one in (texts, changed))
    options: dict[str, Any] = {"a": a, "b": b, "changed": marked, "split": split, "allow_train": allow_train}
    with answering(as_json) as answer:
        sae, lm = with_model(found.sae_dir, model, dtype)
        made = diff_report(sae, lm, corpus, store=_store(found, sae), n_tokens=n_tokens, **options)
        path = made.save(diff_path(found))
        kept = [f"The report is in {path}; the dashboard's Compare page shows it: {command('dash', run)}"]
        kept += [f"The HTML is in {made.save_html(report)}"] if report is not None else []
        answer(made.data() | {"path": str(path)}, *told(made), *kept)


def _crosscoder(run: Path) -> Any:
    """The crosscoder of a RUN, or the SAE that is named, whatever it is. Raises `ValueError` where there are several."""
    runs = runs_of(run)
    found = [one for one in runs if _variant(one.sae_dir) == "crosscoder"] or runs[:1]
    if len(found) > 1:
        names = " or ".join(command("diff", one.sae_dir) for one in found)
        raise ValueError(f"{run} holds {len(found)} crosscoders; name one of them: {names}")
    return found[0]


def _variant(sae_dir: Path) -> str | None:
    path = sae_dir / "sae.json"
    return read_json(path).get("variant") if path.exists() else None


def _store(found: Any, sae: Any) -> Any:
    """The feature store of the crosscoder, where there is one of these weights."""
    import saelab

    try:
        store = saelab.load_features(found.features_dir)
    except SaelabError:
        return None
    return store if store.manifest["sae"]["hash"] == sae.hash else None


DIFF: dict[str, tuple[Callable[..., None], str]] = {
    "diff": (
        diff,
        "saelab diff runs/diff\nsaelab diff runs/diff --changed planted.jsonl --report diff.html\n"
        "saelab diff runs/layers --a blocks.8.hook_resid_post --b blocks.14.hook_resid_post --json",
    )
}
