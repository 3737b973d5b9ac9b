"""What a job notes about itself, as its steps and `scldm submit` write it, read back.

job.json     id, name and words of the job that was submitted last
job.sbatch   its script
log.txt      the one log of all its ranks and starts (log-TASK.txt in an array)
state        state, job, time, restarts, reason (state.TASK in an array)
history      a line for every start, stop (by Slurm or a signal) and failure: how far the work was. Where another job
             goes on, a line with its number
bad_nodes    nodes that were found unfit, with the reason. preflight.json has its last report, and what to run on
late_nodes   nodes that did not come up in time once. The second time they are unfit
preflight    folder of files that nodes leave there in a preflight. A store would not do: they show that the notes are
             shared, and a rank that can't reach the store tells by its file that it came up
image        the nodes that the container's image has come to (image.TASK in an array)
failure      exit code and error of the rank that failed first (failure.TASK in an array)
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from launch.cluster import commands as slurm
from scldm.errors import InputError, read_json
from scldm.given_json import PathText, read_known, typed

BAD_NODES, LATE_NODES, CAME, REPORT, IMAGE = "bad_nodes", "late_nodes", "preflight", "preflight.json", "image"
ENDED = ("DONE", "STOPPED", "LOST", "NOT SUBMITTED", *slurm.ENDED)  # by the job's own word, by nobody's, by Slurm's


class State(NamedTuple):
    """state: of Slurm while it knows the job as waiting or running, else the job's own last word"""

    state: str
    job: str
    reason: str


def with_run(words: Sequence[str]) -> list[str]:
    """A command line whose first word is the folder."""
    named = bool(words) and "=" not in words[0] and not words[0].startswith("--")
    return [f"run={words[0]}", *words[1:]] if named else list(words)


def find_notes(path: Path) -> list[Path]:
    """The notes of a run folder, of a pipeline's folder (one for every job, in their order), or of what a verb made.

    Raises: InputError where there are none.
    """
    for place in (path / "slurm", Path(f"{path}.slurm"), path.parent / "slurm" / path.name, path):
        if (place / "job.json").is_file() or any(place.glob("history*")):  # by submit, or sbatch
            return [place]
        if (place / "chain.json").is_file():
            chain = place / "chain.json"
            return [Path(folder) for folder in typed(list[PathText], read_json(chain), str(chain))]
    raise InputError(f"{path}: no job was submitted for it. `scldm submit` notes its jobs in the folder of the run")


@dataclass(frozen=True)
class _Job:
    """job.json, which holds more."""

    id: str


def submitted(notes: Path) -> str:
    """The number of the job that was submitted last. Raises: InputError where it is not noted."""
    return read_known(_Job, notes / "job.json").id


def state_of(notes: Path) -> State:
    """The state of the job that was submitted last."""
    told = [path.read_text(errors="replace").strip("\n").split("\t") for path in sorted(notes.glob("state*"))]
    told = [line for line in told if len(line) == 5]
    if (notes / "job.json").is_file():
        job = submitted(notes)
    elif told:  # by sbatch
        job = told[0][1]
    else:
        return State("NOT SUBMITTED", "", "")
    try:
        known = slurm.job_state(job) if slurm.is_here() else None
    except InputError as error:
        return State("UNKNOWN", job, str(error))
    worst = min(told, key=lambda line: _ORDER.index(line[0]) if line[0] in _ORDER else 0, default=None)
    if known and known[0] not in slurm.ENDED:
        return State(known[0], job, known[1] if known[0] == "PENDING" else (worst[4] if worst else ""))
    if worst and worst[0] not in ("RUNNING", "REQUEUED"):
        return State(worst[0], job, worst[4])
    if known and known[1] == "JobLaunchFailure":
        return State(known[0], job, f"Slurm could not open the log in {notes}: is its folder seen from every node?")
    if known and known[0] != "COMPLETED":
        return State(known[0], job, known[1] if known[1] != "None" else "")
    if not known and (past := slurm.accounted(job)):
        return State(past[0], job, f"by Slurm's accounting, {past[1]}. Its script could not say why it ended")
    return State("LOST", job, "Slurm no longer knows the job, and its script could not say why it ended")


# of the tasks of an array, the state to show
_ORDER = ("FAILED", "TIMEOUT", "CANCELLED", "STOPPED", "REQUEUED", "RUNNING", "DONE")


def nodes_in(path: Path) -> dict[str, tuple[str, str]]:
    """Node -> when and why it was noted. A line that is not whole, as where a disk was full, is passed over."""
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    rows = [line.split("\t", 2) for line in lines]
    return {row[0]: (row[1], row[2]) for row in rows if len(row) == 3}


def bad_nodes(notes: Path) -> dict[str, str]:
    """Node -> why an earlier preflight of this run named it."""
    return {node: why for node, (_, why) in nodes_in(notes / BAD_NODES).items()}


def note_nodes(path: Path, why: Mapping[str, str]) -> None:
    with path.open("a") as file:
        file.writelines(f"{node}\t{time.strftime('%Y-%m-%d %H:%M:%S')}\t{told}\n" for node, told in why.items())


def leave_word(notes: Path, node: str) -> None:
    """By a file: this node came up in this preflight, and writes the job's notes."""
    (notes / CAME).mkdir(parents=True, exist_ok=True)
    (notes / CAME / node).write_text(_this_step())


def left_word(notes: Path, node: str, within_s: float) -> bool:
    """A network file system may show a new file a moment later."""
    until = time.monotonic() + within_s
    while True:
        try:
            if (notes / CAME / node).read_text() == _this_step():
                return True
        except OSError:
            pass
        if time.monotonic() > until:
            return False
        time.sleep(0.1)


def _this_step() -> str:
    names = ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_STEP_ID")
    return ".".join(os.environ.get(name, "0") for name in names)
