"""`python -m saelab.jobs FOLDER`: does the job in that folder. `saelab.jobs.start` makes the folder and runs this."""

import sys
from pathlib import Path

from saelab.jobs.worker import work

if __name__ == "__main__":
    sys.exit(work(Path(sys.argv[1])) if len(sys.argv) == 2 else "usage: python -m saelab.jobs FOLDER")
