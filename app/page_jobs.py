"""Jobs page: starts long work on the chosen SAE as a process of its own, shows how far all jobs of the run are, and ends them."""

from __future__ import annotations

import streamlit as st

from saelab.app import as_python, job_cards, job_forms, state, url
from saelab.jobs import KINDS


def show() -> None:
    """Render the page."""
    st.title("Jobs")
    sae = state.chosen_sae()
    st.html(
        '<p class="sa-sub">Each job is a process of its own: it goes on when this page or the dashboard is closed, and what '
        "it has done is kept when it is cancelled.</p>"
    )
    name = url.choice("kind", "verify", list(KINDS))
    st.segmented_control(
        "Job",
        list(KINDS),
        format_func=lambda one: KINDS[one].title,
        required=True,
        wrap=True,
        **url.bound("kind", name),
    )
    job_forms.show(sae, name)
    job_cards.show(state.run_folder())
    as_python.offer("from saelab.jobs import jobs", "", f"found = jobs({str(state.run_folder())!r})")
