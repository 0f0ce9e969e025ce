"""The Runs page in a real Chromium: the table sorts and fits every width, curves show values on hover and go on by themselves."""

import json
import shutil
from pathlib import Path

import pytest
from browser import heading

from saelab.files import locked

CUT = """[...document.querySelectorAll('[data-testid=stMain] *')].filter(one => one.innerText && one.clientWidth > 1
    && one.scrollWidth > one.clientWidth + 1 && getComputedStyle(one).overflowX != 'visible').map(one => one.innerText)"""


@pytest.fixture(scope="module")
def hostile_run(hostile_run, tmp_path_factory):
    """Three SAEs: two that are trained and scored on different numbers of tokens, and one whose training goes on."""
    folder = tmp_path_factory.mktemp("runs") / "three"
    folder.mkdir()
    report = json.loads((hostile_run / "report.json").read_text())
    for name, change in (("a", {}), ("b", {"fvu": report["fvu"] / 2, "l0": 9.0, "n_tokens": 1000})):
        shutil.copytree(hostile_run / "sae", folder / f"sae-{name}")
        (folder / f"report-{name}.json").write_text(json.dumps(report | change))
    live = Path(shutil.copytree(hostile_run / "sae", folder / "sae-live"))
    (live / "sae.json").unlink()
    return folder


def metrics(folder, n):
    line = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps(line | {"step": i, "tokens": 256 * i, "fvu": 1 / (i + 1)}) + "\n" for i in range(n))
    )


ORDER = """names => JSON.stringify(names) == JSON.stringify([...document.querySelectorAll("[class*='st-key-sa-run-'] .sa-run")]
    .map(row => row.closest("[class*='st-key-sa-run-']").querySelector("button p")?.innerText))"""


def test_the_table_sorts_and_fits_every_screen(page):
    page.goto("/")
    heading(page, "Runs")
    page.locator("[data-testid=stVegaLiteChart]").nth(1).wait_for()
    page.wait_for_function(ORDER, arg=["sae-a", "sae-b", "sae-live"])
    page.get_by_text("scored on different numbers of tokens").wait_for()
    page.get_by_role("button", name="FVU", exact=True).click()
    page.wait_for_url("**sort=fvu**")
    page.get_by_role("button", name="FVU \u2191", exact=True).wait_for()
    page.wait_for_function(ORDER, arg=["sae-b", "sae-a", "sae-live"])  # without a report: last
    page.get_by_role("button", name="FVU \u2191", exact=True).press("Enter")
    page.wait_for_url("**order=down**")
    page.get_by_role("button", name="FVU \u2193", exact=True).wait_for()
    page.wait_for_function(ORDER, arg=["sae-a", "sae-b", "sae-live"])
    page.get_by_role("button", name="sae-b", exact=True).click()
    page.wait_for_url("**sae=sae-b**")
    page.get_by_role("heading", name="sae-b").wait_for()
    page.reload()
    page.get_by_role("heading", name="sae-b").wait_for()
    page.wait_for_function(ORDER, arg=["sae-a", "sae-b", "sae-live"])
    for width in (400, 800, 1280, 1920):
        page.set_viewport_size({"width": width, "height": 900})
        page.wait_for_function("width => window.innerWidth == width", arg=width)
        page.wait_for_timeout(300)
        assert page.evaluate("document.documentElement.scrollWidth - window.innerWidth") <= 0
        assert page.evaluate(CUT) == [], width
    loaded = page.evaluate("performance.getEntriesByType('resource').map(one => one.name)")
    assert not any("plotly" in name.lower() for name in loaded)


def test_curves_show_values_on_hover_and_go_on_while_training_does(page, hostile_run):
    live = hostile_run / "sae-live"
    metrics(live, 20)
    with locked(live / "checkpoints", "busy"):
        page.goto("/?curves=sae-live&curve=fvu")
        legend = page.locator(".sa-legend")
        legend.get_by_text("running at 4,864 of 30,000 tokens").wait_for()
        chart = page.locator("[data-testid=stVegaLiteChart]").first
        box = chart.locator("canvas, svg").first.bounding_box()
        assert box
        page.mouse.move(box["x"] + box["width"] - 30, box["y"] + box["height"] / 2)
        page.locator("#vg-tooltip-element.visible").wait_for()
        shown = page.locator("#vg-tooltip-element").inner_text()
        assert "sae-live" in shown and "FVU" in shown and "training tokens" in shown
        metrics(live, 40)
        legend.get_by_text("running at 9,984 of 30,000 tokens").wait_for()
        legend.get_by_text("0.025", exact=True).wait_for()
    legend.get_by_text("stopped at 9,984 of 30,000 tokens").wait_for()
