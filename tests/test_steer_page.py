"""The Steer page: its state in the address, texts that are marked once they are stale, and the limits on a request."""

import json
import re

import pytest
from pages import html_of

from saelab.app import state, steer_edits, steered_text
from saelab.app.steer_edits import KINDS, PageEdit
from saelab.features.store import load_features
from saelab.steering import Plan, compare

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


REQUEST = {
    "prompt": "a", "max_new_tokens": 5, "temperature": 0.0, "seed": 0, "plan": "", "on": "both", "strengths": (), "n_seeds": 1,
    "control": False, "chat": False, "turns": (),
}  # fmt: skip


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
        ({"n_seeds": 9}, "At most 8 seeds"),
        ({"strengths": tuple(range(1, 10))}, "8 strengths"),
        ({"strengths": (1, 2, 3, 4), "n_seeds": 8, "max_new_tokens": 512}, "20,480 new tokens"),
        ({"more": 16}, "17 edits"),
    ],
)
def test_limits_hold_behind_the_widgets(hostile_run, index, change, message):
    store = load_features(hostile_run)
    edits = tuple(PageEdit(index, "add", change.get("strength", 1.0)) for _ in range(1 + change.get("more", 0)))
    steered_text.check_request(store, REQUEST | {"edits": (PageEdit(index, "add", 1.0),)})
    with pytest.raises(ValueError, match=message):
        steered_text.check_request(store, REQUEST | change | {"edits": edits})


def labelled(elements, label):
    return next(one for one in elements if one.label.startswith(label))


def test_several_edits_are_rows_that_the_address_holds(open_page, hostile_run, lm, index):  # noqa: F811
    store = load_features(hostile_run)
    app = open_page("steer", feature=index, strength=8, tokens=5)
    labelled(app.button, "Add a feature").click().run()
    assert app.query_params["edits"] == ["0:add:1"] or app.query_params["edits"] == "0:add:1"
    box(app, "Feature of edit 2").set_value(index).run()
    labelled(app.selectbox, "Edit 2").set_value("cap").run()
    box(app, "Strength of edit 2").set_value(-0.5).run()
    app = open_page("steer", feature=index, strength=8, tokens=5, edits=f"{index}:cap:-0.5", on="generated")
    assert box(app, "Strength of edit 2").value == -0.5 and not app.warning
    app.button[0].click().run()
    assert not app.exception and not app.error
    feature = store.feature(index)
    with lm.steer(feature * 8.0, feature.cap(max=-0.5), on="generated"):
        assert app.session_state["steered"]["steered"] == lm.generate("The weather today", 5)
    labelled(app.button, "Remove").click().run()
    assert "edits" not in app.query_params and any(
        "made with other settings (2 edits" in one.value for one in app.warning
    )


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_edit_is_the_one_of_its_python(hostile_run, index, kind):
    store = load_features(hostile_run)
    edit = PageEdit(index, kind, 1.5)
    written = eval(edit.code, {"store": store})  # noqa: S307
    assert Plan([edit.build(store)]).to_json() == Plan([written]).to_json()
    assert steer_edits.parse(steer_edits.told([edit]), store.d_sae) == (edit,)


@pytest.mark.parametrize(
    "query",
    [
        {"edits": "1:add"}, {"edits": "96:add:1"}, {"edits": "1:eval:1"}, {"edits": "1:add:1e400"}, {"edits": "1:add:nan"},
        {"edits": ",".join(["1:add:1"] * 16)}, {"edits": "<script>alert(1)</script>"}, {"strengths": "1,1"},
        {"strengths": "1,x"}, {"strengths": "1,2,3,4,5,6,7,8,9"}, {"seeds": "9"}, {"on": "never"}, {"do": "__init__"},
        {"control": "yes"}, {"chat": "1"},
    ],
    ids=str,
)  # fmt: skip
def test_what_the_address_may_not_hold(open_page, query):  # noqa: F811
    app = open_page("steer", **query)
    assert not app.exception and not app.error and "The URL has" in app.warning[0].value
    assert next(iter(query)) not in app.query_params


def test_strengths_seeds_and_a_control_are_one_table(open_page, hostile_run, lm, index):  # noqa: F811
    query = {"strengths": "1,8", "seeds": 2, "control": True, "temperature": 0.7, "seed": 3, "tokens": 5}
    app = open_page("steer", feature=index, strength=1, **query)
    app.button[0].click().run()
    assert not app.exception and not app.error
    feature, options = load_features(hostile_run).feature(index), {"max_new_tokens": 5, "temperature": 0.7}
    expected = compare(
        lm, "The weather today", feature, strengths=[1, 8], seeds=[3, 4], control=True, progress=False, **options
    )
    assert app.session_state["steered"]["rows"] == expected.rows
    assert html_of(app).count('class="sc-row"') == len(expected.texts) == 10


