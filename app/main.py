"""Entry script of the dashboard: Streamlit runs it on every interaction. Navigation only; the pages are in `page_*.py`."""

import streamlit as st

from saelab.app import (
    as_python,
    page_compare,
    page_dead,
    page_feature,
    page_features,
    page_jobs,
    page_map,
    page_prompt,
    page_runs,
    page_steer,
    page_texts,
    state,
    url,
)
from saelab.app.style import ICON, PAGE_STYLE

st.set_page_config(page_title="saelab", page_icon=ICON, layout="wide")
pages = {
    "runs": st.Page(page_runs.show, title="Runs", icon=":material/monitoring:", url_path="runs", default=True),
    "features": st.Page(page_features.show, title="Features", icon=":material/table_rows:", url_path="features"),
    "feature": st.Page(page_feature.show, title="Feature", icon=":material/article:", url_path="feature"),
    "dead": st.Page(page_dead.show, title="Dead features", icon=":material/bedtime:", url_path="dead"),
    "prompt": st.Page(page_prompt.show, title="Prompt", icon=":material/edit_note:", url_path="prompt"),
    "texts": st.Page(page_texts.show, title="Texts", icon=":material/library_books:", url_path="texts"),
    "steer": st.Page(page_steer.show, title="Steer", icon=":material/tune:", url_path="steer"),
    "map": st.Page(page_map.show, title="Map", icon=":material/scatter_plot:", url_path="map"),
    "compare": st.Page(page_compare.show, title="Compare", icon=":material/compare_arrows:", url_path="compare"),
    "jobs": st.Page(page_jobs.show, title="Jobs", icon=":material/pending_actions:", url_path="jobs"),
}
st.session_state["pages"] = pages
page = st.navigation(list(pages.values()))
state.page_title({id(one): name.capitalize() for name, one in pages.items()}.get(id(page), "saelab"))
st.html(PAGE_STYLE)
url.show_notices()
with state.friendly_errors(page.title):
    url.check_parameters()
    state.show_sidebar()
    page.run()
    as_python.show()
