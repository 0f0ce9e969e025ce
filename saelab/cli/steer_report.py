"""`saelab steer --report`: one feature measured beside its controls."""

from __future__ import annotations

from typing import Any

from saelab.cli.answers import answering
from saelab.run_folder.opening import load_lm


def report(stores: Any, edits: Any, writing: Any, files: Any, *, model: Any, as_json: bool, dtype: Any) -> None:
    """Measure the feature, write the card, and print the table. Raises `ValueError` for flags that a report has no use for."""
    from saelab.steering import steering_report

    features = [index for indices in edits.feature for index in indices]
    _check(features, edits, writing, files)
    asked = {"strengths": writing.strengths, "seeds": writing.seeds, "temperature": writing.temperature}
    given = {name: value for name, value in asked.items() if value not in ((), None)}
    prompts = {} if writing.prompt is None else {"prompts": [writing.prompt]}
    feature = stores[0].feature(features[0])
    feature = feature if edits.end == "dominant" else getattr(feature, edits.end)
    with answering(as_json) as answer:
        lm = load_lm(model or stores[0].manifest["model"]["name"], dtype)
        found = steering_report(lm, feature, **prompts, max_new_tokens=writing.max_new_tokens, **given)
        if not as_json:
            found.show()
        answer(found.data(), f"The report is in {found.save(files.report)}")


def _check(features: list[int], edits: Any, writing: Any, files: Any) -> None:
    if len(features) != 1:
        raise ValueError(f"--report measures one feature, got {len(features)}: give --feature 17.")
    used = {
        "--plan": edits.plan is not None, "--strength": bool(edits.strength), "--mode": edits.mode != "add",
        "--on": edits.on is not None, "--chat": writing.chat, "--control": writing.control, "--out": files.out is not None,
        "--save-plan": files.save_plan is not None, "--gguf": files.gguf is not None, "--seed": writing.seed != 0,
    }  # fmt: skip
    if wrong := [name for name, is_used in used.items() if is_used]:
        raise ValueError(f"--report has no use for {', '.join(wrong)}; it takes --strengths, --seeds and --prompt.")
