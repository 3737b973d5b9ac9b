"""The words that nodes leave for one another in the notes of a job: small files, each with the name of this very step.

Nothing here imports torch: a rank leaves its first word before that is read. Reading order: leave, is_seen.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

BEGUN = "begun"  # folder: a node is there whose first rank began
CAME = "preflight"  # folder: one whose first rank came up, and reached its folders


def token() -> str:
    return (
        f"{os.environ.get('SLURM_JOB_ID')}.{os.environ.get('SLURM_RESTART_COUNT', 0)}.{os.environ.get('SLURM_STEP_ID')}"
    )


def leave(notes: Path, name: str, folder: str = CAME) -> None:
    (notes / folder).mkdir(parents=True, exist_ok=True)
    (notes / folder / name).write_text(token())


def is_seen(notes: Path, name: str, within_s: float, folder: str = CAME) -> bool:
    """A network file system may show a new file a moment later."""
    until = time.monotonic() + within_s
    while True:
        try:
            if (notes / folder / name).read_text() == token():
                return True
        except OSError:
            pass
        if time.monotonic() > until:
            return False
        time.sleep(0.1)
