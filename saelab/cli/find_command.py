"""`saelab find`: which features of a run steer, at which strength and cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

from tyro.conf import arg

from saelab.cli.answers import AsJson, answering
from saelab.cli.commands import Dtype, OwnModel, Run, runs_of
from saelab.run_folder.opening import load_lm


def find(
    run: Run,
    feature: Annotated[tuple[int, ...], arg(help="Features to try, instead of a draw.")] = (),
    n_candidates: Annotated[int, arg(help="Features to draw: of topics, neither rare nor dense.")] = 200,
    prompt: Annotated[tuple[str, ...], arg(help="Prompts to continue.", help_behavior_hint="(default: six)")] = (),
    max_new_tokens: Annotated[int, arg(help="Tokens of each text.")] = 30,
    temperature: Annotated[float, arg(help="0 takes the likeliest token.")] = 0.0,
    seed: Annotated[int, arg(help="Seed of the draw and of the texts.")] = 0,
    limit: Annotated[int, arg(help="Features to list.")] = 10,
    model: OwnModel = None,
    as_json: AsJson = False,
    dtype: Dtype = None,
) -> None:
    """Find features that steer: try many at several strengths, and let the unsteered model and the SAE read the texts. An
    interrupted search goes on; the scores are a column of the dashboard's table."""
    import saelab
    from saelab.steering.find import PROMPTS
    from saelab.steering.find import find as find_features

    runs_of(run, one=True)
    store = saelab.load_features(run)
    for index in feature:
        store.feature(index)  # refused before the model is loaded
    with answering(as_json) as answer:
        found = find_features(
            store,
            load_lm(model or store.manifest["model"]["name"], dtype),
            prompt or PROMPTS,
            feature or None,
            n_candidates=n_candidates,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
        )
        rows = [{"feature": row.feature, "label": row.label} | row.as_json() for row in found.rows[:limit]]
        data = {"n_tried": len(found.rows), "n_working": len(found.working), "trials": found.path, "rows": rows}
        answer(data, *found.told(limit))


FIND: dict[str, tuple[Callable[..., None], str]] = {
    "find": (
        find,
        "saelab find runs/demo\nsaelab find runs/demo --n-candidates 24\nsaelab find runs/demo --feature 2769 3948",
    )
}
