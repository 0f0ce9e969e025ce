"""`saelab demo`: from text to a trained, evaluated, browsable and steered SAE, with the same calls as in the README."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import arg

from saelab.hints.next_commands import check_is_run, command, in_turn

if TYPE_CHECKING:
    from saelab.models import LanguageModel
    from saelab.saes import SAE

_SHOWN = ("fvu", "explained_variance", "l0", "dead_fraction", "ce_loss", "ce_loss_sae", "ce_loss_recovered", "kl")


def demo(
    out_dir: Annotated[Path, arg(help="Run folder to create or resume.")] = Path("runs/demo"),
    model: Annotated[str, arg(help="smollm2, a Hugging Face id, or a model folder.")] = "smollm2",
    texts: Annotated[str, arg(help="demo, concepts, a file, or a Hugging Face dataset id.")] = "demo",
    hook_name: Annotated[str, arg(help="Hook name of the model.")] = "blocks.14.hook_resid_post",
    n_tokens: Annotated[int, arg(help="Tokens whose activations are stored.")] = 250_000,
    train_tokens: Annotated[int, arg(help="Tokens to train on; the stored ones are repeated.")] = 2_000_000,
    d_sae: Annotated[int, arg(help="Number of features.")] = 4096,
    k: Annotated[int, arg(help="Features that fire per token.")] = 32,
    eval_tokens: Annotated[
        int | None, arg(help="Held-out tokens to evaluate and collect features on; None uses all.")
    ] = None,
    seed: Annotated[int, arg(help="Seed of the shuffle and of the weights.")] = 0,
    serve: Annotated[bool, arg(help="Serve the dashboard at the end.")] = True,
    port: Annotated[int, arg(help="Port of the dashboard.")] = 8501,
) -> None:
    """Train an SAE on a small language model, evaluate it, collect its features and steer with the best, step by step."""
    import saelab
    from saelab import presets

    check_is_run(out_dir)
    _say(1, f"Load the language model {model!r} and the texts {texts!r}")
    corpus, lm = saelab.load_texts(texts), saelab.load_model(model)
    _say(2, f"Run the model over {n_tokens:,} tokens and store the activations of {hook_name}: {out_dir / 'cache'}")
    options: dict[str, Any] = {"ctx_len": min(256, lm.max_ctx), "seed": seed}
    cache = saelab.harvest(lm, corpus, [hook_name], n_tokens, out_dir / "cache", **options)
    _say(3, f"Train a TopK SAE with {d_sae:,} features, {k} per token, on {train_tokens:,} tokens: {out_dir / 'sae'}")
    config = saelab.TrainConfig(n_tokens=train_tokens, batch_size=min(2048, train_tokens), seed=seed)
    sae: Any = saelab.train(presets.cpu("topk", d_sae, config.n_tokens, k=k), cache, config, out_dir=out_dir / "sae")
    _look_at(sae, lm, out_dir, eval_tokens)
    print(f"\nDone. Everything is in {out_dir}.")
    print(in_turn(command("dash", out_dir), command("verify", out_dir)), flush=True)
    if serve:
        from saelab.app.serve import serve as serve_dashboard

        serve_dashboard(out_dir, port=port)


def _look_at(sae: SAE, lm: LanguageModel, out_dir: Path, eval_tokens: int | None) -> None:
    """Evaluate a trained SAE, collect its features, steer with some."""
    import saelab

    _say(4, f"Evaluate it on documents it was not trained on: {out_dir / 'report.json'}")
    report = saelab.evaluate(sae, lm, n_tokens=eval_tokens, path=out_dir / "report.json")
    print("\n".join(f"   {name:<20}{_number(getattr(report, name))}" for name in _SHOWN))
    _say(5, f"Collect examples, histogram and logits of every feature: {out_dir / 'features'}")
    store = saelab.collect_features(sae, lm, out_dir=out_dir / "features", n_tokens=eval_tokens)
    _say(6, "Find features that steer the model")
    from saelab.cli.demo_steering import steering_lines
    from saelab.features.visible import visible_lines

    for line in steering_lines(lm, store):
        print(f"   {visible_lines(line)}".rstrip(), flush=True)


def _say(step: int, what: str) -> None:
    print(f"\n[{step}/6] {what}", flush=True)


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.4f}"
