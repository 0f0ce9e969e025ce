"""`find`: which features of a store steer, at which strength, and what it costs.

Candidates are tried in three rounds: all of them at the first strength on the first two prompts; the better part at the other
strengths; the best of these on all other prompts, since the best of many on two prompts are partly lucky. A candidate whose
text reads back but is not fluent may be fluent at another strength, so it stays in on half of its read-back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tqdm.auto import tqdm

from saelab.errors import SaelabError
from saelab.files import locked
from saelab.models import LanguageModel
from saelab.steering.candidates import draw_candidates
from saelab.steering.criteria import Criteria, next_token_criteria
from saelab.steering.found import Found, Row, best_score, mean, ranked, row_of
from saelab.steering.trial_file import TrialFile
from saelab.steering.trials import ARMS, Choice, Settings, Trial, Trials, as_texts
from saelab.validation import check_integer

PROMPTS = (
    "My favourite thing in the world is",
    "I think that",
    "The most important thing about this is",
    "My friend told me that",
    "The book on the shelf was about",
    "After the meeting we decided to",
)
FIRST_PROMPTS = 2
"""Those that all rounds use; the rest are for the last one."""
STRENGTHS = (2.0, 1.0, 1.5, 3.0)
"""In p99. The first is tried with every candidate, the others with the better part."""
KEPT, FINALISTS = 0.4, 0.15
"""Parts of the candidates that get to the second and to the last round."""
_VERSION = 2
_FROM_READ_BACK = 0.5


def find(
    store: Any,
    lm: LanguageModel,
    prompts: Any = PROMPTS,
    features: Sequence[int] | None = None,
    *,
    n_candidates: int = 200,
    strengths: Sequence[float] = STRENGTHS,
    max_new_tokens: int = 30,
    temperature: float = 0.0,
    seed: int = 0,
    progress: bool = True,
) -> Found:
    """Rank features of `store` by how far steering with them reads back in fluent text, and find the strength (in p99).

    Candidates are `features`, or `n_candidates` drawn with `seed` (`candidates.py`). Each continues the first two prompts, the
    best all of them; `trials.py` says how a text is scored. Finished batches are kept in `RUN/steering`, one file for each set of
    arguments, and the same call goes on where it was interrupted. At the end the scores go to `annotations.sqlite`, as
    `steer_score` of the table and of the feature. Verify a choice on other prompts with `run_trials`.

    Raises `ValueError` for no candidates, prompts that are no texts, a strength of 0, or a model that is not the store's or is
    being steered; `SaelabError` while another process finds features in the same run, or for a file of trials that was altered.
    """
    strengths = _checked(strengths)
    check_integer("n_candidates", n_candidates, 1)
    check_integer("seed", seed, 0, 2**63 - 1)
    chosen = draw_candidates(store, n_candidates, seed) if features is None else _indices(features)
    if not chosen:
        raise ValueError("features=[] names no feature to try.")
    settings = Settings(as_texts(prompts), max_new_tokens, temperature, seed)
    trials = Trials(store, lm, settings)
    folder = store.folder.resolve().parent / "steering"
    with locked(folder, f"Another process is finding features in {folder}: wait until it is done."):
        kept = TrialFile(folder, _identity(trials, chosen, strengths))
        with tqdm(total=0, desc="Steering", unit="text", disable=not progress) as bar:
            search = _Search(trials, kept, bar)
            rows = search.rows(chosen, strengths)
        store.annotations.add_each("steer", {row.feature: row.as_json() for row in rows})
    known = {row.feature: _known(store, row.feature) for row in rows}
    return Found(tuple(rows), settings, tuple(search.unsteered), kept.path, known)


def _indices(features: Any) -> list[int]:
    """Indices of features, each once. Raises `ValueError` for what is no list of them."""
    if isinstance(features, str | int) or not all(hasattr(one, "__index__") for one in features):
        raise ValueError(f"features={features!r}; expected indices such as [17, 88].")
    return list(dict.fromkeys(int(one) for one in features))


def _identity(trials: Trials, features: Sequence[int], strengths: Sequence[float]) -> dict[str, Any]:
    """What makes two searches the same."""
    lm, how = trials.lm, trials.settings._asdict()
    return {
        "saelab_find": _VERSION,
        "sae": trials.store.manifest["sae"]["hash"],
        "store": trials.store.manifest["files"]["store.sqlite"]["sha256"],  # strengths are in its p99
        "model": lm.hash,
        "dtype": str(lm.dtype),
        "strengths": list(strengths),
        "features": list(map(int, features)),
        "kept": [KEPT, FINALISTS, FIRST_PROMPTS],
        "arms": ARMS,
        **how,
        "prompts": list(how["prompts"]),
    }


class _Search:
    """Runs batches, or takes them from the file; a batch that is not there is run as a whole, so that a call that was
    interrupted computes the same numbers."""

    def __init__(self, trials: Trials, kept: TrialFile, bar: Any) -> None:
        self.trials, self.kept, self.bar = trials, kept, bar
        self.unsteered: list[str] = self._batch("unsteered", lambda: [text for text, _ in trials.unsteered])

    def rows(self, features: Sequence[int], strengths: Sequence[float]) -> list[Row]:
        """The result of every feature, the best first."""
        tried, criteria = self.run(features, strengths), self.criteria(features, strengths[0])
        store = self.trials.store
        given = store.labels
        labels = {one: given.get(one) or store.row_of(one)["label"] for one in features}
        rows = [row_of(one, labels[one], tried[one], criteria[one]) for one in features]
        return ranked(rows)

    def run(self, features: Sequence[int], strengths: Sequence[float]) -> dict[int, list[Trial]]:
        """All trials by feature."""
        first, *others = strengths
        n, n_prompts = len(features), len(self.trials.settings.prompts)
        early, late = range(n_prompts)[:FIRST_PROMPTS], range(n_prompts)[FIRST_PROMPTS:]
        tried = {feature: [] for feature in features}
        self._try([(feature, first) for feature in features], early, tried)
        better = sorted(features, key=lambda one: (-_promise(tried[one]), one))[: max(1, round(KEPT * n))]
        self._try([(feature, strength) for strength in others for feature in better], early, tried)
        best = sorted(better, key=lambda one: (-best_score(tried[one]), one))[: max(1, round(FINALISTS * n))]
        self._try([(feature, strength) for strength in strengths for feature in best], late, tried)
        return tried

    def criteria(self, features: Sequence[int], strength: float) -> dict[int, Criteria]:
        """`criteria.py` of every feature."""
        found: list[Any] = []
        of, prompts = self.trials, self.trials.settings.prompts[:FIRST_PROMPTS]
        for batch in _split([(feature, strength) for feature in features]):
            found += self._batch(
                f"criteria {_named(batch)}", lambda batch=batch: next_token_criteria(of.store, of.lm, batch, prompts)
            )
        return {feature: Criteria(*one) for feature, one in zip(features, found, strict=True)}

    def _try(self, choices: Sequence[Choice], prompts: Sequence[int], tried: dict[int, list[Trial]]) -> None:
        self.bar.total += len(choices) * len(prompts)
        for prompt in prompts if choices else ():
            for batch in _split(choices):
                told = self._batch(f"prompt {prompt}: {_named(batch)}", lambda b=batch, n=prompt: self.trials.run(b, n))
                try:
                    for one in told:
                        trial = Trial(*one)._replace(ids=tuple(one[4]))
                        tried[trial.feature].append(trial)
                except (TypeError, KeyError, IndexError) as error:
                    raise SaelabError(
                        f"{self.kept.path} was altered: move it away, and the search begins anew."
                    ) from error
                self.bar.update(len(batch))

    def _batch(self, key: str, run: Callable[[], Any]) -> Any:
        if key not in self.kept.batches:
            self.kept.add(key, run())
        return self.kept.batches[key]


def _split(choices: Sequence[Choice]) -> Iterator[Sequence[Choice]]:
    """As few batches as `ARMS` allows, about equally large."""
    n = -(-len(choices) // ARMS)
    size = -(-len(choices) // n)
    return (choices[start : start + size] for start in range(0, len(choices), size))


def _named(choices: Sequence[Choice]) -> str:
    return " ".join(f"{feature}x{strength!r}" for feature, strength in choices)


def _promise(trials: Sequence[Trial]) -> float:
    return max(mean([one.score for one in trials]), _FROM_READ_BACK * mean([one.read_back for one in trials]))


def _known(store: Any, feature: int) -> dict[str, float | None]:
    """What the store says of a feature that might tell how it steers."""
    row = store.row_of(feature)
    side = "negative" if row["sign"] == -1 else "positive"
    arrays = store.arrays(feature, "logits")
    promoted = {"promoted_logit": arrays.get(side), "promoted_z": arrays.get(f"z_{side}")}
    sizes = {name: None if x is None or not len(x) else float(abs(x).max()) for name, x in promoted.items()}
    return {name: row[name] for name in ("density", "sharpness", "label_share", "p99")} | sizes


def _checked(strengths: Sequence[float]) -> tuple[float, ...]:
    found = tuple(dict.fromkeys(float(one) for one in strengths))
    if not found or not all(abs(one) < float("inf") and one != 0 for one in found):
        raise ValueError(f"strengths={strengths!r}; expected numbers other than 0, such as {STRENGTHS}.")
    return found
