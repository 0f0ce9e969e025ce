"""The jobs of a run as cards, the newest first: state, progress, result, log, and a button to cancel. They are drawn again every
second while one is at work."""

from __future__ import annotations

import time
from pathlib import Path

import streamlit as st

from saelab.app import markdown, url
from saelab.app.job_forms import REFUSED, show_refusal
from saelab.errors import SaelabError
from saelab.features.visible import visible, visible_lines
from saelab.jobs import KINDS, Job, cancel, jobs
from saelab.jobs.control import PATIENCE
from saelab.jobs.job import ACTIVE, SILENT_SECONDS

_MOST = 20
_EVERY = 1.0
_LOST = (
    "Ended without a result: its process is gone. It was killed, ran out of memory, or the machine was restarted. Start the "
    "same job again: it goes on from what it had saved."
)
_STATES = {
    "starting": ("starting", "hourglass_empty"),
    "running": ("running", "play_circle"),
    "stopping": ("being cancelled", "pause_circle"),
    "done": ("done", "check_circle"),
    "failed": ("failed", "error"),
    "cancelled": ("cancelled", "cancel"),
    "lost": ("ended without a result", "help"),
}


def show(run: Path) -> None:
    """All jobs of a run."""
    st.subheader("Jobs of this run", divider="gray")
    found = jobs(run)
    opened = url.choice("job", "", ["", *(job.id for job in found)])
    if not found:
        st.caption("No job has been started yet.")
        return
    active = any(job.state in ACTIVE for job in found)
    st.fragment(_cards, run_every=_EVERY if active else None)(run, opened, active)


def _cards(run: Path, opened: str, active: bool) -> None:
    found = jobs(run)
    if active and not any(job.state in ACTIVE for job in found):
        st.rerun()  # the whole page: the store, or when it was verified, may have changed
    show_refusal()
    shown = [job for i, job in enumerate(found) if i < _MOST or job.id == opened]
    for job in shown:
        with st.container(border=True, key=f"sa-job-{job.id}"):
            _card(job, job.id == opened)
    if len(found) > len(shown):
        st.caption(f"{len(found) - len(shown):,} older jobs are in {markdown.plain(str(found[-1].folder.parent))}.")


def _card(job: Job, is_open: bool) -> None:
    now = job.state
    word, icon = _STATES[now]
    title = KINDS[job.kind].title if job.kind in KINDS else "Job"
    st.markdown(f":material/{icon}: **{title}** of {markdown.plain(job.sae)} \u00b7 **{word}** \u00b7 {_when(job)}")
    if now in ACTIVE:
        _progress(job)
    elif now == "lost":
        st.warning(_LOST, icon=":material/help:")
    elif job.end is not None:
        said = markdown.plain(visible(job.end.text))
        st.error(said, icon=":material/error:") if now == "failed" else st.markdown(said)
    with st.container(horizontal=True):
        if now in ACTIVE:
            _cancel_button(job, now)
        st.button(
            "Hide log" if is_open else "Log", key=f"log_{job.id}", icon=":material/article:", on_click=_open,
            args=("" if is_open else job.id,),
        )  # fmt: skip
    if is_open:
        st.code(visible_lines(job.log()) or "The log is empty.", language=None, wrap_lines=True)
        st.caption(markdown.plain(str(job.folder)))


def _cancel_button(job: Job, now: str) -> None:
    label, help_ = "Cancel", "What it has done so far is kept."
    if now == "stopping":
        label, help_ = "Kill", f"Kills the process if it has not ended {PATIENCE:.0f} s after it was cancelled."
    st.button(label, key=f"cancel_{job.id}", icon=":material/stop:", help=help_, on_click=_cancel, args=(job,))


def _cancel(job: Job) -> None:
    try:
        cancel(job)
    except SaelabError as error:
        st.session_state[REFUSED] = str(error)


def _open(job_id: str) -> None:
    if job_id:
        st.query_params["job"] = job_id
    else:
        st.query_params.pop("job", None)


def _progress(job: Job) -> None:
    said, silent = job.progress, job.silent_seconds
    if said is None:
        st.progress(0.0, "Preparing ..." if job.process else "Starting ...")
    else:
        part = min(said.done / said.total, 1.0) if said.total else 0.0
        total = f" of {said.total:,.0f}" if said.total else ""
        left = f", about {duration(said.remaining)} left" if said.remaining is not None else ""
        st.progress(part, markdown.plain(f"{said.what}: {said.done:,.0f}{total} ({said.unit}){left}"))
    if silent > SILENT_SECONDS:
        st.caption(f"No sign of life for {duration(silent)}.")


def _when(job: Job) -> str:
    started = time.strftime("%Y-%m-%d %H:%M", time.localtime(job.created))
    took = (job.end.time if job.end else time.time() if job.state in ACTIVE else None) or None
    return f"started {started}" + (f", {duration(took - job.created)}" if took else "")


def duration(seconds: float) -> str:
    """Seconds as 45 s, 12 min 5 s or 3 h 20 min."""
    total = max(round(seconds), 0)
    if total < 60:
        return f"{total} s"
    minutes, rest = divmod(total, 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
