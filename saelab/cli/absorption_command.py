"""`saelab absorption`: whether features of first letters are split, and absorbed by features of words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

from tyro.conf import arg

from saelab.cli.answers import AsJson, answering
from saelab.cli.commands import Dtype, OwnModel, Run, runs_of
from saelab.run_folder.opening import with_model


def absorption(
    run: Run,
    n_words: Annotated[int, arg(help="Most words of a letter, 80 or more; a third of them is held out.")] = 180,
    max_k: Annotated[int, arg(help="Most features of a k-sparse probe.")] = 10,
    examples: Annotated[tuple[str, ...], arg(help="Words that are spelled before every word.")] = ("time", "house"),
    seed: Annotated[int, arg(help="Seed of the draw of the words.")] = 0,
    model: OwnModel = None,
    as_json: AsJson = False,
    dtype: Dtype = None,
) -> None:
    """Measure splitting and absorption of first letters, on words of the model's vocabulary. An interrupted run goes on; the
    report is RUN/probing/letters.json."""
    from saelab.probing.letter_report import save, told
    from saelab.probing.letters import LetterConfig, first_letters

    config = LetterConfig(n_words, max_k, examples, seed)  # before the model, which takes longer to load
    with answering(as_json) as answer:
        for found in runs_of(run, one=as_json):
            sae, lm = with_model(found.sae_dir, model, dtype)
            folder = found.report_path.parent / "probing"
            report = first_letters(sae, lm, config, folder=folder)
            path = save(report, folder / found.report_path.name.replace("report", "letters"))
            answer(report.data(), f"SAE {found.sae_dir}", *told(report), f"The report is in {path}")


ABSORPTION: dict[str, tuple[Callable[..., None], str]] = {
    "absorption": (
        absorption,
        "saelab absorption runs/demo\nsaelab absorption runs/demo --n-words 400 --json",
    )
}
