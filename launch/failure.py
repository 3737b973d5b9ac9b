"""Why a process failed, left for the job whose step it is."""

from __future__ import annotations

import os
import traceback
from contextlib import suppress
from types import TracebackType


def note_failure(code: int, why: str, where: TracebackType | None = None) -> None:
    """Leave word for the job (cluster/job_steps.py), in its file SCLDM_FAILURE: the first rank to fail does.

    The others srun then ends by signals, and returns those. What is raised within a collective is none of this rank's
    failures: another rank is gone, which may have been killed.
    """
    path = os.environ.get("SCLDM_FAILURE")
    files = [frame.filename for frame in traceback.extract_tb(where)]
    if not path or any("/torch/distributed/" in file for file in files):
        return
    told = " ".join(f"rank {os.environ.get('SLURM_PROCID', 0)} on {os.uname().nodename}: {why}".split())
    with suppress(OSError), open(path, "x") as file:
        file.write(f"{code}\t{told[:500]}\n")
