"""The one script that the dashboard adds to Streamlit's page: keys that move the focus, and where paging leads.

`/` goes to the search of the features, `g` to the box for a feature's number, unless one is typing. Another page of a table
begins at its top. Streamlit's buttons take keys of their own (`st.button(shortcut=...)`), its boxes none.
"""

SCRIPT = """
addEventListener("keydown", event => {
  const key = {"/": "Search", "g": "Go to"}[event.key];
  if (!key || event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  if (event.target.closest?.("input,textarea,select,[contenteditable],[role=combobox],[role=listbox],[role=grid]")) return;
  const box = () => document.querySelector(`[data-testid=stMain] input[aria-label="${key}"]`);
  const focus = () => { const found = box(); found?.focus(); found?.select(); return found; };
  if (focus()) { event.preventDefault(); return; }
  const link = key === "Search" && document.querySelector('[data-testid=stSidebarNav] a[href$="/features"]');
  if (!link) return;
  event.preventDefault();
  link.click();
  const until = Date.now() + 5000, wait = () => focus() || Date.now() > until || setTimeout(wait, 50);
  wait();
});
addEventListener("click", event => {
  if (event.target.closest?.("[data-testid=stPagination] button"))
    document.querySelector("[data-testid=stMain] .sa-head")?.scrollIntoView();
}, true);
"""
