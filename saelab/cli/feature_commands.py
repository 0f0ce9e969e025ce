"""Commands that collect and check feature stores."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from typing import Annotated, Any

from tyro.conf import arg

from saelab.cli.commands import Column, Dtype, OwnModel, OwnTexts, Run, Split, runs_of
from saelab.cli.messages import on_stderr
from saelab.run_folder.opening import with_model
from saelab.runs import find_snapshots


def features(
    run: Run,
    model: OwnModel = None,
    texts: OwnTexts = None,
    column: Column = "text",
    split: Split = None,
    n_tokens: Annotated[int | None, arg(help="Tokens to read; None means all of them.")] = None,
    top_k: Annotated[int, arg(help="Strongest examples to keep per feature.")] = 20,
    renew: Annotated[bool, arg(help="Collect anew what is there, such as a store of an earlier saelab.")] = False,
    snapshots: Annotated[
        bool,
        arg(help="Collect those of the snapshots of training (saelab train --snapshot-every) instead, on few tokens."),
    ] = False,
    dtype: Dtype = None,
) -> None:
    """Collect examples, label and histogram of every feature. An interrupted pass goes on; more tokens extend a finished one."""
    import saelab
    from saelab.features.collecting.snapshots import N_TOKENS, collect_snapshots

    corpus = saelab.load_texts(texts, column=column) if texts else None
    options: dict[str, Any] = {"split": split, "top_k": top_k, "renew": renew}
    for found in runs_of(run):
        if snapshots:
            first = (find_snapshots(found.sae_dir) or [found])[0]  # an SAE in training has no other yet
            _, lm = with_model(first.sae_dir, model, dtype)
            stores = collect_snapshots(found.sae_dir, lm, corpus, n_tokens=n_tokens or N_TOKENS, **options)
            print(f"The features of {len(stores)} snapshots are in {stores[0].folder.parent}")
            continue
        (sae, lm), out_dir = with_model(found.sae_dir, model, dtype), found.features_dir
        saelab.collect_features(sae, lm, corpus, out_dir=out_dir, n_tokens=n_tokens, **options)
        print(f"The features are in {out_dir}")
    print(f"Next: saelab dash {run}")


def verify(
    run: Run,
    model: OwnModel = None,
    n_examples: Annotated[int, arg(help="Stored examples to compute again, with all others of their contexts.")] = 100,
    seed: Annotated[int, arg(help="Seed of their draw.")] = 0,
    as_json: Annotated[bool, arg(name="json", help="Print one JSON object and nothing else.")] = False,
    dtype: Dtype = None,
) -> None:
    """Check a feature store: every byte by its hash, the numbers of every feature against each other, and stored examples against
    what model and SAE compute. The dashboard shows when it was last verified."""
    import saelab
    from saelab.features.verify import verify as check

    for found in runs_of(run):
        sae, lm = with_model(found.sae_dir, model, dtype)
        store = saelab.load_features(found.features_dir, sae)
        result = check(store, lm, n_examples, seed=seed, progress=not as_json)
        store.record_verified(result)
        if as_json:
            print(json.dumps({"folder": str(store.folder), **result._asdict()}))
        else:
            print(f"{store.folder} holds: {result}")


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
    feature: Annotated[tuple[int, ...], arg(help="Features to label; none: all that fired, the sharpest first.")] = (),
    n_features: Annotated[int | None, arg(help="How many of them at most.")] = None,
    seed: Annotated[int, arg(help="Seed of the texts that scores are made on.")] = 0,
    as_json: Annotated[bool, arg(name="json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Label features by a language model and score the labels. Examples are sent to --address, and nowhere without one. The key
    is read from the environment variable OPENAI_API_KEY. Repeated, it goes on where it stopped."""
    import saelab
    from saelab.labels import Endpoint, LocalModel, label_features
    from saelab.labels.labelling_run import said

    if model is None:
        raise ValueError("label needs --model: the name at --address, or a model to load here, such as smollm2.")
    explainer = Endpoint(address, model) if address else LocalModel(saelab.load_model(model))
    for found in runs_of(run):
        store = saelab.load_features(found.features_dir)
        chosen = list(feature) or store.features("sharpness", True, {"n_fired": (1, None)})
        with on_stderr() if as_json else nullcontext():
            counts = label_features(store, explainer, chosen[:n_features], seed=seed, progress=not as_json)
        if as_json:
            print(json.dumps({"folder": str(store.folder), **counts}))
        else:
            print(f"Labels and scores of {store.folder} are in {store.annotations.path}: {said(counts)}")


FEATURES: dict[str, tuple[Callable[..., None], str]] = {
    "features": (features, "saelab features runs/mlp\nsaelab features runs/mlp/sae-l1 --n-tokens 20_000"),
    "label": (
        label,
        "saelab label runs/demo --address http://127.0.0.1:8000/v1 --model qwen --n-features 100\n"
        "saelab label runs/demo --model smollm2 --feature 17 88",
    ),
    "map": (map_, "saelab map runs/demo"),
    "verify": (verify, "saelab verify runs/demo\nsaelab verify runs/demo --n-examples 1000 --json"),
}
