"""`saelab steer`: steered texts beside the unsteered one, from features or a plan file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import OmitArgPrefixes, UseAppendAction, arg

from saelab.cli.answers import AsJson, answering
from saelab.cli.commands import Dtype, OwnModel, Run, runs_of
from saelab.cli.steer_report import report
from saelab.files import check_writable
from saelab.hints.next_commands import command
from saelab.run_folder.opening import load_lm

_WITHOUT_STRENGTH = ("ablate", "project_out")
_NONE, _PROMPT = "(default: none)", "The weather today"
_END = "For a signed feature (abs_topk): the end that positive strengths steer towards; by default the dominant one."


@dataclass(frozen=True)
class Edits:
    """What steers."""

    feature: Annotated[
        UseAppendAction[tuple[tuple[int, ...], ...]],
        arg(help="Index of a feature, as in the dashboard; of several in a row.", help_behavior_hint="(repeatable)"),
    ] = ()
    strength: Annotated[
        UseAppendAction[tuple[tuple[float, ...], ...]],
        arg(
            help="Of each feature, or one for all, in units of the feature's p99; for scale, a factor; unused by ablate and "
            "project_out.",
            help_behavior_hint="(default: 2, or 1 with --strengths; repeatable)",
        ),
    ] = ()
    end: Annotated[Literal["dominant", "positive", "negative"], arg(help=_END)] = "dominant"
    mode: Annotated[
        Literal["add", "clamp", "scale", "ablate", "project_out"],
        arg(
            help="Add to the feature's activation, clamp it, scale it, set it to zero, or remove its direction from every token."
        ),
    ] = "add"
    plan: Annotated[
        Path | None, arg(help="File of edits instead of --feature, from plan.save, the dashboard or --save-plan.")
    ] = None
    on: Annotated[
        Literal["both", "prompt", "generated"] | None,
        arg(help="Tokens that are steered; None: both, or what the plan says."),
    ] = None


@dataclass(frozen=True)
class Writing:
    """What is written."""

    prompt: Annotated[
        str | None,
        arg(help="Text to continue.", help_behavior_hint="(default: The weather today; several for --report)"),
    ] = None
    chat: Annotated[bool, arg(help="The prompt is a user's message: apply the model's chat template.")] = False
    max_new_tokens: Annotated[int, arg(help="Tokens to generate.")] = 40
    temperature: Annotated[
        float | None,
        arg(help="0 always takes the most likely token; None: 0, or 0.8 with several seeds."),
    ] = None
    seed: Annotated[int, arg(help="Seed of the sampling.")] = 0
    seeds: Annotated[tuple[int, ...], arg(help="Several seeds instead of --seed.", help_behavior_hint=_NONE)] = ()
    strengths: Annotated[
        tuple[float, ...],
        arg(
            help="A text for each: multiples of what the edits add, so with --feature alone, units of p99.",
            help_behavior_hint=_NONE,
        ),
    ] = ()
    control: Annotated[bool, arg(help="Also steer with random directions of the same norm.")] = False


@dataclass(frozen=True)
class Files:
    """What is kept."""

    report: Annotated[
        Path | None,
        arg(
            help="Instead, measure one feature beside controls (random directions, random features, the difference of means, a "
            "prompt that asks), a few minutes, and write the card to this HTML file."
        ),
    ] = None
    out: Annotated[Path | None, arg(help="Write the texts side by side to this HTML file.")] = None
    save_plan: Annotated[Path | None, arg(help="Write the edits to this plan file.")] = None
    gguf: Annotated[
        Path | None, arg(help="Write the edits as a control vector, which llama.cpp reads; needs edits that only add.")
    ] = None


def steer(
    run: Run,
    edits: OmitArgPrefixes[Edits],
    writing: OmitArgPrefixes[Writing] = Writing(),  # noqa: B008
    files: OmitArgPrefixes[Files] = Files(),  # noqa: B008
    model: OwnModel = None,
    as_json: AsJson = False,
    dtype: Dtype = None,
) -> None:
    """Continue a prompt with the unsteered model and with features steered: at several strengths and seeds, by a plan file."""
    from saelab.steering import compare
    from saelab.steering.strengths import checked_strengths

    named = {"--out": files.out, "--save-plan": files.save_plan, "--gguf": files.gguf, "--report": files.report}
    for flag, path in named.items():
        if path is not None:
            check_writable(path, flag)  # before the model is loaded, and texts are written
    stores = _stores(run, several=edits.plan is not None)
    if files.report is not None:
        report(stores, edits, writing, files, model=model, as_json=as_json, dtype=dtype)
        return
    writing = replace(writing, prompt=_PROMPT if writing.prompt is None else writing.prompt)
    plan = _plan(stores, edits, writing)
    checked_strengths(writing.strengths or 1.0, plan, all_features=False)
    _save(plan, files)
    with answering(as_json) as answer:
        lm = load_lm(model or stores[0].manifest["model"]["name"], dtype)
        if files.gguf is not None:
            _save_gguf(plan, files.gguf, lm)
        prompt = lm.chat(writing.prompt or "") if writing.chat else writing.prompt
        found = compare(
            lm, prompt, plan, strengths=writing.strengths or 1.0, seeds=writing.seeds or writing.seed,
            read=_features(stores, edits),
            max_new_tokens=writing.max_new_tokens, temperature=writing.temperature, control=writing.control,
        )  # fmt: skip
        if files.out is not None:
            found.save(files.out)
        data, lines = _answer(found, plan, edits, writing)
        answer(data, *lines, *_kept(files))


def _stores(run: Path, several: bool) -> list[Any]:
    """The feature store of RUN, or those of all its SAEs for a plan, which says whose features it steers."""
    import saelab

    found = runs_of(run)
    if len(found) > 1 and not several:
        named = " or ".join(command("steer", one.sae_dir) for one in found)
        raise ValueError(f"{run} holds {len(found)} SAEs, each with its own features; choose one: {named}")
    if len(found) == 1:
        return [saelab.load_features(run)]
    return [saelab.load_features(one.features_dir) for one in found if one.features_dir.is_dir()]


def _plan(stores: Sequence[Any], edits: Edits, writing: Writing) -> Any:
    """The edits that the flags or the plan file tell of."""
    from saelab.steering import Plan

    features, strengths = _flat(edits.feature), _flat(edits.strength)
    if bool(features) == (edits.plan is not None):
        raise ValueError("steer needs --feature 17 (one or several), or --plan FILE, and not both.")
    if edits.plan is not None:
        if strengths:
            raise ValueError("--strength is of --feature; a plan has its own: multiply them by --strengths.")
        plan = Plan.load(edits.plan, stores)
        return plan if edits.on is None else replace(plan, on=edits.on)
    strengths = strengths or [1.0 if writing.strengths else 2.0]
    if len(strengths) not in (1, len(features)):
        raise ValueError(
            f"--strength has {len(strengths)} values for {len(features)} features; give one for all, or one for each."
        )
    strengths = strengths * len(features) if len(strengths) == 1 else strengths
    made = [
        getattr(one, edits.mode)(*([] if edits.mode in _WITHOUT_STRENGTH else [strength]))
        for one, strength in zip(_features(stores, edits), strengths, strict=True)
    ]
    return Plan(made, on=edits.on or "both")


def _features(stores: Sequence[Any], edits: Edits) -> list[Any]:
    """The features of the flags, or their chosen end."""
    chosen = [stores[0].feature(index) for index in _flat(edits.feature)]
    return chosen if edits.end == "dominant" else [getattr(one, edits.end) for one in chosen]


def _flat(repeated: Sequence[Sequence[Any]]) -> list[Any]:
    """The values of a flag that may be repeated, and may have several each time."""
    return [value for values in repeated for value in values]


def _save(plan: Any, files: Files) -> None:
    """Write the plan file; before the model is loaded, as it may be refused."""
    if files.save_plan is not None:
        plan.save(files.save_plan)


def _save_gguf(plan: Any, path: Path, lm: Any) -> None:
    from saelab.interop.directions import save_gguf

    options = [name for name in ("positions", "window", "gate", "cap") if getattr(plan, name) is not None]
    options += [*(["keep_norm"] if plan.keep_norm else []), *(["on"] if plan.on != "both" else [])]
    if options:
        raise ValueError(
            f"A control vector is added at every token, but the plan has {', '.join(options)}: leave it out for --gguf."
        )
    save_gguf(plan.edits, path, str(getattr(lm.model.config, "model_type", "unknown")))


def _answer(found: Any, plan: Any, edits: Edits, writing: Writing) -> tuple[dict[str, Any], list[str]]:
    """The texts as data and as lines: of one strength and seed as two texts, of several as a comparison."""
    import json

    before = "" if writing.chat else str(writing.prompt)
    default, steered = found.texts[0], next(one for one in found.texts if one.strength is not None)
    data: dict[str, Any] = {
        "prompt": writing.prompt, "chat": writing.chat, "max_new_tokens": writing.max_new_tokens,
        "temperature": found.temperature, "seed": default.seed, "default": before + default.text,
        "steered": before + steered.text, "texts": found.rows, "summary": found.summary, "plan": json.loads(plan.to_json()),
    }  # fmt: skip
    features, strengths = _flat(edits.feature), _flat(edits.strength)
    name = f"plan {edits.plan}"
    if features:
        plain = edits.mode in _WITHOUT_STRENGTH
        strength = None if plain else strengths[0] if strengths else 1.0 if writing.strengths else 2.0
        data |= {"feature": features[0], "end": edits.end, "mode": edits.mode, "strength": strength}
        several = f"s {', '.join(map(str, features))}" if len(features) > 1 else f" {features[0]}"
        given = "" if plain else f" {', '.join(f'{one:g}' for one in strengths or [strength])}"
        name = f"feature{several}{'' if edits.end == 'dominant' else f' ({edits.end} end)'}, {edits.mode}{given}"
    if len(found.texts) > 2:
        return data, [f"{name}:", str(found)]
    row = found.rows[1]
    read = "" if row["read_back"] is None else f"read back {row['read_back']:.2f} ({row['read_back_rise']:+.2f}), "
    numbers = f"({read}cost {row['nll_cost']:+.2f} nats per token)"
    return data, [f"default: {data['default']}\n", f"{name}: {data['steered']}\n", numbers]


def _kept(files: Files) -> list[str]:
    named = {"The texts are": files.out, "The plan is": files.save_plan, "The control vector is": files.gguf}
    return [f"{what} in {path}" for what, path in named.items() if path is not None]


STEER = {
    "steer": (
        steer,
        "saelab steer runs/demo --feature 2769\n"
        'saelab steer runs/demo --feature 2769 --strength 4 --prompt "My favourite place is" --temperature 0.8 --seed 1\n'
        "saelab steer runs/demo --feature 2769 --strength 2 --feature 3948 --strength 1 --on generated --save-plan plan.json\n"
        "saelab steer runs/demo --feature 2769 --strengths 0 1 2 4 --seeds 0 1 2 --control --out card.html\n"
        'saelab steer runs/demo --plan plan.json --chat --prompt "Where shall we go?" --json\n'
        "saelab steer runs/demo --feature 2769 --strength 2 --gguf vector.gguf\n"
        "saelab steer runs/demo --feature 2769 --report report.html",
    )
}
