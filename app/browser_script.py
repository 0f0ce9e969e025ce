"""The one script that the dashboard adds to Streamlit's page; `asgi.py` puts it in the head. Without it everything can be read.

Arrow keys move between the tokens of an example that have a value, so that each example is one tab stop, and do not step to
another feature meanwhile. A link of the class `sl-go` changes the address as Back and Forward do, which Streamlit answers with a
new run, and goes to the top for another feature; without the script the link would load the whole page again. `/` goes to the
search of the features, `g` to the box for a feature's number, unless one is typing. Another page of a table begins at its top.
The address of the Feature page names its feature, however one came there. Streamlit's buttons take keys of their own
(`st.button(shortcut=...)`), its boxes none.
"""

_TOKENS = """
window.addEventListener("keydown", event => {
  const token = event.target.closest?.(".sl-t");
  const step = {ArrowLeft: -1, ArrowRight: 1, Home: -1e6, End: 1e6}[event.key];
  if (!token || !step || event.ctrlKey || event.metaKey || event.altKey) return;
  const tokens = [...token.closest(".sl-text").querySelectorAll(".sl-t")];
  const next = tokens[Math.min(Math.max(tokens.indexOf(token) + step, 0), tokens.length - 1)];
  for (const one of tokens) one.tabIndex = one === next ? 0 : -1;
  next.focus();
  event.preventDefault();
  event.stopImmediatePropagation();
}, true);
"""

_LINKS = """
window.addEventListener("click", event => {
  const link = event.target.closest?.("a.sl-go");
  if (!link || event.button || event.ctrlKey || event.metaKey || event.shiftKey || event.altKey) return;
  event.preventDefault();
  const feature = href => new URL(href).searchParams.get("feature");
  if (feature(link.href) !== feature(location.href)) document.querySelector("[data-testid=stMain]")?.scrollTo(0, 0);
  history.pushState({}, "", link.href);
  dispatchEvent(new PopStateEvent("popstate"));
}, true);
"""

_KEYS = """
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
"""

_PAGING = """
addEventListener("click", event => {
  if (event.target.closest?.("[data-testid=stPagination] button"))
    document.querySelector("[data-testid=stMain] .sa-head")?.scrollIntoView();
}, true);
"""

_ADDRESS = """
addEventListener("DOMContentLoaded", () => new MutationObserver(() => {
  const shown = document.title.match(/^Feature (\\d+)/), at = new URL(location.href);
  if (!shown || at.pathname !== "/feature" || at.searchParams.has("feature")) return;
  at.searchParams.set("feature", shown[1]);
  history.replaceState(history.state, "", at);
}).observe(document.querySelector("title"), {childList: true}));
"""

SCRIPT = _TOKENS + _LINKS + _KEYS + _PAGING + _ADDRESS
