"""Makes the README's picture again, from a finished demo: two features of the dashboard beside each other.

    python docs/make_pictures.py runs/demo
    python docs/make_pictures.py runs/demo --words thunder ship

Each feature is the best match of a word. Needs Chromium, as the browser tests do (SAELAB_CHROMIUM names it).
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PICTURE = Path(__file__).parent / "images" / "dashboard.png"
WORDS = ("king", "ship")
SIZE = {"width": 720, "height": 860}  # of each half: narrow enough that the sidebar folds away
_SERVE = "import sys; from saelab.app.serve import serve; serve(sys.argv[1], port=int(sys.argv[2]))"


def main() -> None:
    """Start the dashboard of a RUN, take the picture, stop it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a finished run, such as runs/demo")
    parser.add_argument("--words", nargs=2, default=WORDS, help="a word for each half")
    parser.add_argument("--out", type=Path, default=PICTURE, help="the file to write")
    arguments = parser.parse_args()
    from playwright.sync_api import sync_playwright

    features = [best_match(arguments.run, word) for word in arguments.words]
    chromium = os.environ.get("SAELAB_CHROMIUM") or shutil.which("chromium")
    with dashboard(arguments.run) as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        take(browser, url, features, arguments.out)
        browser.close()
    print(f"features {features} are in {arguments.out} ({arguments.out.stat().st_size:,} bytes)")


def best_match(run: Path, word: str) -> int:
    """The first feature that a search for the word finds, among those that fire on at most 1 % of the tokens if there are any."""
    from saelab import load_features

    found = load_features(run).search(word)
    if not found:
        raise SystemExit(f"No feature of {run} is found by {word!r}: choose other --words.")
    return next((row for row in found if row["density"] <= 1e-2), found[0])["feature"]


@contextmanager
def dashboard(run: Path) -> Iterator[str]:
    """The address of a dashboard that runs inside the `with` block."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    server = subprocess.Popen([sys.executable, "-c", _SERVE, str(run), str(port)], stdout=subprocess.DEVNULL)
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{url}/_stcore/health", timeout=5).close()
                break
            except OSError:
                time.sleep(0.1)
        yield url
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(timeout=20)


def take(browser: Any, url: str, features: Sequence[int], path: Path) -> None:
    """Write the features' pages side by side to a PNG file of 64 colours."""
    from PIL import Image

    context = browser.new_context(viewport=SIZE, base_url=url, color_scheme="light")
    picture = Image.new("RGB", (len(features) * SIZE["width"], SIZE["height"]), "white")
    for i, feature in enumerate(features):
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.goto(f"/feature?feature={feature}")
        page.get_by_role("heading", name=f"Feature {feature}", exact=True, level=1).wait_for()
        page.get_by_role("button", name="Next").wait_for()
        page.locator(".sl-row").first.wait_for()
        page.wait_for_selector("[data-testid=stApp][data-test-script-state=notRunning]")
        page.wait_for_timeout(1000)  # fonts and fades
        half = Image.open(io.BytesIO(page.screenshot()))
        picture.paste(half, (i * SIZE["width"], 0))
        if i:
            picture.paste("#d0d0d0", (i * SIZE["width"], 0, i * SIZE["width"] + 1, SIZE["height"]))
        page.close()
    context.close()
    picture.quantize(64, dither=Image.Dither.NONE).save(path, optimize=True)


if __name__ == "__main__":
    main()
