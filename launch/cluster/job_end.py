"""How one start of a Slurm job ends: done, failed, back to the queue, or handed on to a new job. It is noted too.

What Slurm does (preemption, a lost node, a requeue) never ends a job. Failures of its own do, some in a row without
progress. Before anything is called a failure, Slurm is asked.

Reading order: StartedJob.
"""

from __future__ import annotations

import glob
import math
import os
import re
import select
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import NoReturn

from launch.cluster import commands as slurm
from scldm.environment import without_passwords
from scldm.errors import InputError, read_json
from scldm.files import write_json, written_aside
from scldm.train.tracked import note_failed

LATE_S = 90  # Slurm sends the signal before the time limit up to a minute too soon


def seconds_until(time_of_slurm: str) -> float:
    """Seconds from now. They have no end where Slurm does not know the time."""
    try:
        return (datetime.fromisoformat(time_of_slurm) - datetime.now()).total_seconds()
    except ValueError:
        return math.inf


class StartedJob:
    """One start of one job, or of one task of an array.

    unheard: whether there was a signal that no step was told of yet
    stopping: whether there was any
    keeper: a step that removes what is staged once this process lets go of its stdin, or is gone
    """

    def __init__(self, settings: Mapping[str, str], trains: bool) -> None:
        self.settings, self.trains, self.id = settings, trains, settings["SLURM_JOB_ID"]
        task = settings.get("SLURM_ARRAY_TASK_ID", "")
        self.part = f".{task}" if task else ""  # tasks of an array keep their notes apart
        # one task has the id of the whole array as its own
        self.me = f"{settings['SLURM_ARRAY_JOB_ID']}_{task}" if task else self.id
        self.restart = int(settings.get("SLURM_RESTART_COUNT", 0))
        self.max_failures, self.warn_s = int(settings["SCLDM_MAX_FAILURES"]), int(settings["SCLDM_WARN_S"])
        self.made, self.notes = settings["SCLDM_MADE"], Path(settings["SCLDM_NOTES"])
        self.unheard = self.stopping = False
        self.keeper: subprocess.Popen[bytes] | None = None

    def listen(self, within_s: float = 0.0) -> None:
        """Take up the signals that the script wrote down. It waits so long for one."""
        if select.select([0], [], [], within_s)[0]:
            if not os.read(0, 4096):
                raise SystemExit(1)  # the script is gone, and with it the job
            self.unheard = self.stopping = True

    def clean_up(self) -> None:
        keeper, self.keeper = self.keeper, None
        if keeper is None or keeper.stdin is None:
            return
        keeper.stdin.close()
        try:
            keeper.wait(60)
        except subprocess.TimeoutExpired:
            self.say("what was staged may still lie on a node. The next job that stages there removes it")

    def end(self, code: int, state: str, reason: str = "") -> NoReturn:
        self.note(state, reason)
        self.clean_up()
        if code and state not in ("REQUEUED", "STOPPED") and (parent := self.settings.get("SCLDM_PARENT")):
            with suppress(OSError, InputError):  # MLflow's is no reason for another end
                note_failed(Path(parent))
        for number, name in self.waiting() if code else ():
            self.say(f"job {number} ({name}) depends on this one and will not run")
        raise SystemExit(code)

    def fail(self, why: str, code: int = 1) -> NoReturn:
        self.heed(why)
        self.end(code, "FAILED", why)

    def retry(self, why: str) -> NoReturn:
        """Back to the queue after a failure that another start may be spared, unless that leads nowhere."""
        self.heed(why)
        now = self.progress()
        n = 1 + self.failures_at(now)
        if n >= self.max_failures:
            self.end(1, "FAILED", f"stopped by {why}: {n} failures without progress (still at {now})")
        self.go_back("failure", why, now)

    def requeue(self, when: str = "") -> NoReturn:
        """Back to the queue after a signal. At the time limit that is the job's own matter."""
        self.heed(f"a signal {when}".strip())
        if seconds_until(self.ask().get("EndTime", "")) < self.warn_s + LATE_S:
            self.retry(f"the time limit {when}".strip())
        self.go_back("stop", f"a signal {when}".strip(), self.progress())

    def heed(self, why: str) -> None:
        """Where it is Slurm that ends this start, say so: what it takes away from a job looks like a failure of it."""
        told = self.ask()
        self.end_with(told, why)
        preempted = told.get("PreemptTime", "")
        if preempted[:1].isdigit() and preempted >= told.get("StartTime", ""):  # within the time of grace of this start
            self.go_back("stop", f"preemption ({why})", self.progress())

    def go_back(self, event: str, why: str, now: str) -> NoReturn:
        """The requeue itself."""
        self.note_progress(event, now)
        said = False
        for pause_s in (1, 2, 4, 8, 16):  # Slurm's controller may be away for a moment
            told = self.ask()
            if told.get("JobState") == "PENDING" and said:
                raise SystemExit(0)  # it did take the requeue, and could not say so
            self.end_with(told, f"{why}, at {now}")
            if told.get("Requeue") == "0":
                self.hand_on(why, now)
            if not said:  # before the requeue, which ends this process
                said = True
                self.note("REQUEUED", f"by {why}, at {now}")
                self.clean_up()
            try:
                slurm.call("scontrol", "requeue", self.me)
            except InputError as error:
                self.say(f"Slurm did not take the requeue ({error}). It is asked once more in {pause_s} s")
                time.sleep(pause_s)
            else:
                self.listen(600)  # until Slurm ends it
                raise SystemExit(0)
        self.end(1, "FAILED", f"stopped by {why}, and Slurm refused the requeue")

    def hand_on(self, why: str, now: str) -> NoReturn:
        """Where Slurm lets this job not requeue, submit its script again. What waits for this job then waits for it."""
        script, job = self.notes / "job.sbatch", self.notes / "job.json"
        if self.part or not job.is_file():
            self.end(1, "FAILED", f"stopped by {why}, at {now}: Slurm lets this job not requeue. Submit it again")
        waiting = self.waiting()  # before the new job does too
        number = slurm.sbatch(script, f"--dependency=afterany:{self.id}")
        self.note_progress("next", number)
        write_json(job, {**read_json(job), "id": number})
        code, failed = 0, ""
        for one, name in waiting:
            try:
                slurm.call("scontrol", "update", f"jobid={one}", f"dependency=afterok:{number}")
            except InputError as error:  # it must not run now
                code, failed = 1, f", and {name} does not wait for it ({error})"
        self.end(code, "REQUEUED", f"as job {number}, by {why}, at {now}: Slurm lets this one not requeue{failed}")

    def end_with(self, told: Mapping[str, str], why: str) -> None:
        """End this start where Slurm has ended it: requeued, cancelled, or at the time limit."""
        state = told.get("JobState", "")
        if int(told.get("Restarts", 0)) > self.restart:  # as after preemption and a lost node
            self.note_progress("stop", self.progress())
            self.end(0, "REQUEUED", f"by Slurm ({why})")
        if state == "COMPLETING":  # it has an end, and does not say which
            state = "TIMEOUT" if told.get("Reason") == "TimeLimit" else "CANCELLED"
        if state in slurm.ENDED:
            self.end(1, state, f"by Slurm ({why})")

    def ask(self) -> dict[str, str]:
        """What Slurm says of the job, by its names. It is empty where Slurm does not answer."""
        try:
            told = slurm.call("scontrol", "--oneliner", "show", "job", self.me)
        except InputError:
            return {}
        return dict(re.findall(r"(\w+)=(\S*)", told))

    def waiting(self) -> list[tuple[str, str]]:
        """Number and name of the jobs that depend on this one."""
        told = ""
        with suppress(InputError):
            told = slurm.call("squeue", "--me", "--noheader", "--states=PD", "--format=%A %j %E")
        job = self.settings.get("SLURM_ARRAY_JOB_ID") or self.id
        lines = [line.split(maxsplit=2) for line in told.splitlines() if line.count(" ") > 1]
        return [(number, name) for number, name, on in lines if re.search(rf"[:,]{job}(\D|$)", on)]

    # --- notes ------------------------------------------------------------------------------------------------------

    def progress(self) -> str:
        """How far the work is: the step of the last whole checkpoint, or the number of files made."""
        if self.trains:
            latest = Path(self.made, "checkpoints", "latest")
            return (latest.read_text().strip().removeprefix("step-").lstrip("0") if latest.is_file() else "") or "0"
        made, n = Path(self.made), 0
        for place in (made, *made.parent.glob(f"{glob.escape(made.name)}.*")):
            n += place.is_file()
            for folder, _, files in os.walk(place):
                n += 0 if Path(folder).is_relative_to(self.notes) else len(files)
        return str(n)

    def failures_at(self, progress: str) -> int:
        """How often in a row this job, or those that handed on to it, has failed since it came so far."""
        path = self.notes / f"history{self.part}"
        n, chain = 0, {self.id}
        for event, job, _, at in reversed([line.split("\t") for line in path.read_text(errors="replace").splitlines()]):
            if event == "next" and at in chain:
                chain.add(job)
            elif event != "next" and job in chain:
                if at != progress:
                    break
                n += event == "failure"
        return n

    def note_progress(self, event: str, progress: str) -> None:
        with (self.notes / f"history{self.part}").open("a") as file:
            file.write(f"{event}\t{self.id}\t{self.restart}\t{progress}\n")

    def note(self, state: str, reason: str) -> None:
        """What `scldm status` shows."""
        reason, now = without_passwords(" ".join(reason.split())), time.strftime("%Y-%m-%d %H:%M:%S")
        with written_aside(self.notes / f"state{self.part}") as file:
            file.write(f"{state}\t{self.id}\t{int(time.time())}\t{self.restart}\t{reason}\n".encode())
        self.say(f"{state}{': ' if reason else ''}{reason}", now)

    def say(self, what: str, now: str = "") -> None:
        print(f"{now or time.strftime('%Y-%m-%d %H:%M:%S')} job {self.id}: {what}", flush=True)
