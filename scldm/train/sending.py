"""Sends what a run's folder holds and other places lack: beside training, or later.

What fails here is told in a line. None of it reaches the training thread.
Reading order: Forwarder (to MLflow), Also (to another place), fail_parent, replay.
"""

from __future__ import annotations

import functools
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

from scldm.environment import without_passwords
from scldm.errors import InputError
from scldm.train import tracked
from scldm.train.follower import METRICS, Follower, say, say_once
from scldm.train.mlflow_run import Sender, cause_of, database_of
from scldm.train.tracked import TrackingConfig

OF_STAGES = "tracking"  # folder in a run's own, of stages whose folders are not theirs to write in
LONGEST_WAIT_S = 60.0  # between two tries while the server is away
# for all to reach a local database: it is there, and slow at most. srun kills a rank 120 s after another has ended
DATABASE_S = 90.0
LAST_TRIES = 3  # of a local database, which another process may hold for a moment
HURRY_S = 5.0  # for the last rows of a run that was stopped or failed: who ended it may kill what does not end soon


class _Background(threading.Thread, ABC):
    """Sends what a place lacks, beside training.

    lacks: why not all is sent
    """

    def __init__(self, name: str, cfg: TrackingConfig, close_s: float) -> None:
        super().__init__(name=name, daemon=True)  # never keeps a finished program alive
        self.cfg, self.close_s, self.closing, self.lacks = cfg, close_s, threading.Event(), ""

    def close(self, in_a_hurry: bool) -> None:
        self.closing.set()
        self.join(min(self.cfg.close_s, HURRY_S) if in_a_hurry else self.close_s)
        if self.is_alive() or self.lacks:
            say(f"not everything reached {self.left()}")

    @abstractmethod
    def left(self) -> str:
        """The place that lacks something, where it is, and what sends it."""


class Forwarder(_Background):
    """Sends to MLflow, and tries again."""

    def __init__(self, run_dir: Path, cfg: TrackingConfig, place: str) -> None:
        super().__init__("mlflow", cfg, DATABASE_S if database_of(place) else cfg.close_s)
        self.run_dir, self.place = run_dir, place
        self.uri = cfg.uri if cfg.uri != place and without_passwords(cfg.uri) == place else ""

    def left(self) -> str:
        lacks = ", ".join(tracked.unsent(self.run_dir)) or "rows of runs below"
        note = tracked.read_note(self.run_dir) or {"artifacts": []}
        replay = f"`{tracked.replay_of(self.run_dir, note)}` sends the rest"
        return f"{self.place} (it lacks {lacks}). All is in {self.run_dir}: {replay}"

    def run(self) -> None:
        while True:
            try:
                with tracked.followed_alone(self.run_dir):
                    return self._follow()
            except InputError as error:  # a replay that is not done, or an earlier process that still ends
                self.lacks = str(error)
                if self.closing.wait(0.5):
                    return None

    def _follow(self) -> None:
        sender, warned, failures, wait_s = Sender(self.run_dir, self.uri), False, 0, 0.0
        tries = LAST_TRIES if database_of(self.place) else 1
        while tries:
            last = self.closing.wait(wait_s)
            try:
                sender.send()
                self._send_below(last)
            except Exception as error:  # whatever MLflow raises: none of it may end the run
                failures, self.lacks = failures + 1, cause_of(error, self.uri or sender.uri)
                if not warned:
                    warned = True
                    say(f"MLflow at {self.place} failed: {self.lacks}. {METRICS} goes on, sent later")
            else:
                if failures:
                    say(f"MLflow at {self.place} answers again. All rows are sent")
                failures, self.lacks = 0, ""
            wait_s = min(self.cfg.every_s * 2**failures, LONGEST_WAIT_S)
            if last:
                tries = tries - 1 if self.lacks else 0

    def _send_below(self, last: bool) -> None:
        """What stages left to this process. At the end also what is left of runs below that have ended."""
        for folder in followed_in(self.run_dir if last else self.run_dir / OF_STAGES):
            stage = folder.is_relative_to(self.run_dir / OF_STAGES)
            note = None if folder == self.run_dir else tracked.read_note(folder)
            lost = last and note is not None and note["status"] == "RUNNING"
            if note is None or not (lost or tracked.unsent(folder)):
                continue
            followed = (lost or not stage) and tracked.is_followed(folder)
            if lost and not followed:
                tracked.note_end(folder, note, "KILLED")  # its process is gone, and said nothing
            if stage or not followed:
                check = functools.partial(tracked.check_trusted, [self.run_dir], self.place)
                try:
                    Sender(folder, self.uri, check).send()
                except tracked.Untrusted as error:  # which somebody else may have put there
                    say_once(folder / tracked.NOTE, str(error))


class Also(_Background):
    """Sends to another place than MLflow, each in a thread of its own: none waits for another's server."""

    def __init__(self, follower: Follower, cfg: TrackingConfig) -> None:
        super().__init__(cfg.also, cfg, cfg.close_s)
        self.follower = follower

    def left(self) -> str:
        return f"{self.name}. All is in {self.follower.folder}, and the next start there sends it"

    def run(self) -> None:
        warned, last = False, False
        while not last:
            last = self.closing.wait(self.cfg.every_s)
            try:
                self.follower.send()
                self.lacks = ""
            except Exception as error:  # whatever it raises: none of it may end the run
                self.lacks = without_passwords(str(error)) or type(error).__name__
                if not warned:
                    warned = True
                    say(f"{self.name} failed: {self.lacks}. {METRICS} goes on, sent later")


def fail_parent(folder: Path) -> None:
    """Note and send that a pipeline failed, where no process follows it and no run of a stage says so."""
    try:
        if not tracked.note_failed(folder):
            return
    except (OSError, InputError) as error:  # the failure of the stage is what is to be told
        say(f"{folder} is not noted as failed: {error}")
        return
    try:
        with tracked.followed_alone(folder):
            Sender(folder).send()
    except Exception as error:
        place = (tracked.read_note(folder) or {}).get("uri", "")
        say(f"{folder}: MLflow at {place} failed: {cause_of(error, place)}")


def replay(folder: Path, roots: Sequence[Path] | None = None) -> str:
    """Send what MLflow lacks of the run in a folder. Returns a line about it. A run whose process ended without a word
    was killed.

    roots: folders whose files may be sent, as may the run's own. None: all may

    Raises: InputError where its own process still follows it, and as `check_trusted`. Else whatever MLflow raises.
    """
    lacks = tracked.unsent(folder)
    with tracked.followed_alone(folder):
        note = tracked.read_note(folder)
        assert note is not None
        if note["status"] == "RUNNING" and not note["closed_by"]:
            tracked.note_end(folder, note, "KILLED")
            if parent := tracked.parent_of(folder, note):
                tracked.note_failed(parent)  # a stage of it is gone
            lacks = tracked.unsent(folder)
        if not lacks:
            return f"{folder}: MLflow at {note['uri']} has all"
        Sender(folder, check=functools.partial(tracked.check_trusted, roots, "")).send()
        return f"{folder}: sent {', '.join(lacks)} to {note['uri']}"


def followed_in(folder: Path) -> list[Path]:
    """The folders of the runs that are followed below a folder, a parent before its children."""
    return sorted(path.parent for path in folder.rglob(tracked.NOTE))
