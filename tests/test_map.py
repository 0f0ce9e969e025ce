"""The map of features: its layout, what a polygon holds, and the page."""

import json
import math
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from saelab.app import scatter
from saelab.cli.main import main
from saelab.errors import SaelabError
from saelab.features import load_features
from saelab.features.layout import Layout, layout_path, make_layout, pca_layout, read_layout


@pytest.fixture
def store(hostile_run):
    return load_features(hostile_run)


def points_of(app):
    """What the canvas is given: its header, xy and shades."""
    (proto,) = [element.proto for element in app.get("bidi_component")]
    n = int.from_bytes(proto.bytes[:4], "little")
    head = json.loads(proto.bytes[4 : 4 + n])
    many = len(head["ids"])
    xy = np.frombuffer(proto.bytes[4 + n : 4 + n + 8 * many], "<f4").reshape(many, 2)
    return head, xy, np.frombuffer(proto.bytes[4 + n + 8 * many :], np.uint8)


def test_principal_components_place_what_fired_and_nothing_else(store, monkeypatch):
    n_fired = store.column("n_fired")
    n_fired[[3, 50]] = 0
    monkeypatch.setattr(store, "column", {"n_fired": n_fired}.__getitem__)
    layout, alive = pca_layout(store), n_fired > 0
    assert (np.isnan(layout.xy[:, 0]) == ~alive).all() and alive.sum() == store.d_sae - 2
    rows = store.directions()[alive].astype(np.float64)
    axes = np.linalg.svd(rows - rows.mean(0), full_matrices=False)[2][:2]
    wanted = (rows - rows.mean(0)) @ axes.T
    for ours, theirs in zip(layout.xy[alive].T, wanted.T, strict=True):
        assert abs(np.corrcoef(ours, theirs)[0, 1]) == pytest.approx(1, abs=1e-5)
    assert np.nanmax(np.abs(layout.xy)) == pytest.approx(1)
    assert (pca_layout(store).xy[alive] == layout.xy[alive]).all()


def test_a_polygon_holds_what_is_inside_and_the_nearest_come_first():
    draw = np.random.default_rng(0)
    xy = draw.uniform(-1, 1, (500, 2)).astype(np.float32)
    xy[7] = np.nan
    layout = Layout(xy, "pca")
    inside = layout.inside([(-0.5, -0.5), (0.5, -0.5), (0.5, 0.5), (0, 0), (-0.5, 0.5)])  # a square without a triangle
    x, y = xy.astype(np.float64).T
    square = (np.abs(x) < 0.5) & (np.abs(y) < 0.5)
    assert inside.tolist() == np.flatnonzero(square & ~(y > np.abs(x))).tolist() and len(inside) > 50
    nearest = layout.nearest(3, 10)
    distances = np.hypot(*(xy - xy[3]).T)
    assert nearest[0] == 3 and distances[nearest[-1]] == np.sort(distances)[9] and 7 not in nearest
    assert not len(layout.nearest(7)) and len(layout.nearest(3, 1000)) == 499
    for wrong in ([(0, 0), (1, 1)], [(0, 0)] * 65, [(0, 0), (1, 1), (math.nan, 0)]):
        with pytest.raises(ValueError, match="A polygon needs 3 to 64 corners"):
            layout.inside(wrong)


class StandIn:
    """In place of openTSNE where it is not installed: the first two columns."""

    TSNE = classmethod(lambda cls, **options: cls())

    def fit(self, rows):
        return rows[:, :2]


@pytest.mark.parametrize("installed", [False, True], ids=["stand-in", "openTSNE"])
def test_t_sne_is_kept_beside_the_store_and_repeats(hostile_run, tmp_path, monkeypatch, installed):
    if installed:
        pytest.importorskip("openTSNE", reason="the extra `map` is not installed")
    else:
        monkeypatch.setitem(sys.modules, "openTSNE", StandIn)
    run = Path(shutil.copytree(hostile_run, tmp_path / "run", ignore=shutil.ignore_patterns("cache")))
    before = {path.name: path.read_bytes() for path in (run / "features").iterdir()}
    assert main(["map", str(run)]) == 0
    store = load_features(run)
    made = read_layout(store)
    assert made.method == "tsne" and (np.isnan(made.xy[:, 0]) == ~(store.column("n_fired") > 0)).all()
    np.testing.assert_array_equal(make_layout(store, progress=False).xy, made.xy)
    after = {path.name: path.read_bytes() for path in (run / "features").iterdir()}
    assert after.keys() - before.keys() == {layout_path(store).name} and before.items() <= after.items()


