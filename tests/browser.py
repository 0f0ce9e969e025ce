"""Fixtures of the tests in a real Chromium: the dashboard on a free port, and a page that notices what must not happen."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

CHROMIUM = os.environ.get("SAELAB_CHROMIUM") or shutil.which("chromium")
REQUIRED = os.environ.get("SAELAB_REQUIRE_BROWSER") == "1"
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
WAIT = 30_000


@pytest.fixture(scope="module")
def server(hostile_run, tmp_path_factory):
    """`saelab.app.serve` on a free port, as its own process: `(url, pid)`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    code = "import sys; from saelab.app.serve import serve; serve(sys.argv[1], port=int(sys.argv[2]))"
    log = tmp_path_factory.mktemp("dash") / "log.txt"
    with log.open("w") as out:
        process = subprocess.Popen([sys.executable, "-c", code, str(hostile_run), str(port)], stdout=out, stderr=out)
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_until_healthy(url, process, log)
        yield url, process.pid
    finally:
        process.send_signal(signal.SIGINT)  # what Ctrl-C does
        code = process.wait(timeout=20)
    assert code == 0, log.read_text()
    assert "Traceback" not in log.read_text(), log.read_text()


def _wait_until_healthy(url, process, log):
    for _ in range(300):
        assert process.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(f"{url}/_stcore/health", timeout=5) as answer:
                assert answer.status == 200
                return
        except OSError:
            time.sleep(0.1)
    raise AssertionError(f"the dashboard did not start:\n{log.read_text()}")


@pytest.fixture(scope="module")
def chromium():
    if not CHROMIUM and not REQUIRED:
        pytest.skip("no Chromium: apt-get install chromium, or set SAELAB_CHROMIUM")
    assert CHROMIUM, "SAELAB_REQUIRE_BROWSER=1 but there is no Chromium: set SAELAB_CHROMIUM or put chromium on PATH"
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def browser_context(chromium, server):
    """One for all pages of a file, so that scripts come from the browser's cache."""
    context = chromium.new_context(viewport={"width": 1360, "height": 900}, base_url=server[0])
    yield context
    context.close()


@pytest.fixture
def page(browser_context, server):
    """A fresh page that fails the test on any console error, dialog, script error or request to another host."""
    url, _ = server
    page = browser_context.new_page()
    page.set_default_timeout(WAIT)
    wrong = []

    def check(request):
        if not request.url.startswith((url, "data:", "blob:")):
            wrong.append(f"request to {request.url}")

    page.on("request", check)
    page.on("console", lambda message: wrong.append(f"console: {message.text}") if message.type == "error" else None)
    page.on("pageerror", lambda error: wrong.append(f"script error: {error}"))
    page.on("dialog", lambda dialog: (wrong.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    page.on("websocket", lambda ws: None if ws.url.startswith(url.replace("http", "ws")) else wrong.append(ws.url))
    yield page
    page.close()
    assert not wrong


def heading(page, text):
    page.get_by_role("heading", name=text, exact=True, level=1).wait_for()


def idle(page):
    """Until Streamlit has finished its run and nothing has changed for a moment."""
    page.wait_for_function(
        """() => {
            const app = document.querySelector('[data-testid=stApp]'), text = app.innerText, last = window.lastText;
            window.lastText = text;
            return app.dataset.testScriptState === 'notRunning' && last === text;
        }""",
        polling=150,
    )
