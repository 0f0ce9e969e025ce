"""The Steer page: its state in the address, texts that are marked once they are stale, and the limits on a request."""

import pytest

from saelab.app import state, steered_text
from saelab.features.store import load_features

PROMPT = "<b onclick=alert(1)>The weather"


@pytest.fixture
def lm(tiny_lm, monkeypatch):
    monkeypatch.setattr(state, "load_model", lambda name: tiny_lm)
    return tiny_lm


@pytest.fixture
def index(hostile_run):
    return load_features(hostile_run).table("density", limit=1)[0]["feature"]


def outputs(app):
    return [element.proto.body for element in app.get("html") if 'sa-prompt"' in element.proto.body]


def box(app, label):
    return next(one for one in [*app.number_input, *app.text_area] if one.label.startswith(label))


def test_unsteered_and_steered_text(open_page, hostile_run, lm, index):
    app = open_page("steer", feature=index, strength=8)
    assert not app.info  # the form explains itself
    box(app, "Prompt").set_value(PROMPT)
    app.button[0].click().run()
    assert not app.exception and not app.error and not app.warning
    assert len(outputs(app)) == 2 and outputs(app)[0] != outputs(app)[1]
    assert all("&lt;b onclick=alert(1)&gt;The weather" in output for output in outputs(app))
    result = app.session_state["steered"]
    assert result["unsteered"] == lm.generate(PROMPT, max_new_tokens=40, temperature=0.0, seed=0)
    with lm.steer(load_features(hostile_run).feature(index) * 8.0):
        assert result["steered"] == lm.generate(PROMPT, max_new_tokens=40, temperature=0.0, seed=0)


def test_every_setting_is_in_the_address_and_comes_from_it(open_page, index):
    shown = {"Feature": index, "Strength": -1.5, "New tokens": 7, "Temperature": 0.5, "Seed": 3, "Prompt": "a & b\n?"}
    query = {"feature": index, "strength": -1.5, "tokens": 7, "temperature": 0.5, "seed": 3, "prompt": "a & b\n?"}
    app = open_page("steer", **query)
    assert {label: box(app, label).value for label in shown} == shown and not app.warning
    app = open_page("steer")
    for label, value in shown.items():
        box(app, label).set_value(value).run()
    assert {name: app.query_params[name] for name in query} == {name: str(value) for name, value in query.items()}
    assert not app.exception and not outputs(app)  # a box applies its value, only the button generates


def test_a_long_prompt_stays_out_of_the_address(open_page):
    app = open_page("steer", prompt="short")
    box(app, "Prompt").set_value("long " * 101).run()
    assert "prompt" not in app.query_params and box(app, "Prompt").value == "long " * 101
    assert any("not kept in the address" in caption.value for caption in app.caption)
    box(app, "Prompt").set_value("short again").run()
    assert app.query_params["prompt"] == "short again" and box(app, "Prompt").value == "short again"
    app = open_page("steer", prompt="x" * 100_000)
    assert "at most 500 characters" in app.warning[0].value and box(app, "Prompt").value == "The weather today"


def test_texts_of_other_settings_are_marked_and_an_error_removes_them(open_page, lm, index):
    app = open_page("steer", feature=index, strength=8, tokens=4)
    app.button[0].click().run()
    assert outputs(app) and not app.warning
    box(app, "Strength").set_value(-2.0).run()
    assert len(outputs(app)) == 2 and "other settings (strength 8)" in app.warning[0].value
    assert any("at 8 \u00d7 p99" in one.value for one in app.markdown)
    box(app, "Strength").set_value(8.0).run()
    assert not app.warning
    box(app, "Prompt").set_value(" ").run()
    assert "another prompt" in app.warning[0].value
    app.button[0].click().run()
    assert "The prompt is empty" in app.error[0].value and not outputs(app)


def test_the_unsteered_text_is_kept_while_only_the_steering_changes(open_page, lm, index, monkeypatch):
    prompts, generate = [], type(lm).generate
    monkeypatch.setattr(
        type(lm),
        "generate",
        lambda self, prompt, **options: prompts.append(prompt) or generate(self, prompt, **options),
    )
    app = open_page("steer", feature=index, tokens=3)
    app.button[0].click().run()
    box(app, "Strength").set_value(-2.0).run()
    app.button[0].click().run()
    assert len(prompts) == 3 and not app.exception
    box(app, "Seed").set_value(5).run()
    app.button[0].click().run()
    assert len(prompts) == 5


@pytest.mark.parametrize(
    "change, message",
    [
        ({"prompt": "  "}, "empty"),
        ({"prompt": "a" * 8001}, "8,001"),
        ({"max_new_tokens": 513}, "512"),
        ({"max_new_tokens": 0}, "512"),
        ({"strength": float("nan")}, "strength=nan"),
        ({"strength": float("inf")}, "strength=inf"),
        ({"temperature": -1.0}, "temperature"),
    ],
)
def test_limits_hold_behind_the_widgets(hostile_run, change, message):
    store = load_features(hostile_run)
    feature = store.feature(store.table("density", limit=1)[0]["feature"])
    request = {"prompt": "a", "strength": 1.0, "max_new_tokens": 5, "temperature": 0.0, "seed": 0}
    steered_text.check_request(feature, request)
    with pytest.raises(ValueError, match=message):
        steered_text.check_request(feature, request | change)
