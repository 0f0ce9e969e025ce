"""The dashboard's pages through Streamlit's AppTest, its charts and server settings; see test_browser.py too."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pages import html_of

import saelab.app
from saelab.activation_cache import layout
from saelab.app import charts, markdown, serve, url
from saelab.app.dead_reasons import REMEDIES
from saelab.errors import SaelabError
from saelab.features.store import load_features
from saelab.features.visible import escape

MAIN = str(Path(serve.__file__).with_name("main.py"))
PAGES = ("runs", "features", "feature", "dead", "prompt", "steer", "map", "compare", "jobs")


def text_of(app):
    return " ".join(str(element.value) for element in [*app.title, *app.subheader, *app.caption, *app.markdown])


@pytest.mark.parametrize("page", PAGES)
def test_every_page_opens(open_page, page):
    app = open_page(page)
    titles = {
        "runs": "Runs",
        "features": "Features",
        "feature": "Feature ",
        "dead": "Dead features",
        "prompt": "Prompt",
    }
    titles |= {"steer": "Steer", "map": "Map", "compare": "Compare", "jobs": "Jobs"}
    assert not app.exception and not app.error
    assert app.title[0].value.startswith(titles[page])


def test_runs_shows_the_report_and_the_curves(open_page, hostile_run):
    app = open_page()
    report = json.loads((hostile_run / "report.json").read_text())
    shown = {metric.label: metric.value for metric in app.metric}
    assert float(shown["FVU"]) == pytest.approx(report["fvu"], rel=1e-2)
    assert {"FVU", "FVU unmasked", "L0", "Dead", "CE recovered", "KL"} <= set(shown)
    (chart,) = app.get("vega_lite_chart")
    assert json.loads(chart.proto.spec)["layer"] and "FVU over training tokens" in chart.proto.alt
    assert "blocks.1.hook_resid_post" in html_of(app)
    assert f"The report scored {report['n_tokens']:,} tokens" in text_of(app)
    assert "features counted on" in text_of(app)


def test_features_are_sorted_filtered_and_linked(open_page, hostile_run):
    store = load_features(hostile_run)
    app = open_page("features", sort="p99", order="up", show="all")
    links = [link.proto.label for link in app.get("page_link")]
    assert links == [str(row["feature"]) for row in store.table("p99", descending=False, limit=25)]
    app = open_page("features", show="all", page=2)
    links = [link.proto for link in app.get("page_link")]
    assert [link.label for link in links] == [
        str(row["feature"]) for row in store.table("sharpness", limit=25, offset=25)
    ]
    assert all(link.query_string == f"feature={link.label}&show=all" for link in links)
    (numbers,) = (element.proto for element in app.get("pagination"))
    assert (numbers.num_pages, numbers.default) == (-(-len(store) // 25), 2)
    assert not open_page("features", show="all", q="xyzzy").get("pagination")


def test_a_widget_writes_the_url(open_page):
    app = open_page("features", page=2, show="all")
    app.get("button_group")[0].set_value("max").run()
    assert app.query_params["sort"] == "max"
    assert "page" not in app.query_params
    assert not app.exception


def test_feature_shows_its_examples(open_page, hostile_run):
    store = load_features(hostile_run)
    index = store.table("density", limit=1)[0]["feature"]
    app = open_page("feature", feature=index)
    assert app.title[0].value == f"Feature {index}"
    assert html_of(app).count('class="sl-row"') == len(store.feature(index).examples())
    assert "<script" not in html_of(app) and "<img" not in html_of(app)
    assert escape(store.feature(index).label or "") in html_of(app)
    app.number_input[0].set_value(3).run()
    assert app.query_params["feature"] == ["3"] or app.query_params["feature"] == "3"
    assert app.title[0].value == "Feature 3"


def test_next_and_previous_follow_the_table(open_page, hostile_run):
    store = load_features(hostile_run)
    order = store.features("p99", False, {"n_fired": (1, None)})
    app = open_page("feature", feature=order[4], sort="p99", order="up")
    buttons = {button.label: button for button in app.button}
    buttons["Next"].click().run()
    assert app.title[0].value == f"Feature {order[5]}"
    {button.label: button for button in app.button}["Previous"].click().run()
    {button.label: button for button in app.button}["Previous"].click().run()
    assert app.title[0].value == f"Feature {order[3]}" and not app.exception
    app = open_page("feature", feature=order[0], sort="p99", order="up")
    assert {button.label: button.disabled for button in app.button}["Previous"]
    found = [row["feature"] for row in store.search("the")]
    app = open_page("feature", feature=found[0], q="the")
    {button.label: button for button in app.button}["Next"].click().run()
    assert app.title[0].value == f"Feature {found[1]}"


def test_a_search_finds_words_and_tokens(open_page, hostile_run):
    store = load_features(hostile_run)
    app = open_page("features", q="weather")
    links = [link.proto.label for link in app.get("page_link")]
    assert links == [str(row["feature"]) for row in store.search("weather", 25)] and links
    assert "best match first" in html_of(app)
    (piece,) = store.pieces([store.table("n_fired", limit=1)[0]["peak_token"]])
    app = open_page("features", q=f'"{piece.decode()}"')
    assert [link.proto.label for link in app.get("page_link")] == [
        str(row["feature"]) for row in store.firing_on(piece.decode(), 25)
    ]
    app = open_page("features", q="xyzzy <script>alert(1)</script>")
    assert not app.exception and "Search for other words" in app.info[0].value
    app = open_page("features")
    app.text_input[0].set_value("weather").run()
    assert app.query_params["q"] in ("weather", ["weather"])


@pytest.mark.parametrize("kind", ["quantile", "uniform", "near_miss"])
def test_examples_of_every_kind_are_shown(open_page, hostile_run, kind):
    store = load_features(hostile_run)
    index = store.table("n_fired", limit=1)[0]["feature"]
    app = open_page("feature", feature=index, kind=kind)
    assert not app.exception and not app.error
    assert html_of(app).count('class="sl-row"') == len(store.feature(index).examples(20, kind=kind))


def test_labels_stars_lists_and_notes_are_kept(open_page, hostile_run, tmp_path):
    run = Path(shutil.copytree(hostile_run, tmp_path / "run"))
    app = open_page("feature", run, feature=7)
    texts = {one.label: one for one in app.text_input}
    texts["Label"].set_value("about <b>storms</b>").run()
    app.text_area[0].set_value("a note").run()
    app.toggle[0].set_value(True).run()
    app.multiselect[0].set_value(["starred", "weather"]).run() if "weather" in app.multiselect[0].options else None
    store = load_features(run)
    assert store.feature(7).label == "about <b>storms</b>" and store.lists["starred"] == [7]
    assert [entry.value for entry in store.annotations.latest("note")] == ["a note"]
    assert "about &lt;b&gt;storms" in html_of(open_page("feature", run, feature=7))
    app = open_page("features", run, list="starred", show="all")
    assert [link.proto.label for link in app.get("page_link")] == ["7"]
    texts = {one.label: one for one in open_page("feature", run, feature=7).text_input}
    texts["Label"].set_value("").run()
    assert load_features(run).feature(7).label == load_features(run).feature(7).row["label"]


def test_features_that_were_tried_are_sorted_filtered_and_shown_first(open_page, hostile_run, tmp_path):
    run = Path(shutil.copytree(hostile_run, tmp_path / "run"))
    store = load_features(run)
    fired = store.features("density", True, {"n_fired": (1, None)})[:4]
    scores = dict(zip(fired, (0.05, 0.4, -0.01, 0.2), strict=True))
    for feature, score in scores.items():
        told = {"score": score, "strength": 1.5, "read_back": 0.5, "nll_cost": 0.25, "fluency": 0.8}
        store.annotations.add(feature, "steer", told)
    assert "sa-grid sa-tried" not in html_of(open_page("features"))
    app = open_page("features", run, sort="steer_score")
    links = [link.proto.label for link in app.get("page_link")]
    assert links[:4] == [str(feature) for feature in sorted(scores, key=lambda one: -scores[one])]
    assert "Steers \u2193" in html_of(app) and ">0.40<" in html_of(app)
    app = open_page("features", run, sort="steer_score", show="steers")
    assert [link.proto.label for link in app.get("page_link")] == [str(fired[1]), str(fired[3])]
    store.annotations.add(fired[0], "steer", {"score": 0.9, "strength": 1.0, "read_back": 0.9, "nll_cost": 0.0})
    app = open_page("features", run, sort="steer_score", show="steers")
    assert app.get("page_link")[0].proto.label == str(fired[0])  # what another process found since is not missed
    app = open_page("feature", run)
    assert app.title[0].value == f"Feature {fired[0]}"
    assert "Steering score 0.90: at 1 p99 it reads back on +90 % of the text" in text_of(app)
    assert "Steering score" not in text_of(open_page("feature", run, feature=store.features("density")[-1]))


def test_neighbours_and_coactivation_stand_beside(open_page, hostile_run):
    store = load_features(hostile_run)
    index = store.table("n_fired", limit=1)[0]["feature"]
    shown = html_of(open_page("feature", feature=index, by="encoder"))
    assert shown.count('<table class="sa-table"') == 2
    for other in (*store.neighbours(index, by="encoder", k=8), *store.coactivation(index, 8)):
        assert f">{other['feature']}</a>" in shown


def test_the_prompt_page_reads_a_text(open_page, hostile_run):
    store = load_features(hostile_run)
    index = store.table("n_fired", limit=1)[0]["feature"]
    app = open_page("prompt", feature=index, text="The <b>weather</b> today")
    assert not app.exception and app.text_area[0].value == "The <b>weather</b> today"
    app.button[0].click().run()
    assert not app.exception and not app.error
    assert "&lt;" in html_of(app) and "<b>" not in html_of(app)
    assert html_of(app).count('class="sl-row"') == 1 and html_of(app).count("<dt>") >= 4
    for text, said in (("  ", "The text is empty"), ("word " * 1500, "tokens exceed the context")):
        app = open_page("prompt")
        app.text_area[0].set_value(text)
        app.button[0].click().run()
        assert not app.exception and said in app.error[0].value.replace("\\", "")


def test_the_sidebar_says_when_a_store_was_verified(open_page, hostile_run, tmp_path):
    run = Path(shutil.copytree(hostile_run, tmp_path / "run", ignore=shutil.ignore_patterns("cache")))
    assert "not verified yet" in text_of(open_page("features", run))
    annotations = load_features(run).annotations
    annotations.add(-1, "verified", {"n_examples": 3})
    assert f"verified on {annotations.latest('verified')[0].time[:10]}" in text_of(open_page("features", run))


def test_dead_features_have_a_diagnosis(tmp_path, open_page, hostile_run):
    app = open_page("dead", _copy_with_dead_feature(hostile_run, tmp_path))
    assert not app.exception and not app.error
    shown = html_of(app)
    reason = next(reason for reason in REMEDIES if f" {reason}. " in shown)
    assert 'href="feature?feature=5"' in shown and REMEDIES[reason].split(" (")[0] in shown
    app = open_page("feature", tmp_path / "run", feature=5)
    assert any(text.value.startswith("Likeliest reason") for text in app.caption)


def test_a_feature_that_never_fired_has_an_empty_state(tmp_path, open_page, hostile_run):
    run = _copy_with_dead_feature(hostile_run, tmp_path)
    app = open_page("feature", run, feature=5)
    assert not app.exception and "so it has no examples" in app.info[0].value
    app = open_page("dead", run)
    assert {metric.label: metric.value for metric in app.metric}["Never fired"] != "0"
    assert "never fired" in html_of(app)
    assert "5" in [link.proto.label for link in app.get("page_link")]
    app = open_page("steer", run, feature=5)
    app.button[0].click().run()
    assert "never fired" in app.error[0].value


def _copy_with_dead_feature(run, folder):
    import sqlite3

    copy = Path(shutil.copytree(run, folder / "run", ignore=shutil.ignore_patterns("cache")))
    database = sqlite3.connect(copy / "features" / "store.sqlite")
    empty = ", ".join(f'"{name}" = NULL' for name in ("mean", "std", "p99", "max", "peak_token"))
    database.execute(f"UPDATE feature SET n_fired = 0, density = 0, {empty} WHERE feature = 5")
    database.execute("DELETE FROM blob WHERE feature = 5 AND kind != 'logits'")
    database.commit()
    database.close()
    manifest = json.loads((copy / "features" / "manifest.json").read_text())
    manifest["files"]["store.sqlite"] = layout.describe_file(copy / "features" / "store.sqlite")
    (copy / "features" / "manifest.json").write_text(json.dumps(manifest))
    return copy


@pytest.mark.parametrize(
    "page, query",
    [
        ("feature", {"feature": "abc"}),
        ("feature", {"feature": "-1"}),
        ("feature", {"feature": "9" * 5000}),
        ("feature", {"feature": "<script>alert(1)</script>"}),
        ("features", {"sort": "density; DROP TABLE feature"}),
        ("features", {"page": "999"}),
        ("features", {"show": "../../etc/passwd"}),
        ("features", {"sae": "../../etc"}),
        ("steer", {"strength": "nan"}),
        ("steer", {"strength": "1e400"}),
        ("dead", {"fired": "7"}),
        ("runs", {"curve": "<script>alert(1)</script>"}),
    ],
)
def test_bad_urls_fall_back_with_a_notice(open_page, page, query):
    app = open_page(page, **query)
    assert not app.exception and not app.error
    assert "The URL has" in app.warning[0].value
    assert next(iter(query)) not in app.query_params


def test_unknown_parameters_get_one_notice_beside_the_others(open_page):
    app = open_page("features", density="foo", limit="<b>", sort="bad", show="all")
    unknown, known = (warning.value for warning in app.main.children[0].children.values())
    assert "does not know: 'density', 'limit'" in unknown.replace("\\", "") and "The URL has sort" in known
    assert set(app.query_params) == {"show"} and len(app.warning) == 2


def test_every_parameter_that_a_page_uses_is_known():
    used = set()
    for path in Path(saelab.app.__path__[0]).glob("*.py"):
        source = path.read_text(encoding="utf-8")
        used |= set(
            re.findall(
                r'(?:url\.(?:choice|integer|real|parsed|refused|bound)|integer|choice|query_params\.\w+)\(\s*"(\w+)"',
                source,
            )
        )
        used |= set(re.findall(r'query_params\["(\w+)"\]', source))
    assert len(used) > 12 and used <= url.PARAMETERS


def test_a_command_in_an_error_is_shown_as_one():
    shown = markdown.with_commands("run `saelab features runs/a_b` in <b>`x`</b> `saelab\n\n[l](javascript:x)`")
    assert shown.startswith("run `saelab features runs/a_b` in \\<b\\>\\`x\\`") and "\\[l\\]\\(" in shown


def test_missing_and_damaged_stores_are_explained(tmp_path, open_page, hostile_run):
    copy = shutil.copytree(hostile_run, tmp_path / "run", ignore=shutil.ignore_patterns("cache"))
    (copy / "features" / "store.sqlite").write_bytes(b"broken")
    assert "truncated" in open_page("features", copy).error[0].value
    app = open_page("runs", copy)  # needs no store
    assert not app.exception and not app.error and app.title[0].value == "Runs"
    shutil.rmtree(copy / "features")
    (copy / "report.json").unlink()
    (copy / "sae" / "metrics.jsonl").unlink()
    app = open_page("feature", copy)
    assert not app.error and app.title[0].value == "Feature" and "No features" in app.info[0].value
    assert app.code[0].value == f"saelab features {copy / 'sae'}"
    app = open_page("runs", copy)
    assert not app.exception and not app.error
    assert "saelab eval" in app.info[0].value and "No training curve" in text_of(app)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("report.json", "[1]"),
        ("sae/sae.json", "[1]"),
        ("sae/sae.json", '{"model": "x", "variant": 3}'),
        (
            "sae/metrics.jsonl",
            '[1]\n3\n{"tokens": 1, "fvu": null}\n{"tokens": null, "fvu": NaN}\n{"tokens": 2, "l0": 1}\n',
        ),
    ],
)
def test_runs_bears_altered_files(tmp_path, open_page, hostile_run, file, content):
    copy = shutil.copytree(hostile_run, tmp_path / "run", ignore=shutil.ignore_patterns("cache"))
    (copy / file).write_text(content)
    app = open_page("runs", copy)
    assert not app.exception and not app.error
    assert content != "[1]" or "holds a list, expected an object" in app.warning[0].value.replace("\\", "")


def test_several_saes_are_chosen_by_url(tmp_path, open_page, hostile_run):
    for name in ("a", "b"):
        shutil.copytree(hostile_run / "sae", tmp_path / f"sae-{name}")
        shutil.copytree(hostile_run / "features", tmp_path / f"features-{name}")
        shutil.copy(hostile_run / "report.json", tmp_path / f"report-{name}.json")
    app = open_page("features", tmp_path, sae="sae-b")
    assert not app.exception and app.selectbox[0].value == "sae-b"
    assert "sae=sae-b" in app.get("page_link")[0].proto.query_string
    app.selectbox[0].set_value("sae-a").run()
    assert app.query_params["sae"] == "sae-a"
    app = open_page("runs", tmp_path)
    assert html_of(app).count('<dl class="sa-run"') == 2 and len(app.metric) == 6
    assert app.multiselect[0].value == ["sae-a", "sae-b"] and len(app.get("vega_lite_chart")) == 2
    app.multiselect[0].set_value(["sae-b"]).run()
    assert app.query_params["curves"] in ("sae-b", ["sae-b"])
    app = open_page("runs", tmp_path, sort="fvu; DROP TABLE x", order="sideways", curves="sae-b,../a", sae="../b")
    assert (
        len(app.warning) == 4 and not app.exception and not set(app.query_params) & {"sort", "order", "curves", "sae"}
    )
    assert app.multiselect[0].value == ["sae-a", "sae-b"]


def test_browsing_loads_neither_torch_nor_a_model(hostile_run):
    code = (
        "import sys; from streamlit.testing.v1 import AppTest; from streamlit.util import calc_hash\n"
        f"app = AppTest.from_file({MAIN!r}, default_timeout=60)\n"
        "for page in ('', 'features', 'feature', 'dead', 'steer', 'jobs'):\n"
        "    app._page_hash = page and calc_hash(page); app.run(); assert not app.exception and not app.error, page\n"
        "print([name for name in ('torch', 'transformers', 'datasets') if name in sys.modules])"
    )
    environment = os.environ | {serve.RUN_VARIABLE: str(hostile_run)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_server_listens_on_loopback_with_secure_settings():
    arguments = serve.arguments(8765)
    for expected in (
        "--server.address=127.0.0.1",
        "--server.port=8765",
        "--server.headless=true",
        "--browser.gatherUsageStats=false",
        "--server.fileWatcherType=none",
        "--client.toolbarMode=minimal",
        "--server.enableCORS=true",
        "--server.enableXsrfProtection=true",
    ):
        assert expected in arguments
    assert [argument for argument in arguments if "allowedHosts" in argument] == [
        "--server.allowedHosts=localhost",
        "--server.allowedHosts=127.0.0.1",
    ]


def test_a_port_in_use_is_passed_over():
    with socket.socket() as taken:
        taken.bind((serve.ADDRESS, 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert serve.free_port(port) > port
    for bad in (0, 80, 70_000):
        with pytest.raises(ValueError, match=f"port={bad}"):
            serve.free_port(bad)


def test_serve_refuses_a_folder_without_sae(tmp_path):
    with pytest.raises(SaelabError, match="holds no SAE"):
        serve.serve(tmp_path)


def _traces(figure: Any) -> Any:
    return figure.data


def test_charts_are_figures_of_their_data():
    density = np.array([0.0, 0.0, 1e-3, 0.2])
    figure = charts.density_histogram(density, 10_000)
    assert sum(_traces(figure)[0].y) == 2 and list(_traces(figure)[1].y) == [2]
    assert _traces(figure)[1].marker.pattern.shape  # dead is not told by colour alone
    figure = charts.cosine_scatter(density, np.array([0.1, 0.2, 0.9, 1.0]), 10_000, at_most=10)
    assert list(_traces(figure)[0].customdata) == [3] and list(_traces(figure)[1].customdata) == [0, 1, 2]
    assert _traces(figure)[0].marker.symbol != _traces(figure)[1].marker.symbol
    charts.density_histogram(np.zeros(4), 100)  # nothing fired at all


def test_the_app_computes_nothing_heavy():
    source = "".join(path.read_text(encoding="utf-8") for path in Path(saelab.app.__path__[0]).glob("*.py"))
    assert (
        "import torch" not in source and "unsafe_allow_html" not in source and "unsafe_allow_javascript" not in source
    )
