"""The Jobs page through AppTest: forms, what is said before anything is sent, starting, cancelling, and jobs that ended."""

import json
import shutil
import time

import pytest
from pages import html_of
from test_jobs import run, serve, silent, under_way, until  # noqa: F401

from saelab.jobs import jobs
from saelab.jobs.job import LOG, RECORD


def shown(app):
    texts = [*app.caption, *app.markdown, *app.info, *app.error, *app.warning, *app.code]
    return " ".join(str(one.value) for one in texts).replace("\\", "")


def button(app, label):
    return next(one for one in app.button if one.label == label)


def test_a_job_is_started_shown_and_cancelled(open_page, run, silent):  # noqa: F811
    app = open_page("jobs", run, kind="label")
    assert not app.exception and "Fill in address and model" in shown(app) and "No job has been started" in shown(app)
    fields = {one.label: one for one in app.text_input}
    fields["Address"].set_value(silent.address)
    fields["Model"].set_value("m").run()
    assert f"are sent to <b>{silent.address}</b> (model m), and nowhere else" in html_of(app) and not silent.asked
    assert f"--address {silent.address} --model m --n-features" in app.code[0].value
    assert f"Endpoint('{silent.address}', 'm')" in app.code[1].value
    button(app, "Start: label features").click().run()
    (job,) = jobs(run)
    assert not app.exception and app.query_params["job"] in (job.id, [job.id])
    button(app, "Start: label features").click().run()
    assert "is at work" in shown(app) and len(jobs(run)) == 1  # refused, and said
    under_way(run, silent)
    app.run()
    assert "**running**" in shown(app) and "Labels: 0 of 96 (feature)" in app.get("progress")[0].proto.text.replace(
        "\\", ""
    )
    button(app, "Cancel").click().run()
    assert not app.exception
    until(job, "cancelled")
    app.run()
    assert "**cancelled**" in shown(app) and "kept" in shown(app)
    assert "Cancel" not in [one.label for one in app.button]


def test_what_goes_to_another_machine_has_to_be_confirmed(open_page, run):  # noqa: F811
    app = open_page("jobs", run, kind="label")
    fields = {one.label: one for one in app.text_input}
    fields["Address"].set_value("https://explainer.example/v1")
    fields["Model"].set_value("m").run()
    assert button(app, "Start: label features").disabled
    app.checkbox[0].set_value(True).run()
    assert not button(app, "Start: label features").disabled
    {one.label: one for one in app.text_input}["Address"].set_value("https://me:secret@explainer.example/v1").run()
    assert "must hold no key or password" in shown(app) and "secret" not in shown(app) + html_of(app)
    assert not any(one.label.startswith("Start") for one in app.button)
    assert not (run / "jobs").exists()


def test_every_form_shows_the_same_as_a_command(open_page, run):  # noqa: F811
    app = open_page("jobs", run)
    app.number_input[0].set_value(7).run()
    assert app.code[0].value.endswith("sae --n-examples 7") and "n_examples=7" in app.code[1].value
    app = open_page("jobs", run, kind="features")
    {one.label: one for one in app.toggle}["All held-out tokens"].set_value(False).run()
    app.number_input[0].set_value(500).run()
    {one.label: one for one in app.toggle}["Collect again what is there"].set_value(True).run()
    assert app.code[0].value.endswith("sae --n-tokens 500 --renew") and "renew=True" in app.code[1].value
    shutil.rmtree(run / "features")
    app = open_page("jobs", run)
    assert "No features have been collected for sae yet" in shown(app) and not app.error
    button(app, "Collect them").click().run()
    assert app.query_params["kind"] in ("features", ["features"]) and not app.exception


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"created": time.time() - 60}, "**ended without a result**"),
        ({"end": {"state": "failed", "time": 1.0, "text": "no <b>such</b> [model](x)"}}, "no <b>such</b> [model](x)"),
        ({"end": {"state": "done", "time": 1.0, "text": "fine"}}, "**done**"),
        ({"created": None}, "it was altered"),
    ],
)
def test_jobs_that_ended_say_how(open_page, run, fields, said):  # noqa: F811
    (folder := run / "jobs" / "20260101-000000-abcd").mkdir(parents=True)
    record = {"kind": "verify", "sae": "sae", "arguments": {}, "created": 0.0, "process": None, "end": None}
    (folder / RECORD).write_text(json.dumps(record | fields))
    (folder / LOG).write_text("first\n 10%\r 90%\rlast \u202e<script>\n")
    app = open_page("jobs", run)
    assert not app.exception and said in shown(app)
    button(app, "Log").click().run()
    assert app.query_params["job"] in (folder.name, [folder.name])
    log = app.main.code[-1].value
    assert log.startswith("first\nlast ") and "\u202e" not in log and "90%" not in log


def test_a_job_in_the_address_is_looked_up(open_page, run):  # noqa: F811
    app = open_page("jobs", run, job="../../etc/passwd")
    assert "The URL has job" in app.warning[0].value and "job" not in app.query_params
    app = open_page("jobs", run, kind="rm")
    assert "The URL has kind" in app.warning[0].value and not app.exception
