"""The map in a real Chromium: its script runs under the dashboard's policy, points are named, opened, chosen by a lasso."""

import re

import numpy as np
from browser import heading, idle

from saelab.features.layout import pca_layout
from saelab.features.store import load_features


def canvas(page):
    drawn = page.locator(".map canvas").nth(1)
    drawn.wait_for()
    page.wait_for_function(
        """() => { const find = (root) => [...root.querySelectorAll("*")].flatMap((one) => [
             ...(one.matches(".map canvas") ? [one] : []), ...(one.shadowRoot ? find(one.shadowRoot) : [])]);
           const points = find(document)[0];
           return points?.width && points.getContext("2d").getImageData(0, 0, points.width, points.height).data.some(Boolean) }"""
    )
    return drawn, drawn.bounding_box()


def on_screen(box, xy):
    half = 0.47 * min(box["width"], box["height"])
    return float(box["x"] + box["width"] / 2 + xy[0] * half), float(box["y"] + box["height"] / 2 - xy[1] * half)


def test_a_point_is_named_opened_and_chosen_by_a_lasso(page, hostile_run):
    store = load_features(hostile_run)
    layout = pca_layout(store)
    far = int(np.nanargmax(np.square(layout.xy).sum(1)))  # at the rim, where no other is near
    page.goto("/map")
    heading(page, "Map")
    drawn, box = canvas(page)
    x, y = on_screen(box, layout.xy[far])
    page.mouse.move(x, y)
    tip = page.locator(".map .tip")
    tip.wait_for()
    assert tip.inner_text().startswith(f"{far}: ")
    assert "features that fired" in (drawn.get_attribute("aria-label") or "")
    page.mouse.move(x - 15, y - 15)
    page.mouse.down()
    for dx, dy in ((15, -15), (15, 15), (-15, 15), (-15, -14)):
        page.mouse.move(x + dx, y + dy, steps=4)
    page.mouse.up()
    page.wait_for_url("**/map?**lasso=**")
    chosen = page.get_by_test_id("stMain").get_by_test_id("stPageLink-NavLink")
    chosen.get_by_text(str(far), exact=True).wait_for()
    values = [float(value) for value in re.split(",|%2C", page.url.split("lasso=")[1].split("&")[0])]
    inside = layout.inside(list(zip(values[::2], values[1::2], strict=True)))
    assert far in inside and chosen.count() == len(inside)
    page.reload()
    heading(page, "Map")
    chosen.get_by_text(str(far), exact=True).wait_for()
    _, box = canvas(page)
    page.mouse.click(*on_screen(box, layout.xy[far]))
    heading(page, f"Feature {far}")
    assert f"feature={far}" in page.url
    page.go_back()
    heading(page, "Map")
    assert "lasso=" in page.url


def test_nothing_scrolls_sideways_and_the_keyboard_chooses_what_is_around_a_feature(page):
    wide = (
        "[...document.querySelectorAll('html, [data-testid=stMain]')].map((one) => one.scrollWidth - one.clientWidth)"
    )
    for name in ("compare", "map"):
        page.goto(f"/{name}")
        heading(page, name.capitalize())
        idle(page)
        for width in (1920, 800, 400):
            page.set_viewport_size({"width": width, "height": 800})
            page.evaluate("() => new Promise((drawn) => requestAnimationFrame(() => requestAnimationFrame(drawn)))")
            assert max(page.evaluate(wide)) <= 0, (name, width)
    box = page.get_by_label("Choose the 50 around feature")
    box.fill("3")
    box.press("Enter")
    page.wait_for_url("**/map?**near=3**")
    page.get_by_test_id("stMain").get_by_test_id("stPageLink-NavLink").first.wait_for()
