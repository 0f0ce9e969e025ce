"""`concept_bench`: the factor is chosen on one half of the prompts and scored on the other, by any judge."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import planted_steering as planted
import pytest
import torch
from conftest import build_tokenizer

from saelab.edits.direction import Direction
from saelab.errors import SaelabError
from saelab.labels import LocalModel
from saelab.steering import Concept, ModelJudge, concept_bench
from saelab.steering.concept_bench import ASKED
from saelab.steering.judges import Marks, Measured, NoJudge, mark_in

HOW: dict[str, Any] = {"max_new_tokens": 30, "temperature": planted.TEMPERATURE, "seed": 3, "progress": False}
SHORT: dict[str, Any] = {"max_new_tokens": 3, "progress": False, "factors": (1.0,)}


@dataclass
class CountsThe:
    """A judge that looks for the token of feature 0, and remembers what it was asked."""

    name: str = "counts"
    asked: list[tuple[str, str]] = field(default_factory=list)

    def marks(self, concept: str, prompt: str, text: str, measured: Measured) -> Marks:
        self.asked.append((concept, prompt))
        n = text.count("The")
        return Marks(min(n, 2), 1.0, 2.0 if n < 8 else 0.0)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return planted.planted_store(tmp_path_factory.mktemp("planted") / "run", build_tokenizer())


@pytest.fixture
def concept(case):
    _, store = case
    random = Direction(torch.randn(planted.D, generator=torch.Generator().manual_seed(0)), planted.HOOK)
    return Concept("the word The", {"feature": store.feature(0), "random": random})


def test_the_planted_feature_wins_without_a_judge(case, concept):
    lm, _ = case
    found = concept_bench(lm, [concept], planted.PROMPTS, planted.STRENGTHS, **HOW)
    rows = {row.method: row for row in found.rows}
    assert list(rows) == ["feature", "random", ASKED] and rows["feature"].factor == 4.0 and rows[ASKED].factor is None
    assert rows["feature"].score.low > 0.3 and rows["random"].score.mean < 0.3 and rows["feature"].instruction is None
    assert rows["feature"].n_unmarked == 0 and len(rows["feature"].items) == 3 * 4 and rows[ASKED].nll_cost is not None
    assert found.methods()["feature"].mean == pytest.approx(rows["feature"].score.mean)
    found.show()
    json.dumps(found.data(), allow_nan=False)


def test_the_factor_is_chosen_on_the_prompts_that_are_not_scored(case, concept):
    lm, _ = case

    class Turncoat(CountsThe):
        """Likes the weak factor on scored prompts, and the strong one on those that choose."""

        def marks(self, concept: str, prompt: str, text: str, measured: Measured) -> Marks:
            strong = text.count("The") > 3
            return Marks(2.0 if strong == (planted.PROMPTS.index(prompt) % 2 == 0) else 0.5, None, 2.0)

    found = concept_bench(lm, [concept], planted.PROMPTS, (0.5, 12.0), judge=Turncoat(), ask="", **HOW)
    assert found.rows[0].factor == 12.0 and found.rows[0].score.mean == pytest.approx(0.8)
    assert found.rows[0].concept == 0.5


def test_an_interrupted_bench_goes_on(case, concept, tmp_path):
    lm, _ = case
    judge, calls = CountsThe(), 0
    how: dict[str, Any] = {"factors": (1.0, 4.0), "max_new_tokens": 4, "progress": False}
    call = how | {"folder": tmp_path}
    whole = concept_bench(lm, [concept], planted.PROMPTS[:2], judge=judge, **how)
    n_asked = len(judge.asked)

    class Tires(CountsThe):
        def marks(self, concept: str, prompt: str, text: str, measured: Measured) -> Marks:
            nonlocal calls
            calls += 1
            if calls == 7:
                raise KeyboardInterrupt
            return super().marks(concept, prompt, text, measured)

    with pytest.raises(KeyboardInterrupt):
        concept_bench(lm, [concept], planted.PROMPTS[:2], judge=Tires(), **call)
    again = CountsThe()
    assert concept_bench(lm, [concept], planted.PROMPTS[:2], judge=again, **call) == whole
    assert len(again.asked) == n_asked - 6  # the seventh mark was of the second text of its prompt
    assert concept_bench(lm, [concept], planted.PROMPTS[:2], judge=CountsThe("other"), **call).judge == "other"
    assert len(list(tmp_path.glob("bench-*.jsonl"))) == 2


def test_the_prompt_that_asks_and_chat(tiny_lm, hostile_run):
    import saelab

    feature = saelab.load_features(hostile_run).feature(3)
    prompts = ["the river", "the mill"]
    found = concept_bench(
        tiny_lm, [Concept("water", {"f": feature})], prompts, chat=True, ask="About {concept}: ", **SHORT
    )
    text = tiny_lm.generate(tiny_lm.chat("About water: the river"), 3, 0.0, 0)
    assert text.endswith(found.rows[1].items[0].text) and found.rows[1].method == ASKED


def test_marks():
    assert Marks(2, 2, 2).score == 2 and Marks(2, None, 1).score == pytest.approx(4 / 3) and Marks(2, 0, 2).score == 0
    assert NoJudge().marks("a", "b", "c", Measured(0.1, 0.5)) == (1.0, None, 1.0)
    assert (
        NoJudge().marks("a", "b", "c", Measured(-0.5, 0.5)).score == 0
        and NoJudge().marks("a", "b", "c", Measured(0.9, 1)).score == 2
    )
    with pytest.raises(SaelabError, match="needs a feature"):
        NoJudge().marks("a", "b", "c", Measured(None, 1.0))
    told = {
        "2": 2,
        "Mark: 1.": 1,
        "1": 1,
        "0 or 2": None,
        "1.5": None,
        "10": None,
        "good": None,
        "2, so 2": 2,
        "": None,
        "0": 0,
    }
    assert {answer: mark_in(answer) for answer in told} == told


def test_a_model_is_asked_three_questions(tiny_lm, caplog):
    @dataclass
    class Model:
        name: str = "scripted"
        asked: list[Any] = field(default_factory=list)

        def ask(self, messages: Any, max_tokens: int) -> str:
            self.asked.append(messages[1]["content"])
            return ["2", "1", "Answer: 0"][len(self.asked) - 1]

    class Vague(Model):
        def ask(self, messages: Any, max_tokens: int) -> str:
            return "It is wet."

    model = Model()
    assert ModelJudge(model).marks("rain", "It is", " wet", Measured(None, 1.0)) == (2.0, 1.0, 0.0)
    assert "rain" in model.asked[0] and all("Text:  wet" in one for one in model.asked)
    assert ModelJudge(Vague()).marks("rain", "It is", " wet", Measured(None, 1.0)) is None
    assert "answered 'It is wet.'" in caplog.text
    assert LocalModel(tiny_lm).ask([{"role": "user", "content": "0?"}], 2) is not None  # what ModelJudge asks


def test_texts_without_marks_are_left_out_and_counted(case, concept):
    lm, _ = case

    class Forgets(CountsThe):
        """Gives no marks to the third prompt, nor to any text of what is named random."""

        silent: str = ""

        def marks(self, concept: str, prompt: str, text: str, measured: Measured) -> Marks | None:
            marks = super().marks(concept, prompt, text, measured)
            return None if prompt == planted.PROMPTS[3] or self.silent == "all" else marks

    how = {"factors": (0.5, 4.0), "ask": "", **HOW}
    whole = concept_bench(lm, [concept], planted.PROMPTS, judge=CountsThe(), **how).rows[0]
    found = concept_bench(lm, [concept], planted.PROMPTS, judge=Forgets(), **how)
    row = found.rows[0]
    assert row.n_unmarked == 2 and row.factor == whole.factor and whole.n_unmarked == 0
    (held,) = [one for one in whole.items if one.factor == row.factor and one.prompt == 1]
    assert row.score.mean == held.score and json.dumps(found.data(), allow_nan=False)
    silent = Forgets()
    silent.silent = "all"
    with pytest.raises(SaelabError, match="gave no marks to the texts of 'the word The' by 'feature'"):
        concept_bench(lm, [concept], planted.PROMPTS, judge=silent, **how)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"prompts": ["a"]}, "at least 2"),
        ({"concepts": []}, "at least one"),
        ({"concepts": "twice"}, "name of its own"),
        ({"concepts": [Concept("a", {})]}, "needs methods"),
        ({"concepts": [Concept("a", {ASKED: None})]}, "always there"),
        ({"factors": (1.0, 1.0)}, "factors.*each once"),
        ({"factors": (float("nan"),)}, "factors=.nan"),
        ({"factors": ()}, "expected numbers"),
        ({"concepts": "read"}, "no feature"),
    ],
)
def test_bad_input_is_refused(case, concept, change, said):
    lm, _ = case
    if isinstance(change.get("concepts"), str):
        odd = {"twice": [concept, concept], "read": [concept._replace(read=3)]}
        change = {"concepts": odd[change["concepts"]]}
    with pytest.raises(ValueError, match=said):
        given: dict[str, Any] = {"concepts": [concept], "prompts": ["a", "b"], **SHORT} | change
        concept_bench(lm, **given)


def test_a_direction_alone_needs_a_judge_and_an_unsteered_model(case, concept):
    lm, store = case
    alone = concept._replace(methods={"random": concept.methods["random"]})
    with pytest.raises(SaelabError, match="needs a feature"):
        concept_bench(lm, [alone], ["The", "old"], **SHORT)
    assert concept_bench(lm, [alone], ["The", "old"], judge=CountsThe(), **SHORT).rows
    assert concept_bench(lm, [alone._replace(read=store.feature(0))], ["The", "old"], **SHORT).rows
    with lm.steer(store.feature(0) * 1.0), pytest.raises(ValueError, match="being steered"):
        concept_bench(lm, [concept], ["The", "old"], **SHORT)
