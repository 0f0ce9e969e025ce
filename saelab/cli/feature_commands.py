"""Commands that collect and check feature stores."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from typing import Annotated

from tyro.conf import arg

from saelab.cli.commands import Column, Dtype, OwnModel, OwnTexts, Run, Split, runs_of, with_model
from saelab.cli.messages import on_stderr


def features(
    run: Run,
    model: OwnModel = None,
    texts: OwnTexts = None,
    column: Column = "text",
    split: Split = None,
    n_tokens: Annotated[int | None, arg(help="Tokens to read; None means all of them.")] = None,
    top_k: Annotated[int, arg(help="Strongest examples to keep per feature.")] = 20,
    renew: Annotated[bool, arg(help="Collect again what is there, such as a store of an earlier saelab.")] = False,
    dtype: Dtype = None,
) -> None:
    """Collect examples, label and histogram of every feature. An interrupted pass goes on; more tokens extend a finished one."""
    import saelab

    corpus = saelab.load_texts(texts, column=column) if texts else None
    for found in runs_of(run):
        (sae, lm), out_dir = with_model(found.sae_dir, model, dtype), found.features_dir
        saelab.collect_features(
            sae, lm, corpus, out_dir=out_dir, split=split, n_tokens=n_tokens, top_k=top_k, renew=renew
        )
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
            print(
                f"{store.folder} holds: hashes, the numbers of {result.n_features} features, and {result.n_examples} activations "
                f"of {result.n_contexts} contexts, computed again; largest difference {result.largest_error:.1e} of a p99."
            )


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
    as_json: Annotated[bool, arg(name="json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Label features by a language model and score the labels. Examples are sent to --address, and nowhere without one. The key
    is read from the environment variable OPENAI_API_KEY. Repeated, it goes on where it stopped."""
    import saelab
    from saelab.labels import Endpoint, LocalModel, label_features

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
            said = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in counts.items())
            print(f"Labels and scores of {store.folder} are in {store.annotations.path}: {said}")


FEATURES: dict[str, tuple[Callable[..., None], str]] = {
    "features": (features, "saelab features runs/mlp\nsaelab features runs/mlp/sae-l1 --n-tokens 20_000"),
    "label": (
        label,
        "saelab label runs/demo --address http://127.0.0.1:8000/v1 --model qwen --n-features 100\n"
        "saelab label runs/demo --model smollm2 --feature 17 88",
    ),
    "verify": (verify, "saelab verify runs/demo\nsaelab verify runs/demo --n-examples 1000 --json"),
}