def test_without_the_extra_the_command_says_how_to_get_it(hostile_run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "openTSNE", None)
    with pytest.raises(SaelabError, match=r"pip install 'saelab\[map\]'"):
        make_layout(load_features(hostile_run))
    assert main(["map", str(hostile_run)]) == 2 and "saelab[map]" in capsys.readouterr().err


@pytest.mark.parametrize("fault", ["bytes", "another SAE", "shape"])
def test_a_map_that_is_none_of_this_sae_is_left_alone(hostile_run, tmp_path, fault):
    from safetensors.numpy import save_file

    run = Path(shutil.copytree(hostile_run, tmp_path / "run", ignore=shutil.ignore_patterns("cache")))
    store = load_features(run)
    xy = np.full((store.d_sae, 2), 0.25, dtype=np.float32)
    sae = store.manifest["sae"]["hash"]
    said = {"layout": json.dumps({"sae": sae if fault != "another SAE" else "0" * 64, "method": "tsne"})}
    save_file({"xy": xy}, layout_path(store), said | {})
    if fault == "bytes":
        layout_path(store).write_bytes(b"no tensors")
    elif fault == "shape":
        save_file({"xy": xy[1:]}, layout_path(store), said)
    assert read_layout(store).method == "pca"
    save_file({"xy": xy}, layout_path(store), {"layout": json.dumps({"sae": sae, "method": "tsne"})})
    assert read_layout(store).method == "tsne" and np.nanmax(read_layout(store).xy) == 0.25


def test_the_page_shows_every_feature_that_fired(open_page, store):
    app = open_page("map", colour="p99")
    assert not app.exception and not app.error and not app.warning and app.title[0].value == "Map"
    head, xy, shade = points_of(app)
    alive = np.flatnonzero(store.column("n_fired") > 0)
    assert head["ids"] == alive.tolist() and len(xy) == len(shade) == len(alive)
    np.testing.assert_array_equal(xy, pca_layout(store).xy[alive])
    p99 = store.column("p99")[alive]
    assert shade[p99.argmax()] == 254 and shade[p99.argmin()] == 0
    assert "principal components" in " ".join(caption.value for caption in app.caption)
    assert "\u202e" not in "".join(head["labels"])


def test_a_lasso_in_the_address_chooses_and_makes_a_list(open_page, hostile_run, tmp_path):
    run = Path(shutil.copytree(hostile_run, tmp_path / "run", ignore=shutil.ignore_patterns("cache")))
    store = load_features(run)
    inside = pca_layout(store).inside([(-0.3, -0.4), (0.6, -0.4), (0.6, 0.5)]).tolist()
    app = open_page("map", run, lasso="-0.3,-0.4,0.6,-0.4,0.6,0.5")
    links = [link.proto.label for link in app.get("page_link")]
    assert links == [str(one) for one in inside[:25]] and inside
    assert points_of(app)[0]["lasso"] == [[-0.3, -0.4], [0.6, -0.4], [0.6, 0.5]]
    app.text_input[0].set_value("corner").run()
    app.button[0].click().run()
    assert not app.exception and load_features(run).lists == {"corner": inside}
    shade = points_of(open_page("map", run, list="corner"))[2]
    assert (shade == scatter.LISTED).sum() == len(inside)


def test_the_keyboard_chooses_what_is_around_a_feature(open_page, store):
    index = store.table("n_fired", limit=1)[0]["feature"]
    app = open_page("map", lasso="0,0,1,0,1,1")
    app.number_input[0].set_value(index).run()
    assert "lasso" not in app.query_params and not app.exception
    links = [link.proto.label for link in app.get("page_link")]
    assert links == [str(one) for one in pca_layout(store).nearest(index)[:25]] and links[0] == str(index)


@pytest.mark.parametrize(
    "lasso", ["1,2,3", "0,0,1,1", "a,b,c,d,e,f", "0,0,1,0,1," * 40, "nan,0,0,0,1,1", "1e9,0,0,0,1,1"]
)
def test_a_polygon_that_is_none_shows_a_notice(open_page, lasso):
    app = open_page("map", lasso=lasso, near=-3, colour="red")
    assert not app.exception and not app.error and len(app.warning) == 3
    assert any(re.search("lasso", warning.value) for warning in app.warning)


def test_shades_go_from_the_first_to_the_last_percentile():
    values = np.concatenate([np.arange(101.0), [np.nan, np.inf]])
    shade = scatter.shades(values)
    assert shade[0] == shade[1] == 0 and shade[99] == shade[100] == 254 and abs(int(shade[50]) - 127) <= 1
    assert (shade[101], shade[102]) == (0, 254) and not scatter.shades(np.full(3, np.nan)).any()
