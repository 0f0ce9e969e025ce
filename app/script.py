"""The dashboard's own script, which `asgi.py` puts in the head of every page; without it everything can still be read.

Arrow keys move between the tokens of an example that have a value, so that each example is one tab stop, and do not step to
another feature meanwhile. A link of the class `sl-go` changes the address as Back and Forward do, which Streamlit answers with a
new run; without the script the link would load the whole page again.
"""

SCRIPT = """
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
window.addEventListener("click", event => {
  const link = event.target.closest?.("a.sl-go");
  if (!link || event.button || event.ctrlKey || event.metaKey || event.shiftKey || event.altKey) return;
  event.preventDefault();
  history.pushState({}, "", link.href);
  dispatchEvent(new PopStateEvent("popstate"));
}, true);
"""
