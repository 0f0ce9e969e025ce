"""The dashboard's style sheet on top of Streamlit's theme; translucent colours work in light and dark mode."""

from saelab.features.style import STYLE

_OWN = """
.block-container, [data-testid="stMainBlockContainer"]{padding-top:2.6rem;max-width:1360px}
[data-testid="stMetricValue"]{font-size:1.45rem;font-variant-numeric:tabular-nums}
[data-testid="stCaptionContainer"],[data-testid="stCaptionContainer"] code{color:inherit!important}
[data-testid="stCaptionContainer"]{opacity:.8}
.sa-sub{opacity:.75;font-size:.9rem;margin:-.4rem 0 .2rem}
.sa-grid{display:grid;grid-template-columns:minmax(9rem,1fr) 4.8rem 3.2rem 4.2rem 4.2rem 4.4rem minmax(0,2fr);gap:.3rem .9rem;
align-items:center;font-size:.9rem;font-variant-numeric:tabular-nums}
.sa-first,.sa-last{min-width:0;overflow-wrap:anywhere}.sa-last{white-space:nowrap;overflow:hidden;text-overflow:ellipsis}
.sa-label{font-weight:600}
.sa-mark-dense{border:1px solid currentColor;border-radius:4px;padding:0 .3em;font-size:.72rem;font-weight:400}
[class*="st-key-sa-row-"]{position:relative;border-radius:4px}
[class*="st-key-sa-row-"]:hover{background:rgba(128,128,128,.1)}
[class*="st-key-sa-row-"] [data-testid="stPageLink-NavLink"]::after{content:"";position:absolute;inset:0}
[class*="st-key-sa-row-"] [data-testid="stPageLink"],[class*="st-key-sa-row-"] [data-testid="stPageLink-NavLink"],
[class*="st-key-sa-row-"] [data-testid="stColumn"]:first-child *{position:static}
.sa-head{scroll-margin-top:4rem}
.sa-head{font-size:.76rem;opacity:.8;font-weight:600;border-bottom:1px solid rgba(128,128,128,.4);padding-bottom:.35rem}
.sa-num{text-align:right}
.sa-clip{white-space:nowrap;overflow:hidden;text-overflow:ellipsis}
.sa-bar{display:flex;align-items:center;gap:.5rem}
.sa-bar span{min-width:3.7rem}
.sa-bar i{flex:1;height:.45rem;border-radius:2px;background:rgba(128,128,128,.22);overflow:hidden}
.sa-bar i b{display:block;height:100%;background:#0072b2}
.sa-mark{background:rgba(230,159,0,.5);border-radius:3px;font-weight:700;text-decoration:underline;text-underline-offset:3px}
.sa-chip{border:1px solid rgba(128,128,128,.4);border-radius:4px;padding:0 .35em;white-space:pre}
.sa-never{border:1px dashed currentColor;border-radius:4px;padding:0 .4em;font-size:.8rem}
.sa-out{white-space:pre-wrap;overflow-wrap:anywhere;border:1px solid rgba(128,128,128,.35);border-radius:6px;
padding:.9rem 1rem;line-height:1.6;min-height:7rem}
.sa-out .sa-prompt{opacity:.62}
.sa-sends{border-left:3px solid #d55e00;background:rgba(128,128,128,.12);padding:.5rem .9rem;margin:0;overflow-wrap:anywhere}
.sa-legend{list-style:none;margin:0 0 .3rem;padding:0!important;display:flex;flex-wrap:wrap;gap:.25rem 1.2rem;font-size:.86rem;
font-variant-numeric:tabular-nums}
.sa-legend li{display:flex;gap:.45rem;margin:0;min-width:0;align-items:baseline}
.sa-legend span{min-width:0;overflow-wrap:anywhere}.sa-legend small{opacity:.75}
.sa-line{flex:none;width:28px;height:3px;align-self:center}
.st-key-sa-runs{container-type:inline-size}
.sa-run{display:grid;grid-template-columns:var(--widths);margin:0;padding:0!important;font-size:.86rem;font-variant-numeric:tabular-nums;
align-items:center}
.sa-run div{padding:.25rem .35rem;min-width:0;overflow-wrap:anywhere}
.sa-run dt{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)}.sa-run dd{margin:0}
.st-key-sa-runs-head{border-bottom:1px solid rgba(128,128,128,.4)}
[class*="st-key-sa-run-"]{border-bottom:1px solid rgba(128,128,128,.2)}
[class*="st-key-sa-run-chosen-"]{background:rgba(128,128,128,.12)}
.st-key-sa-runs [data-testid="stColumn"]{min-width:0}
[data-tag]{background:rgba(128,128,128,.2)!important;color:inherit!important}[data-tag] *{color:inherit!important}
.st-key-sa-runs button{justify-content:flex-start;text-align:left;padding:.2rem .35rem;min-height:0;width:100%}
.st-key-sa-runs button>div,.st-key-sa-runs button>div>span{width:100%;justify-content:inherit;text-align:inherit}
.st-key-sa-runs button p{white-space:normal;overflow-wrap:anywhere;font-size:.86rem}
.st-key-sa-runs-head button p{font-size:.76rem;font-weight:600}
[class*="st-key-sa-sort-number-"] button{justify-content:flex-end;text-align:right}
.st-key-sa-charts{container-type:inline-size}
@container (max-width:760px){.st-key-sa-charts [data-testid="stHorizontalBlock"]{flex-wrap:wrap}
.st-key-sa-charts [data-testid="stColumn"]{flex:1 1 100%;min-width:100%}}
@container (max-width:760px){
.st-key-sa-runs-head [data-testid="stHorizontalBlock"]{flex-wrap:wrap;gap:0 .3rem}
.st-key-sa-runs-head [data-testid="stColumn"]{flex:0 0 auto;width:auto;min-width:0;max-width:100%}
[class*="st-key-sa-run-"] [data-testid="stHorizontalBlock"]{flex-direction:column;align-items:stretch}
[class*="st-key-sa-run-"] [data-testid="stColumn"]{flex:none;width:100%}
.sa-run{grid-template-columns:repeat(auto-fill,minmax(7rem,1fr))}
.sa-run .sa-num{text-align:left}.sa-run dt{position:static;width:auto;height:auto;clip-path:none;font-size:.72rem;opacity:.75}}
.st-key-sl-step>:has([data-testid="stPageLink"]){margin:0}
.st-key-sl-step [data-testid="stPageLink-NavLink"]{margin:0;min-height:2.5rem}
.st-key-sl-marks [data-testid="stColumn"]{min-width:min(100%,19rem)}
.sa-cfg{display:grid;grid-template-columns:max-content minmax(0,1fr);gap:.2rem 1.2rem;font-size:.86rem;margin:0}
.sa-cfg dt{opacity:.75}.sa-cfg dd{margin:0;overflow-wrap:anywhere}
@media (min-width:1251px){.sa-tried{grid-template-columns:minmax(9rem,1fr) 4.8rem 3.2rem 4.2rem 4.2rem 4.4rem 4rem
minmax(0,2fr)}}
@media (max-width:1250px){.sa-wider{display:none}
.sa-grid{grid-template-columns:minmax(8rem,1fr) 4.8rem 3.2rem minmax(0,2fr)}}
@media (max-width:900px){.sa-wide{display:none}.sa-grid{grid-template-columns:minmax(0,1fr) 4.8rem}.sa-last{grid-column:1/-1}}
[data-testid^="stBaseButton-primary"]{background:#0067a5;border-color:#0067a5;color:#fff}
[data-testid^="stBaseButton-primary"]:hover{background:#00527f;border-color:#00527f;color:#fff}
@media (max-width:900px){[data-testid="stSidebar"][aria-expanded="true"]{width:13rem!important;min-width:13rem!important}
[data-testid="stColumn"]:not([class*="st-key-sa-row-"] *,.st-key-sa-head *){min-width:calc(100% - 1.5rem)}}
.sa-strip{line-height:2.1;overflow-wrap:anywhere;white-space:pre-wrap}
.sa-tokens{display:grid;grid-template-columns:minmax(5rem,max-content) minmax(0,1fr);gap:.25rem 1rem;font-size:.9rem;margin:0}
.sa-tokens dt{text-align:right;white-space:pre;overflow:hidden;text-overflow:ellipsis}.sa-tokens dd{margin:0}
.sa-dim{opacity:.8}
.sa-reasons{list-style:none;margin:0;padding:0!important;font-size:.9rem}.sa-reasons small{opacity:.8}
.sa-reasons li{margin:0;padding:.25rem 0;border-top:1px solid rgba(128,128,128,.2);overflow-wrap:anywhere}
.sa-reasons a{color:inherit;text-decoration:underline;text-underline-offset:2px}
.sa-pill{border:1px solid rgba(128,128,128,.4);border-radius:4px;padding:0 .35em;margin-right:.35em;display:inline-block}
.sa-pill small{opacity:.75}
.sa-table caption{text-align:left;padding:.3rem 0}.sa-pairs{table-layout:fixed}
.sa-pairs th,.sa-pairs td{overflow-wrap:anywhere;vertical-align:top}
.sa-pairs th.sa-of,.sa-pairs td.sa-of{text-align:left;width:34%}
"""

PAGE_STYLE = f"<style>{STYLE}{_OWN}</style>"

# Inline SVG: Streamlit would fetch a named icon from another host.
ICON = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32"><rect width="32" height="32" rx="6" fill="#0067a5"/>'
    '<path d="M7 23V19M13 23V9M19 23v-3M25 23v-9" stroke="#fff" stroke-width="3.4" stroke-linecap="round"/></svg>'
)
