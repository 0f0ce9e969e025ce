"""The dashboard in a real Chromium: read a feature, sort, go back, steer, with a corpus full of hostile text."""

import importlib.util
import os
import re
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path

import pytest
from browser import heading, idle

from saelab.features.store import load_features


def test_open_a_feature_read_it_go_back_and_steer(page, hostile_run):
    store = load_features(hostile_run)
    page.goto("/")
    heading(page, "Runs")
    page.get_by_test_id("stSidebarNav").get_by_role("link", name="Features", exact=True).click()
    heading(page, "Features")
    idle(page)
    strongest = store.table("max", limit=1)[0]["feature"]
    page.get_by_role("radio", name="Max").click()
    page.wait_for_url("**/features?**sort=max**")
    first = page.get_by_test_id("stMain").get_by_test_id("stPageLink-NavLink").first
    links = "[data-testid=stMain] [data-testid=stPageLink-NavLink]"
    page.wait_for_function(
        "([links, name]) => document.querySelector(links)?.innerText.includes(name)", arg=[links, str(strongest)]
    )
    first.click()
    heading(page, f"Feature {strongest}")
    assert f"feature={strongest}" in page.url
    page.locator(".sl-row").first.wait_for()
    assert page.locator(".sl-row").count() == len(store.feature(strongest).examples())
    token = page.locator(".sl-peak").first
    token.focus()
    assert re.search(
        r"token '.*', activation [\d., ]+, 100% of maximum, peak", token.get_attribute("aria-label") or "", re.S
    )
    page.go_back()
    heading(page, "Features")
    page.wait_for_url("**/features?**sort=max**")
    page.go_forward()
    heading(page, f"Feature {strongest}")
    page.get_by_role("link", name="Steer with it").click()
    heading(page, "Steer")
    idle(page)
    page.get_by_label("Strength (\u00d7 p99)").fill("8")
    page.get_by_label("Strength (\u00d7 p99)").press("Enter")
    page.wait_for_url("**strength=8**")
    prompt = "<img src=x onerror=alert('prompt')> The river"
    page.get_by_label("Prompt").fill(prompt)
    page.get_by_role("button", name="Generate").click()
    page.get_by_text("Both with seed 0").wait_for(timeout=60_000)
    idle(page)
    unsteered, steered = page.locator(".sa-out").all_inner_texts()
    assert unsteered != steered and unsteered.startswith(prompt) and steered.startswith(prompt)
    _screenshot(page, "steer")
    page.reload()
    heading(page, "Steer")
    shown = "prompt => document.querySelector('[data-testid=stMain] textarea')?.value === prompt"
    page.wait_for_function(shown, arg=prompt)
    assert page.get_by_label("Strength (\u00d7 p99)").input_value() == "8"


def test_the_generate_button_is_readable_in_the_dark_and_columns_stand_below_each_other_at_800(page):
    page.emulate_media(color_scheme="dark")
    page.set_viewport_size({"width": 800, "height": 900})
    page.goto("/steer?feature=3")
    heading(page, "Steer")
    idle(page)
    button = page.get_by_role("button", name="Generate")
    style = "element => { const s = getComputedStyle(element); return [s.color, s.backgroundColor] }"
    text, ground = (_luminance(colour) for colour in button.evaluate(style))
    assert (max(text, ground) + 0.05) / (min(text, ground) + 0.05) >= 4.5
    boxes = [column.bounding_box() for column in page.locator("[data-testid=stMain] [data-testid=stColumn]").all()]
    assert len(boxes) == 2 and boxes[1]["y"] >= boxes[0]["y"] + boxes[0]["height"]


