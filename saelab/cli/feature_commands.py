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
from saelab.cli.commands import Column, Dtype, OwnModel, OwnTexts, Run, Split, runs_of, with_model
from saelab.cli.messages import on_stderr

Find = Annotated[
    str | None, arg(help="Collect nothing; list the features that words find, or a token in double quotes.")
]
Shown = Annotated[tuple[int, ...], arg(help="Collect nothing; show these features.")]
_TWO = (
    "Collect nothing; list the features that fire in more texts of one file than of the other. A .txt file holds a text in each "
    "line."
)
TwoFiles = Annotated[tuple[Path, Path] | None, arg(metavar="FILE FILE", help=_TWO)]


def features(
    run: Run,
    model: OwnModel = None,
    texts: OwnTexts = None,
    column: Column = "text",
    split: Split = None,
    n_tokens: Annotated[int | None, arg(help="Tokens to read; None means all of them.")] = None,
    top_k: Annotated[int, arg(help="Strongest examples to keep per feature.")] = 20,
    renew: Annotated[bool, arg(help="Collect anew what is there, such as a store of an earlier saelab.")] = False,
    find: Find = None,
    feature: Shown = (),
    contrast: TwoFiles = None,
    limit: Annotated[int, arg(help="Features to list, or examples of each to show.")] = 20,
    as_json: AsJson = False,
    dtype: Dtype = None,
) -> None:
    """Collect examples and a label of every feature, going on where that stopped; or read them: --find, --feature, --contrast."""
    import saelab
    from saelab.distributed import is_main_process
    from saelab.features.plain import store_data

    if find is not None or feature or contrast:
        _one_question(find=find is not None, feature=bool(feature), contrast=bool(contrast))
        with answering(as_json) as answer:
            if contrast:
                _contrast(answer, run, contrast, column, limit, (model, dtype))
            elif feature:
                feature_answers.cards(answer, saelab.load_features(run), feature, limit)
            else:
                feature_answers.find(answer, saelab.load_features(run), find or "", limit)
        return
    options: dict[str, Any] = {"split": split, "n_tokens": n_tokens, "top_k": top_k, "renew": renew}
    with answering(as_json) as answer:
        corpus = saelab.load_texts(texts, column=column) if texts else None
        for found in runs_of(run, one=as_json):
            (sae, lm), out_dir = with_model(found.sae_dir, model, dtype), found.features_dir
            store = saelab.collect_features(sae, lm, corpus, out_dir=out_dir, **options)
            if is_main_process():
                answer(store_data(store), f"The features are in {out_dir}")
        print(f"Next: saelab dash {run}")


def _contrast(
    answer: feature_answers.Answer,
    run: Path,
    files: tuple[Path, Path],
    column: str,
    limit: int,
    model: tuple[str | None, str | None],
) -> None:
    import saelab

    store = saelab.load_features(run)
    sets = [(str(path), feature_answers.texts(path, column)) for path in files]
    _, lm = with_model(store.sae_folder or run, *model)
    feature_answers.contrast(answer, store, lm, sets, limit)


def _one_question(**asked: bool) -> None:
    if sum(asked.values()) > 1:
        raise ValueError(
            f"--{' and --'.join(name for name, here in asked.items() if here)} are two questions: ask one."
        )


def verify(
    run: Run,
    model: OwnModel = None,
    n_examples: Annotated[int, arg(help="Stored examples to compute again, with all others of their contexts.")] = 100,
    seed: Annotated[int, arg(help="Seed of their draw.")] = 0,
    as_json: AsJson = False,
    dtype: Dtype = None,
) -> None:
    """Check a feature store: every byte by its hash, the numbers of every feature against each other, and stored examples against
    what model and SAE compute. The dashboard shows when it was last verified."""
    import saelab
    from saelab.features.verify import verify as check

    with answering(as_json) as answer:
        for found in runs_of(run, one=as_json):
            sae, lm = with_model(found.sae_dir, model, dtype)
            store = saelab.load_features(found.features_dir, sae)
            result = check(store, lm, n_examples, seed=seed)
            store.record_verified(result)
            said = (
                f"{store.folder} holds: hashes, the numbers of {result.n_features} features, and {result.n_examples} activations "
                f"of {result.n_contexts} contexts, computed again; largest difference {result.largest_error:.1e} of a p99."
            )
            answer({"folder": store.folder, **result._asdict()}, said)


def label(
    run: Run,
    address: Annotated[str | None, arg(help="Server of OpenAI's protocol, such as http://127.0.0.1:8000/v1.")] = None,
    model: Annotated[str | None, arg(help="Name of the model there; without --address, a model to load here.")] = None,
    feature: Annotated[tuple[int, ...], arg(help="Features to label; none: all that fired, the sharpest first.")] = (),
    n_features: Annotated[int | None, arg(help="How many of them at most.")] = None,
    seed: Annotated[int, arg(help="Seed of the texts that scores are made on.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Label features by a language model and score the labels. Examples are sent to --address, and nowhere without one. The key
    is read from the environment variable OPENAI_API_KEY. Repeated, it goes on where it stopped."""
    import saelab
    from saelab.labels import Endpoint, LocalModel, label_features

    if model is None:
        raise ValueError("label needs --model: the name at --address, or a model to load here, such as smollm2.")
    with answering(as_json) as answer:
        runs = runs_of(run, one=as_json)
        explainer = Endpoint(address, model) if address else LocalModel(saelab.load_model(model))
        for found in runs:
            store = saelab.load_features(found.features_dir)
            chosen = list(feature) or store.features("sharpness", True, {"n_fired": (1, None)})
            counts = label_features(store, explainer, chosen[:n_features], seed=seed)
            said = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in counts.items())
            done = f"Labels and scores of {store.folder} are in {store.annotations.path}: {said}"
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
    "mcp": (mcp, "saelab mcp runs/demo"),
    "verify": (verify, "saelab verify runs/demo\nsaelab verify runs/demo --n-examples 1000 --json"),
}