@pytest.mark.parametrize("written", ["1,8", "1 8", " 1 ,  8 "])
def test_strengths_are_divided_by_commas_or_spaces_and_plotted(open_page, lm, index, written):  # noqa: F811
    app = open_page("steer", feature=index, strengths=written, control=True, tokens=5)
    app.button[0].click().run()
    assert not app.exception
    (chart,) = app.get("plotly_chart")
    figure = json.loads(chart.proto.spec)
    names = {trace["name"]: trace["text"] for trace in figure["data"]}
    assert names == {name: ["\u00d7 1", "\u00d7 8"] for name in ("steered", "random direction")}
    alone = open_page("steer", feature=index, strengths="2", tokens=3)
    alone.button[0].click().run()
    assert not alone.get("plotly_chart")


def test_read_back_and_cost_stand_beside_the_text(open_page, lm, index):  # noqa: F811
    app = open_page("steer", feature=index, strength=8)
    app.button[0].click().run()
    base, steered = app.session_state["steered"]["rows"]
    said = [caption.value for caption in app.caption]
    assert f"Read back on {base['read_back']:.0%} of the tokens." in said
    cost = steered_text.signed(steered["nll_cost"])
    assert f"Read back on {steered['read_back']:.0%} of the tokens. Cost {cost} nats per token." in said


def test_a_plan_file_takes_the_place_of_the_edits_and_comes_back(open_page, hostile_run, lm, index):  # noqa: F811
    store = load_features(hostile_run)
    plan = Plan([store.feature(index) * 8.0], gate=store.feature(index).above(0.0), window=(-2, None), cap=2.0)
    app = open_page("steer", tokens=5)
    for text, message in (("{}", "no plan of version 1"), ("x" * 1_000_001, "1,000,001 bytes"), ("\udcff", "UTF-8")):
        app.file_uploader[0].upload("plan.json", text.encode("utf-8", "surrogatepass"), "application/json").run()
        assert message in app.error[0].value.replace("\\", ""), app.error[0].value
    app.file_uploader[0].upload("plan.json", plan.to_json().encode(), "application/json").run()
    assert "Steering with a plan file" in app.info[0].value and not app.error
    app.button[0].click().run()
    with lm.steer(plan):
        assert app.session_state["steered"]["steered"] == lm.generate("The weather today", 5)
    labelled(app.button, "Remove the plan").click().run()
    assert not app.info and labelled(app.button, "Add a feature")


def test_a_chat_goes_on_from_any_answer(open_page, lm, index):  # noqa: F811
    app = open_page("steer", feature=index, strength=8, chat=True, tokens=4, prompt="Hello")
    app.button[0].click().run()
    (rows, request) = (app.session_state["steered"][name] for name in ("rows", "request"))
    assert request["turns"] == () and lm.generate(lm.chat("Hello"), 4) == lm.chat("Hello") + rows[0]["text"]
    labelled(app.selectbox, "Go on from the answer").set_value(1).run()
    labelled(app.button, "Go on").click().run()
    box(app, "Prompt").set_value("And then?").run()
    app.button[0].click().run()
    said = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": rows[1]["text"]}]
    prompt = lm.chat([*said, {"role": "user", "content": "And then?"}])
    assert lm.generate(prompt, 4) == prompt + app.session_state["steered"]["rows"][0]["text"]
    labelled(app.button, "Start the chat again").click().run()
    assert "steer_turns" not in app.session_state


def test_texts_that_were_stopped_stay(open_page, lm, index, monkeypatch):  # noqa: F811
    from streamlit.runtime.scriptrunner_utils.exceptions import StopException

    real = steered_text._drawing

    def stopping(*given):
        draw = real(*given)

        def stop(n, texts):
            draw(n, texts)
            if n == 3:
                raise StopException

        return stop

    monkeypatch.setattr(steered_text, "_drawing", stopping)
    app = open_page("steer", feature=index, strength=8, tokens=9)
    app.button[0].click().run()
    monkeypatch.setattr(steered_text, "_drawing", real)
    app.run()
    assert any(re.fullmatch(r"Stopped after [1-3] of 9 new tokens\.", one.value) for one in app.caption)
    assert "steered" not in app.session_state and html_of(app).count('class="sc-row"') == 2
    app.button[0].click().run()
    assert len(outputs(app)) == 2 and not any("Stopped" in one.value for one in app.caption)
