"""Features as one HTML file: it stands on its own, nothing in it can run, and it stays under 300 kB."""

import re

import pytest
from test_render import ALLOWED_ATTRIBUTES, ALLOWED_TAGS, Page

from saelab.features import html_file
from saelab.features.html_file import features_html
from saelab.features.store import load_features

TAGS = ALLOWED_TAGS | {
    "html",
    "head",
    "meta",
    "title",
    "style",
    "body",
    "h1",
    "h3",
    "h4",
    "nav",
    "a",
    "section",
    "p",
    "footer",
}
TAGS |= {"dl", "dt", "dd", "svg", "rect"}
ATTRIBUTES = ALLOWED_ATTRIBUTES | {"lang", "charset", "http-equiv", "content", "name", "id", "href"}
ATTRIBUTES |= {"viewbox", "width", "height", "x", "y"}


@pytest.fixture
def store(hostile_run):
    return load_features(hostile_run)


def check(text):
    page = Page(text)
    assert page.tags <= TAGS and page.attributes <= ATTRIBUTES
    assert set(re.findall(r'href="(.)', text)) <= {"#"} and not re.search(r"url\(|@import", text)
    assert "default-src 'none'" in text and "prefers-color-scheme:dark" in text
    assert len(text.encode()) <= 300_000


def test_a_feature_is_one_harmless_file(store, tmp_path):
    feature = store.feature(store.table("n_fired", limit=1)[0]["feature"])
    path = feature.to_html(tmp_path / "feature.html")
    text = path.read_text(encoding="utf-8")
    check(text)
    assert text.count('class="sl-row"') == len(feature.examples()) and f"<h3>Feature {feature.feature}</h3>" in text
    assert feature._repr_html_().partition("</style>")[2].partition("<h4>")[0] in text  # the notebook's card


def test_a_list_keeps_its_order_and_its_size(store, tmp_path, monkeypatch):
    chosen = [7, 3, 50]
    text = store.to_html(tmp_path / "list.html", chosen, "a <b>list</b>").read_text(encoding="utf-8")
    check(text)
    assert [int(index) for index in re.findall(r'<section id="feature-(\d+)"', text)] == chosen
    assert "a &lt;b&gt;list" in text and text.count('href="#feature-') == 3
    features = [store.feature(index) for index in range(store.d_sae)]
    many = features_html(features[:50])
    check(many)
    assert many.count("<section") == 50 and "did not fit" not in many
    monkeypatch.setattr(html_file, "MAX_BYTES", 60_000)
    short = features_html(features)
    assert len(short.encode()) <= 60_000 and 5 < short.count("<section") < store.d_sae
    assert f"other {store.d_sae - short.count('<section')} features did not fit" in short
    with pytest.raises(ValueError, match="empty"):
        store.to_html(tmp_path / "none.html", [])
    with pytest.raises(ValueError, match="96"):
        store.to_html(tmp_path / "none.html", [96])
    assert not (tmp_path / "none.html").exists()


def test_the_pages_offer_the_file(open_page, hostile_run, tmp_path):
    import shutil

    run = shutil.copytree(hostile_run, tmp_path / "run", ignore=shutil.ignore_patterns("cache"))
    annotations = load_features(run).annotations
    for index in (3, 8):
        annotations.add(index, "list", True, "my/../list")
    (button,) = open_page("feature", run, feature=3).get("download_button")
    assert button.proto.label == "Save as HTML"
    app = open_page("features", run, list="my/../list")
    assert len(app.get("download_button")) == 1 and not app.exception
    assert not open_page("features", run).get("download_button")
