"""Copy as Python: the lines of every page run as they are, and compute what it shows."""

import pytest

from saelab.app.asgi import PAGES
from saelab.features.store import load_features
from saelab.steering import Plan, compare


def lines_of(app):
    (code,) = app.sidebar.code
    return code.value


def run(app):
    """The names that the lines of a page define."""
    names = {}
    exec(compile(lines_of(app), "page", "exec"), names)  # noqa: S102
    return names


def links(app):
    return [link.proto.label for link in app.get("page_link") if link.proto.label.isdigit()]


@pytest.mark.parametrize("page", [page for page in PAGES if page not in ("prompt", "steer")])
def test_the_lines_of_every_page_run(open_page, page, capsys):
    app = open_page(page)
    assert not app.exception and not app.error
    assert run(app) and (page in ("runs", "jobs") or "load_features" in lines_of(app))


@pytest.mark.parametrize(
    "query",
    [
        {"sort": "p99", "order": "up", "show": "common"},
        {"show": "all", "page": 2},
        {"q": "weather"},
        {"q": '" the"'},
    ],
)
def test_the_lines_of_the_table_compute_its_rows(open_page, query):
    app = open_page("features", **query)
    assert links(app) == [str(row["feature"]) for row in run(app)["rows"]] and links(app)


def test_the_lines_of_a_feature_are_of_its_view(open_page, hostile_run):
    found = run(open_page("feature", feature=7, kind="uniform", by="encoder"))
    feature = load_features(hostile_run).feature(7)
    assert found["examples"] == feature.examples(kind="uniform")
    assert found["neighbours"] == feature.neighbours(by="encoder", k=8)


@pytest.mark.usefixtures("models_load_in_fp32")
def test_the_lines_of_steering_and_of_a_prompt_hold_any_text(open_page, hostile_run, tiny_lm, capsys):
    text, store = "It's a \"mill\"\\n'''\n''' {x}", load_features(hostile_run)
    index = store.table("density", limit=1)[0]["feature"]
    run(open_page("steer", feature=index, prompt=text, tokens=5, strength=8))
    with tiny_lm.steer(store.feature(index) * 8.0):
        steered = tiny_lm.generate(text, max_new_tokens=5)
    assert capsys.readouterr().out == f"{tiny_lm.generate(text, max_new_tokens=5)}\n{steered}\n"
    query = {
        "edits": f"{index}:cap:0.5",
        "on": "generated",
        "strengths": "1,4",
        "seeds": 2,
        "chat": True,
        "temperature": 0.9,
    }
    found = run(open_page("steer", feature=index, prompt=text, tokens=5, **query))
    plan = Plan([store.feature(index) * 2.0, store.feature(index).cap(max=0.5)], on="generated")
    assert found["plan"].to_json() == plan.to_json() and found["prompt"] == tiny_lm.chat(text)
    options = {"strengths": [1, 4], "seeds": [0, 1], "max_new_tokens": 5, "temperature": 0.9, "progress": False}
    assert capsys.readouterr().out == f"{compare(tiny_lm, found['prompt'], plan, **options)}\n"
    found = run(open_page("prompt", feature=index, text=text, by="value"))
    assert len(found["top"]) == len(found["values"]) == tiny_lm.to_ids(text).shape[1]
