"""Every page of the dashboard in a real Chromium: restored from its address, laid out from 400 to 1920 px, legible, reachable by
keyboard. `page` fails on console errors, dialogs and requests to another host."""

import pytest
from browser import heading, idle

PAGES = {
    "/": "Runs",
    "/features?sort=max&order=up&show=all&page=2": "Features",
    "/feature?feature=3&kind=uniform&by=encoder": "Feature 3",
    "/dead?fired=100": "Dead features",
    "/prompt?text=The+river": "Prompt",
    "/steer?feature=3&strength=2": "Steer",
    "/map": "Map",
    "/compare": "Compare",
    "/texts": "Texts",
    "/jobs": "Jobs",
}

# Labels, headings, controls and numbers whose text does not fit. A preview (.sa-last, .sa-clip) may end in dots.
CUT = """() => {
  const names = 'button, label, label p, th, h1, h2, h3, a, [data-testid=stMetricLabel] *, [data-testid=stMetricValue] *, ' +
    '[role=radio], [role=radio] p, [role=tab], .sa-head span, .sa-num, summary';
  const bad = [];
  for (const one of document.querySelectorAll('[data-testid=stMain] :is(' + names + ')')) {
    if (!one.offsetParent || !one.innerText?.trim() || one.closest('.sa-last, .sa-clip, [data-testid=stTooltipIcon]')) continue;
    const box = one.getBoundingClientRect(), style = getComputedStyle(one);
    if (style.clip !== 'auto' || style.clipPath !== 'none' || box.width <= 1) continue;  // for screen readers only
    const cut = style.overflowX !== 'visible' && one.scrollWidth > one.clientWidth + 1;
    const out = box.right > innerWidth + 1 && !one.closest('[data-testid=stDataFrame]');
    if (cut || out) bad.push(one.innerText.trim().slice(0, 60));
  }
  return bad;
}"""

# Text whose contrast with what is behind it is below that of WCAG 2 AA: 4.5, or 3 for large text and icons.
FAINT = """() => {
  const parse = text => { const n = text.match(/[\\d.]+/g).map(Number); return [n[0], n[1], n[2], n[3] ?? 1]; };
  const over = (top, below) => [0, 1, 2].map(i => top[i] * top[3] + below[i] * (1 - top[3])).concat(1);
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255).map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const bad = [], walker = document.createTreeWalker(document.querySelector('[data-testid=stApp]'), NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const one = walker.currentNode.parentElement, text = walker.currentNode.data.trim();
    if (/^[\u2190\u2192]$/.test(text)) continue;  // Streamlit's hint of a button's key, beside its name
    if (!text || !one.offsetParent || one.closest('svg, style, script, :disabled, [aria-disabled=true], [hidden]')) continue;
    const box = one.getBoundingClientRect(), style = getComputedStyle(one);
    if (box.width <= 1 || box.height <= 1 || style.visibility === 'hidden') continue;
    let behind = [], opacity = 1;
    for (let up = one; up; up = up.parentElement) {
      const there = getComputedStyle(up);
      behind.push(parse(there.backgroundColor));
      opacity *= Number(there.opacity);
    }
    if (opacity === 0) continue;
    const below = behind.reverse().reduce((under, top) => over(top, under), [255, 255, 255, 1]);
    const ink = parse(style.color), shown = over([ink[0], ink[1], ink[2], ink[3] * opacity], below);
    const [high, low] = [light(shown), light(below)].sort((a, b) => b - a);
    const size = parseFloat(style.fontSize), bold = Number(style.fontWeight) >= 700;
    const icon = one.dataset.testid === 'stIconMaterial';
    const needed = icon || size >= 24 || (bold && size >= 18.66) ? 3 : 4.5;
    if ((high + .05) / (low + .05) < needed) bad.push(text.slice(0, 40) + ' ' + ((high + .05) / (low + .05)).toFixed(2));
  }
  return [...new Set(bad)];
}"""


def opened(page, path):
    page.goto(path)
    heading(page, PAGES[path])
    idle(page)


def found(page, script):
    """What a check finds once the page has settled: nothing, or the same for two seconds."""
    for _ in range(10):
        if not (wrong := page.evaluate(script)):
            break
        page.wait_for_timeout(200)
    return wrong


@pytest.mark.parametrize("path", PAGES)
def test_a_page_in_the_browser(page, path):
    """One visit, as a browser is slow: what the page shows at every width and in both schemes, then what a reload shows."""
    opened(page, path)
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        assert found(page, FAINT) == [], scheme
    for width in (400, 800, 1280, 1920):
        page.set_viewport_size({"width": width, "height": 900})
        page.wait_for_function("width => window.innerWidth == width", arg=width)
        assert found(page, "Math.max(0, document.documentElement.scrollWidth - window.innerWidth)") == 0, width
        assert found(page, CUT) == [], width
    page.wait_for_timeout(300)
    idle(page)  # charts are drawn again
    title, address = page.title(), page.url
    text = page.get_by_test_id("stMain").inner_text()
    assert title.endswith("saelab") and title != "saelab"
    page.reload()
    heading(page, PAGES[path])
    idle(page)
    page.wait_for_function("text => document.querySelector('[data-testid=stMain]').innerText == text", arg=text)
    assert (page.title(), page.url) == (title, address)
    for _ in range(60):
        page.keyboard.press("Tab")
        if page.evaluate("!!document.activeElement.closest('[data-testid=stMain]')"):
            break
    else:
        pytest.fail("Tab does not reach the page")


def test_the_row_above_a_feature_is_one_line(page):
    """Buttons and links beside each other have one height."""
    opened(page, "/feature?feature=3&kind=uniform&by=encoder")
    row = page.locator(".st-key-sl-step")
    row.get_by_text("Save as HTML").wait_for()
    boxes = [one.bounding_box() for one in row.locator("button:has(p), a:has(p)").all()]
    assert len(boxes) == 6 and len({(round(box["y"]), round(box["height"])) for box in boxes}) == 1
