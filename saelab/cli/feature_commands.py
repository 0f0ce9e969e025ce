"""Commands that collect, read and check feature stores."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import arg

from saelab.cli import feature_answers
from saelab.cli.answers import AsJson, answering
from saelab.cli.commands import Column, Dtype, OwnModel, OwnTexts, Run, Split, runs_of
from saelab.cli.messages import on_stderr
from saelab.hints.next_commands import command, in_turn
from saelab.run_folder.opening import with_model
from saelab.runs import find_snapshots

Snapshots = Annotated[
    bool,
    arg(help="Collect those of the snapshots of training (saelab train --snapshot-every) instead, on few tokens."),
]
Find = Annotated[
    str | None, arg(help="Collect nothing; list the features that words find, or a token in double quotes.")
]
Contrast = Annotated[
    tuple[Path, Path] | None,
    arg(
        metavar="FILE FILE",
        help="Collect nothing; list the features that fire in more texts of one file than of the other. A .txt file holds a text "
        "in each line.",
    ),
]


def features(
    run: Run,
    model: OwnModel = None,
    texts: OwnTexts = None,
    column: Column = "text",
    split: Split = None,
    n_tokens: Annotated[int | None, arg(help="Tokens to read; None means all of them.")] = None,
    top_k: Annotated[int, arg(help="Strongest examples to keep per feature.")] = 20,
    renew: Annotated[bool, arg(help="Collect again what is there, such as a store of an earlier saelab.")] = False,
    snapshots: Snapshots = False,
    find: Find = None,
    feature: Annotated[tuple[int, ...], arg(help="Collect nothing; show these features.")] = (),
    contrast: Contrast = None,
    limit: Annotated[int, arg(help="Features to list, or examples of each to show.")] = 20,
    as_json: AsJson = False,
    dtype: Dtype = None,
) -> None:
    """Collect examples, label and histogram of every feature, or read what was collected: --find, --feature, --contrast. An
    interrupted pass goes on; more tokens extend a finished one."""
    import saelab
    from saelab.distributed import is_main_process

    with answering(as_json) as answer:
        if find is not None or feature or contrast:
            _read(answer, run, find, feature, contrast, column=column, limit=limit, model=model, dtype=dtype)
            return
        options: dict[str, Any] = {"split": split, "n_tokens": n_tokens, "top_k": top_k, "renew": renew}
        options["texts"] = saelab.load_texts(texts, column=column) if texts else None
        for found in runs_of(run, one=as_json):
            (_collect_snapshots if snapshots else _collect)(answer, found, model, dtype, **options)
        if is_main_process():
            print(in_turn(command("dash", run)))


def _read(
    answer: Callable[..., None],
    run: Path,
    find: str | None,
    feature: tuple[int, ...],
    contrast: tuple[Path, Path] | None,
    *,
    column: str,
    limit: int,
    model: str | None,
    dtype: str | None,
) -> None:
    import saelab

    asked = {"find": find is not None, "feature": bool(feature), "contrast": bool(contrast)}
    if sum(asked.values()) > 1:
        raise ValueError(
            f"--{' and --'.join(name for name, here in asked.items() if here)} are two questions: ask one."
        )
    store = saelab.load_features(run)
    if find is not None:
        feature_answers.find(answer, store, find, limit)
    elif feature:
        feature_answers.cards(answer, store, feature, limit)
    elif contrast:
        sets = [(str(path), feature_answers.texts(path, column)) for path in contrast]
        _, lm = with_model(store.sae_folder or run, model, dtype)
        feature_answers.contrast(answer, store, lm, sets, limit)


def _collect(answer: Callable[..., None], found: Any, model: str | None, dtype: str | None, **options: Any) -> None:
    import saelab
    from saelab.distributed import is_main_process
    from saelab.features.plain import store_data

    sae, lm = with_model(found.sae_dir, model, dtype)
    store = saelab.collect_features(sae, lm, out_dir=found.features_dir, **options)
    if is_main_process():
        answer(store_data(store), f"The features, on {store.n_tokens:,} tokens, are in {found.features_dir}")


def _collect_snapshots(
    answer: Callable[..., None], found: Any, model: str | None, dtype: str | None, **options: Any
) -> None:
    from saelab.features.collecting.snapshots import N_TOKENS, collect_snapshots

    first = (find_snapshots(found.sae_dir) or [found])[0]  # an SAE in training has no other yet
    _, lm = with_model(first.sae_dir, model, dtype)
    stores = collect_snapshots(found.sae_dir, lm, **options | {"n_tokens": options["n_tokens"] or N_TOKENS})
    folder = stores[0].folder.parent
    answer({"folder": folder, "n_snapshots": len(stores)}, f"The features of {len(stores)} snapshots are in {folder}")


def verify(
    run: Run,
    model: OwnModel = None,
    n_examples: Annotated[int, arg(help="Stored examples to compute again, with all others of their contexts.")] = 100,
    seed: Annotated[int, arg(help="Seed of their draw.")] = 0,
    as_json: AsJson = False,
    dtype: Dtype = None,
) -> None:
    """Check a feature store: bytes by their hashes, numbers against each other, and stored examples by computing them again.
    The dashboard shows when it was last verified."""
    import saelab
    from saelab.features.verify import verify as check

    with answering(as_json) as answer:
        for found in runs_of(run, one=as_json):
            sae, lm = with_model(found.sae_dir, model, dtype)
            store = saelab.load_features(found.features_dir, sae)
            result = check(store, lm, n_examples, seed=seed)
            store.record_verified(result)
            answer({"folder": store.folder, **result._asdict()}, f"{store.folder} holds: {result}")


def map_(
    run: Run,
    seed: Annotated[int, arg(help="Seed of the layout; the same seed gives the same map.")] = 0,
) -> None:
    """Place the features of RUN in the plane by t-SNE of their decoder rows, for the dashboard's Map page; takes minutes."""
    from saelab.features import load_features
    from saelab.features.layout import layout_path, make_layout

    for found in runs_of(run):
        store = load_features(found.features_dir)
        make_layout(store, seed=seed)
        print(f"The map of {store.folder} is in {layout_path(store)}")


