"""The style sheet of what a feature is rendered as, in a notebook and in the dashboard; it works in light and dark mode."""

STYLE = """
.sl{font-family:inherit;color:inherit;line-height:1.5}
.sl-row{display:grid;grid-template-columns:5.4rem minmax(0,1fr);gap:1rem;padding:.6rem .1rem;align-items:baseline;
border-bottom:1px solid rgba(128,128,128,.22)}
.sl-row:last-child{border-bottom:0}
.sl-group{font-size:.76rem;font-weight:600;opacity:.8;padding:.7rem .1rem 0}
.sl-val{font-variant-numeric:tabular-nums;text-align:right;font-weight:600}
.sl-src{display:block;white-space:nowrap;font-weight:400;font-size:.72rem;opacity:.72}
.sl-text{overflow-wrap:anywhere;white-space:pre-wrap;font-size:.95rem;line-height:1.75}
.sl-t{border-radius:3px;padding:.1em 0;position:relative}
.sl-t:focus{outline:2px solid currentColor;outline-offset:1px}
.sl-t:is(:hover,:focus)::after{content:attr(data-v);position:absolute;bottom:105%;left:50%;transform:translateX(-50%);z-index:5;
background:#1f2328;color:#fff;border:1px solid #8b949e;border-radius:4px;padding:0 .35em;font:600 .76rem/1.5 inherit;
white-space:nowrap;pointer-events:none}
.sl-peak{outline:1.5px solid currentColor;outline-offset:0;margin:0 2px;padding:.1em 1px;font-weight:700;
text-decoration:underline;text-underline-offset:3px}
.sl-g{opacity:.8}
a.sl-src{color:inherit;text-decoration:underline;text-underline-offset:2px}
.sl-doc{grid-column:1/-1;max-height:24rem;overflow-y:auto;border:1px solid rgba(128,128,128,.4);border-radius:6px;
padding:.6rem .8rem}
.sl-window{border:2px solid currentColor;border-width:0 2px;padding:.1em 2px;scroll-initial-target:nearest}
.sl-sub{font-size:.8rem;opacity:.8;margin:.1rem 0 .5rem}
.sl-hist{padding-top:3.9rem}.sl-bars{display:grid;align-items:end;height:7rem;position:relative;
border-bottom:1px solid rgba(128,128,128,.6)}
.sl-bin{background:rgb(230,159,0);margin:0 .5px;position:relative}
.sl-neg{background:repeating-linear-gradient(135deg,rgb(86,180,233) 0 4px,transparent 4px 6px)}
.sl-bin::before{content:var(--sl-mark,"");position:absolute;bottom:100%;left:50%;transform:translateX(-50%);font-size:.8rem;
line-height:1}
.sl-tick{position:absolute;bottom:0;border-left:1px dashed currentColor;font-size:.72rem;line-height:1;white-space:nowrap}
.sl-tick span{position:absolute;top:0;left:.25rem}.sl-left span{left:auto;right:.3rem}
.sl-table,.sa-table{width:100%;border-collapse:collapse;font-size:.88rem;font-variant-numeric:tabular-nums}
:is(.sl-table,.sa-table) th{font-weight:600;font-size:.76rem;opacity:.8;text-align:right;padding:.15rem .4rem}
:is(.sl-table,.sa-table) td{text-align:right;padding:.15rem .4rem;border-top:1px solid rgba(128,128,128,.2)}
:is(.sl-table,.sa-table) :is(th,td):first-child{text-align:left;overflow-wrap:anywhere;padding-left:0}
:is(.sl-table,.sa-table) a{color:inherit;text-decoration:underline;text-underline-offset:2px}
.sl-table+.sl-table{margin-top:.8rem}
.sl-chip{border:1px solid rgba(128,128,128,.4);border-radius:4px;padding:0 .4em;font-size:.85rem;white-space:pre-wrap;
overflow-wrap:anywhere}
.sl-chip small{opacity:.75;margin-left:.4em}
.sl-q0{top:-3.8rem}.sl-q1{top:-2.9rem}.sl-q2{top:-2rem}.sl-q3{top:-1.1rem}
"""

CARD_STYLE = (
    STYLE
    + """
.sl-card{max-width:60rem;padding:1rem 1.2rem;border:1px solid rgba(128,128,128,.35);border-radius:8px;
font-family:system-ui,sans-serif;background:#fff;color:#1f2328}
@media (prefers-color-scheme:dark){.sl-card{background:#16181d;color:#e8eaed}}
.sl-card h3{margin:0;font-size:1.15rem}.sl-card h4{margin:.9rem 0 .3rem;font-size:.85rem;font-weight:600}
.sl-label{margin:.1rem 0;font-weight:600}
.sl-stats{display:flex;flex-wrap:wrap;gap:.3rem 1.6rem;margin:0;font-variant-numeric:tabular-nums}
.sl-stats div{display:flex;flex-direction:column}.sl-stats dt{font-size:.72rem;opacity:.75}
.sl-stats dd{margin:0;font-weight:600}
.sl-chips{display:flex;flex-wrap:wrap;gap:.3rem}
"""
)
