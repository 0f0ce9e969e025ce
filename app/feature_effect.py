"""What a feature does: measured by zeroing it at its examples, on demand and kept; by its decoder row, below the fold."""

from __future__ import annotations

import streamlit as st

from saelab.app import markdown, state
from saelab.errors import StoreError
from saelab.features import Feature
from saelab.features.effect import effect_html, not_measurable, summary
from saelab.features.numbers import number, percent, signed
from saelab.features.records import PromotedToken
from saelab.features.visible import chip_text, escape


def show(feature: Feature) -> None:
    """Show what was measured, or a button that measures it."""
    st.subheader("Measured effect")
    if reason := not_measurable(feature.store.manifest):
        st.caption(markdown.plain(reason))
        return
    if not feature.n_fired:
        st.caption("It never fired, so there is no example to zero it at.")
        return
    with state.friendly_errors():
        effect = feature.effect()
        if effect is None:
            st.caption(
                "How predictions change when the feature is zeroed at its strongest examples and all else is kept. Loads the "
                "model; the result is kept in the run."
            )
        else:
            st.caption(markdown.plain(summary(effect)))
            st.html(effect_html(effect))
        if st.button("Measure" if effect is None else "Measure again", icon=":material/science:", key="measure"):
            _measure(feature)
            st.rerun()


def _measure(feature: Feature) -> None:
    """Measure and keep the effect, one session at a time."""
    from saelab.features.measuring import measure_effect

    bar = st.progress(0.0, "Waiting for the model")
    with state.MODEL_LOCK:
        bar.progress(0.0, "Loading the model")
        lm = state.load_model(feature.store.manifest["model"]["name"])
        bar.progress(0.0, "Measuring")
        measured = measure_effect(feature, lm, on_example=lambda n, of: bar.progress(n / of, f"Example {n} of {of}"))
    bar.empty()
    feature.keep_effect(measured)


def show_shares(feature: Feature) -> None:
    """Show the heads or sources that the decoder row belongs to; nothing for most SAEs."""
    try:
        heads, sources = feature.head_shares, feature.source_norms
    except StoreError as error:
        st.caption(markdown.plain(str(error)))
        return
    if heads is not None:
        st.subheader("Attention heads")
        st.caption("Each head's share of the decoder row: the norm of its part over the sum of these norms.")
        largest = sorted(enumerate(heads), key=lambda head: -head[1])
        st.html(_bars("Head", [(str(head), share, percent(share)) for head, share in largest]))
    if sources is not None:
        st.subheader("Sources")
        st.caption(
            "Norms of its decoder rows, in units in which each source has the same mean square, and shares of their sum."
        )
        rows = [(one["source"], one["share"], f"{number(one['norm'])} ({percent(one['share'])})") for one in sources]
        st.html(_bars("Source", rows))


def _bars(head: str, rows: list[tuple[str, float, str]]) -> str:
    cells = "".join(
        f'<tr><td>{escape(name)}</td><td><div class="sa-bar"><span>{value}</span><i><b style="width:{100 * share:.1f}%"></b></i>'
        "</div></td></tr>"
        for name, share, value in rows
    )
    return f'<table class="sa-table"><tr><th>{head}</th><th>Share</th></tr>{cells}</table>'


def show_promoted(feature: Feature) -> None:
    """Show the tokens that the decoder row promotes."""
    with st.expander("Tokens that its decoder row promotes"):
        promoted = feature.promoted
        if not promoted.positive:
            st.caption("No direct path from this hook to the logits.")
            return
        end = " towards its negative end" if feature.sign == -1 else ""
        st.caption(
            "The direct effect of the decoder row on the logits, past all later layers: logit change per unit along it"
            f"{end}, and its z-score among all features, by which the tokens are ordered. In an early or middle layer it says "
            "little; what the feature does is the measured effect."
        )
        for name, tokens in zip(("Promotes", "Suppresses"), promoted, strict=True):
            st.html(_token_rows(name, tokens))


def _token_rows(name: str, tokens: list[PromotedToken]) -> str:
    rows = "".join(
        f'<tr><td><bdi class="sl-chip">{chip_text(token.text)}</bdi></td><td>{signed(token.z, 1)}</td>'
        f"<td>{signed(token.logit, 2)}</td></tr>"
        for token in tokens
    )
    return f'<table class="sl-table"><tr><th>{name}</th><th>z-score</th><th>Logit change</th></tr>{rows}</table>'