def label(
    run: Run,
    address: Annotated[str | None, arg(help="Server of OpenAI's protocol, such as http://127.0.0.1:8000/v1.")] = None,
    model: Annotated[str | None, arg(help="Name of the model there; without --address, a model to load here.")] = None,
    feature: Annotated[
        tuple[int, ...],
        arg(help="Features to label.", help_behavior_hint="(default: all that fired, the sharpest first)"),
    ] = (),
    n_features: Annotated[int | None, arg(help="How many of them at most.")] = None,
    seed: Annotated[int, arg(help="Seed of the texts that scores are made on.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Label features by a language model and score the labels. Examples are sent to --address, and nowhere without one. The key
    is read from the environment variable OPENAI_API_KEY. Repeated, it goes on where it stopped."""
    import saelab
    from saelab.labels import Endpoint, LocalModel, label_features
    from saelab.labels.labelling_run import said

    if model is None:
        raise ValueError("label needs --model: the name at --address, or a model to load here, such as smollm2.")
    with answering(as_json) as answer:
        runs = runs_of(run, one=as_json)
        explainer = Endpoint(address, model) if address else LocalModel(saelab.load_model(model))
        for found in runs:
            store = saelab.load_features(found.features_dir)
            chosen = list(feature) or store.features("sharpness", True, {"n_fired": (1, None)})
            counts = label_features(store, explainer, chosen[:n_features], seed=seed)
            done = f"Labels and scores of {store.folder} are in {store.annotations.path}: {said(counts)}"
            answer({"folder": store.folder, **counts}, done)


def mcp(run: Run, model: OwnModel = None, dtype: Dtype = None) -> None:
    """Answer an agent's questions about the features of RUN (Model Context Protocol, on standard input and output). Reads only,
    and asks no other host; the language model is loaded when a text is first read."""
    import saelab
    from saelab.features.mcp_server import serve

    os.environ.update(HF_HUB_OFFLINE="1", PIP_NO_INDEX="1")  # a model that is not here is not fetched
    with on_stderr(), suppress(KeyboardInterrupt):
        store = saelab.load_features(run)
        serve(store, lambda: with_model(store.sae_folder or run, model, dtype)[1])


FEATURES: dict[str, tuple[Callable[..., None], str]] = {
    "features": (
        features,
        "saelab features runs/mlp\nsaelab features runs/mlp/sae-l1 --n-tokens 20_000\n"
        "saelab features runs/demo --find weather\nsaelab features runs/demo --feature 17 88 --json\n"
        "saelab features runs/demo --contrast calm.txt angry.txt",
    ),
    "label": (
        label,
        "saelab label runs/demo --address http://127.0.0.1:8000/v1 --model qwen --n-features 100\n"
        "saelab label runs/demo --model smollm2 --feature 17 88",
    ),
    "map": (map_, "saelab map runs/demo"),
    "mcp": (mcp, "saelab mcp runs/demo"),
    "verify": (verify, "saelab verify runs/demo\nsaelab verify runs/demo --n-examples 1000 --json"),
}
