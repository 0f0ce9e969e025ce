"""The dashboard's pages through Streamlit's AppTest, without a browser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def open_page(request, monkeypatch):
    """Opens one page of a run (by default `hostile_run`) with URL parameters, as a deep link does."""
    from streamlit.testing.v1 import AppTest
    from streamlit.util import calc_hash

    from saelab.app import serve

    def open_page(name: str = "runs", run: Path | None = None, **query: Any) -> AppTest:
        monkeypatch.setenv(serve.RUN_VARIABLE, str(run or request.getfixturevalue("hostile_run")))
        app = AppTest.from_file(str(Path(serve.__file__).with_name("main.py")), default_timeout=60)
        for key, value in query.items():
            app.query_params[key] = str(value)
        # AppTest.switch_page takes page files; ours are functions, known by the hash of their address.
        app._page_hash = "" if name == "runs" else calc_hash(name)
        return app.run()

    return open_page


def html_of(app: Any) -> str:
    """All that the page shows as HTML of its own."""
    return "".join(element.proto.body for element in app.get("html"))