def _luminance(colour):
    """Relative luminance (WCAG) of `rgb(r, g, b)`."""
    channels = [int(value) / 255 for value in re.findall(r"\d+", colour)[:3]]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_keys_go_to_the_search_and_to_the_number_and_paging_to_the_top(page):
    page.goto("/feature?feature=3")
    heading(page, "Feature 3")
    page.get_by_label("Go to").wait_for()
    page.keyboard.press("g")
    assert page.evaluate("document.activeElement.ariaLabel") == "Go to"
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("/")
    heading(page, "Features")
    page.wait_for_function("() => document.activeElement.ariaLabel === 'Search'")
    page.keyboard.type("g/")  # in a box they are characters like others
    assert page.get_by_label("Search").input_value() == "g/"
    page.goto("/features?show=all")
    pages = page.get_by_test_id("stPagination").get_by_role("button", name="Page 2", exact=True)
    pages.scroll_into_view_if_needed()
    table = page.locator(".sa-head").first
    assert table.bounding_box()["y"] < 0
    pages.click()
    page.wait_for_url("**page=2**")
    idle(page)
    assert 30 < table.bounding_box()["y"] < 300  # below Streamlit's bar


@pytest.mark.parametrize(
    ("address", "shown", "query"),
    [
        ("/feature/5", "Feature 5", "?feature=5"),
        ("/Feature?feature=4", "Feature 4", "?feature=4"),
        ("/runs", "Runs", ""),
    ],
)
def test_an_address_that_is_nearly_a_page_leads_to_it(page, address, shown, query):
    page.goto(address)
    heading(page, shown)
    assert page.url.endswith(query)


def test_the_picture_of_the_readme_can_be_made_again(chromium, server, hostile_run, tmp_path):
    from PIL import Image

    spec = importlib.util.spec_from_file_location(
        "make_pictures", Path(__file__).parents[1] / "docs" / "make_pictures.py"
    )
    assert spec and spec.loader
    pictures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pictures)
    feature = pictures.best_match(hostile_run, "weather")
    assert feature in [row["feature"] for row in load_features(hostile_run).search("weather")]
    pictures.take(chromium, server[0], [feature, 3], tmp_path / "two.png")
    with Image.open(tmp_path / "two.png") as picture:
        assert picture.size == (1440, 860) and len(picture.getcolors() or [None] * 257) > 16
    assert (tmp_path / "two.png").stat().st_size < 200_000


def test_an_address_that_is_no_page_says_so(server):
    url, _ = server
    for path in ("/feature/%3Cb%3E", "/nothing", "/feature/1/2"):
        with pytest.raises(urllib.error.HTTPError, match="404") as error:
            urllib.request.urlopen(url + path, timeout=10)
        answer = error.value.read().decode()
        assert "No such page" in answer and 'href="/features"' in answer and "<b>" not in answer
        assert "default-src 'self'" in error.value.headers["content-security-policy"]


def test_every_feature_is_shown_without_running_its_text(page, hostile_run):
    store = load_features(hostile_run)
    shown = ""
    for row in store.table("n_fired", limit=3):
        page.goto(f"/feature?feature={row['feature']}")
        heading(page, f"Feature {row['feature']}")
        page.locator(".sl-row").first.wait_for()
        idle(page)
        shown += page.locator(".sl").first.inner_text()
        assert (
            page.locator("[data-testid=stHtml] script, [data-testid=stHtml] img, [data-testid=stHtml] iframe").count()
            == 0
        )
    assert "<script>" in shown or "onerror" in shown or "onload" in shown
    assert "\u202e" not in shown
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        _screenshot(page, f"feature-{scheme}")


def _strongest(run):
    return load_features(run).table("n_fired", limit=1)[0]["feature"]


_TOKEN = """() => {
  const token = document.activeElement, marked = [...document.querySelectorAll(".sl-bin")].filter(
    bar => getComputedStyle(bar, "::before").content.includes("\u25bc"));
  return [token.className, token.dataset.v, getComputedStyle(token, "::after").content.replaceAll('"', ""),
          marked.map(bar => bar.dataset.bin).join(), token.dataset.at ?? ""];
}"""


