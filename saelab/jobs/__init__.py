"""Long work on a RUN as processes of their own, which outlive the page and the dashboard that started them.

`start(run, "sae", Verify())` makes `jobs/ID/` in the RUN: `job.json` (what is asked, which process does it, how it ended),
`progress.jsonl` (a line every second or so, and one in ten seconds at least, by which a lost process is noticed) and `log.txt`.
`jobs(run)` reads them, `cancel` ends one. Imports no torch.
"""

from saelab.jobs.control import cancel, start
from saelab.jobs.job import Job, jobs
from saelab.jobs.kinds import KINDS, Collect, Kind, Label, Verify

__all__ = ["KINDS", "Collect", "Job", "Kind", "Label", "Verify", "cancel", "jobs", "start"]