def test_a_focused_token_shows_its_value_and_its_bin(page, hostile_run):
    store = load_features(hostile_run)
    index = _strongest(hostile_run)
    address = f"/feature?feature={index}"
    page.goto(address)
    page.locator(".sl-bars").wait_for()
    idle(page)
    examples = store.feature(index).examples()
    stops = page.evaluate("[...document.querySelectorAll('.sl *')].filter(one => one.tabIndex >= 0).length")
    assert stops == 2 * len(examples)  # the peak, and the link to the document
    row = next(i for i, one in enumerate(examples) if sum(map(bool, one.values)) > 2)
    page.locator(".sl-row").nth(row).locator(".sl-peak").focus()
    seen = set()
    for key in ("Home", "ArrowRight", "ArrowRight", "ArrowLeft", "End"):
        page.keyboard.press(key)
        name, value, shown, marked, own = page.evaluate(_TOKEN)
        assert "sl-t" in name and value == shown and marked == own
        seen.add(page.evaluate("[...document.querySelectorAll('.sl-t')].indexOf(document.activeElement)"))
    page.wait_for_timeout(500)  # an arrow that stepped on would have done so by now
    idle(page)
    assert len(seen) >= 3 and page.url.endswith(address)  # the arrows did not step to the next feature
    _screenshot(page, "feature-focus")
    page.keyboard.press("Tab")
    assert "sl-go" in page.evaluate("document.activeElement.className")
    page.locator(".sl-peak").first.hover()
    page.evaluate("document.activeElement.blur()")
    assert page.evaluate(_TOKEN)[3] == page.locator(".sl-peak").first.get_attribute("data-at")
    page.set_viewport_size({"width": 400, "height": 800})
    for one in page.locator(".sl-t").all()[:40]:
        one.focus()
        assert page.evaluate(
            "[...document.querySelectorAll('[data-testid=stMain]')].every(x => x.scrollWidth <= x.clientWidth)"
        )
    _screenshot(page, "feature-400")


def test_an_example_opens_to_its_document_without_loading_the_page_again(page, hostile_run):
    store = load_features(hostile_run)
    example = store.feature(_strongest(hostile_run)).examples()[1]
    page.goto(f"/feature?feature={_strongest(hostile_run)}")
    page.locator(".sl-row").first.wait_for()
    idle(page)
    page.evaluate("window.same = true")
    page.locator("a.sl-go").nth(1).click()
    page.locator(".sl-doc").wait_for()
    assert f"{len(store.document(example.document).pieces)} tokens" in page.locator(".sl-doc").inner_text()
    _screenshot(page, "feature-document")
    page.go_back()
    page.locator(".sl-doc").wait_for(state="detached")
    assert page.evaluate("window.same") is True
    page.go_forward()
    page.reload()
    page.locator(".sl-doc .sl-window .sl-peak").wait_for()
    page.locator("a.sl-go[aria-expanded=true]").click()
    page.locator(".sl-doc").wait_for(state="detached")
    page.get_by_role("button", name="Next").click()
    page.wait_for_url(lambda url: "doc=" not in url and f"feature={_strongest(hostile_run)}" not in url)


def test_a_deep_link_restores_the_table(page, hostile_run):
    page.goto("/features?sort=cosine&order=up&show=all&page=2")
    heading(page, "Features")
    page.get_by_test_id("stMain").get_by_test_id("stPageLink-NavLink").nth(24).wait_for()
    assert page.get_by_role("radio", name="Low to high").get_attribute("aria-checked") == "true"
    expected = load_features(hostile_run).table("cosine", descending=False, limit=25, offset=25)
    links = page.get_by_test_id("stMain").get_by_test_id("stPageLink-NavLink").all_inner_texts()
    assert [link.split()[-1] for link in links] == [str(row["feature"]) for row in expected]
    page.goto("/feature?feature=nonsense%3Cscript%3Ealert(1)%3C/script%3E")
    page.get_by_text("The URL has feature").wait_for()


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="reads /proc/net/tcp")
def test_it_listens_on_loopback_only(server):
    _, pid = server
    own = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            own.add(str(entry.readlink()))
    listening = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in own:
                listening.append(fields[1].split(":")[0])
    assert listening == ["0100007F"]


def test_a_request_under_another_host_name_is_refused(server):
    url, _ = server
    request = urllib.request.Request(url, headers={"Host": "attacker.example"})
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(request, timeout=10)
    with urllib.request.urlopen(url, timeout=10) as answer:
        assert "default-src 'self'" in answer.headers["content-security-policy"]


def _screenshot(page, name):
    """Kept when SAELAB_SCREENSHOTS names a folder."""
    if folder := os.environ.get("SAELAB_SCREENSHOTS"):
        page.wait_for_timeout(700)
        page.screenshot(path=str(Path(folder) / f"{name}.png"), full_page=True)
