"""Metrics of a run: always to `metrics.jsonl` in its folder, from there to MLflow.

A row is written and flushed before `log` returns. All else that MLflow is to get lies in `tracked.json` before any work
begins. A background thread sends what MLflow lacks, see mlflow_run.py. What it can't send stays in the folder: the next
verb there sends it, or `scldm track replay`. Nothing that MLflow does or fails to do reaches the training thread.

    with Tracker(run_dir, config.tracking, active=rank == 0, stage="train vae", params=asdict(config)) as tracker:
        tracker.log(step, {"loss": loss}, split="train", cells_seen=cells_seen)

Reading order: TrackingConfig, Tracker, _Forwarder, _Also, replay, read_metrics.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from scldm.checked import Checked, checked
from scldm.environment import check_uri, describe, without_passwords
from scldm.errors import InputError
from scldm.files import flat, write_json
from scldm.train import tracked
from scldm.train.follower import METRICS, Follower, append_row, follower_named, row_of, say
from scldm.train.machine import Place, Sampler
from scldm.train.mlflow_run import Sender, cause_of, database_of, database_uri

PARENT = "SCLDM_PARENT"  # variable: the folder of the run that all runs started here are nested in
OF_STAGES = "tracking"  # folder in a run's own, of stages whose folders are not theirs to write in
LONGEST_WAIT_S = 60.0  # between two tries while the server is away
# for all to reach a local database: it is there, and slow at most. srun kills a rank 120 s after another has ended
DATABASE_S = 90.0
LAST_TRIES = 3  # of a local database, which another process may hold for a moment
ALONE = Place()
HURRY_S = 5.0  # for the last rows of a run that was stopped or failed: who ended it may kill what does not end soon


@dataclass(frozen=True)
class TrackingConfig(Checked):
    """Where the metrics of a run go besides its own metrics.jsonl.

    enabled: forward to MLflow
    uri: tracking server or database. Empty means that of the parent, else $MLFLOW_TRACKING_URI, else mlflow.db in the
        run folder. A password in it is moved to that variable, and stands in no file of the run
    experiment: name of the MLflow experiment. Empty means that of the parent, else $MLFLOW_EXPERIMENT_NAME, else scldm
    run_name: name of the MLflow run. Empty means the stage's
    parent: folder of the run that this one is nested in. Empty means $SCLDM_PARENT, else none
    parent_run_id: the same by the MLflow run's id, of a run that scldm does not follow
    every_s: seconds between two forwards
    close_s: longest wait for a server at the end of the run, in seconds. It is 5 for a run that was stopped or failed.
        A local database is waited for until all is there, at most 90 s
    system_s: seconds between two samples of processor, memory and GPU of each node. 0 takes none. On more than 10
        nodes it is longer, by that number over 10
    attach: files that MLflow gets with the run, such as a protocol
    also: module:Class of a place where the run is followed too, with MLflow or without, as
        scldm.train.tensorboard:TensorBoard. See scldm/train/follower.py for one of your own
    """

    enabled: bool = True
    uri: str = ""
    experiment: str = ""
    run_name: str = ""
    parent: str = ""
    parent_run_id: str = ""
    every_s: float = checked(5.0, above=0)
    close_s: float = checked(30.0, at_least=0)
    system_s: float = checked(10.0, at_least=0)
    attach: list[str] = field(default_factory=list)
    also: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_uri("tracking.uri", self.uri)
        if self.parent and self.parent_run_id:
            raise InputError(f"tracking.parent={self.parent} and tracking.parent_run_id name two parents. Give one")
        if len({Path(path).name for path in self.attach}) < len(self.attach):
            raise InputError(f"tracking.attach={','.join(self.attach)}: two files of one name. MLflow would keep one")
        if self.also and not re.fullmatch(r"[\w.]+:\w+", self.also):
            raise InputError(f"tracking.also={self.also}: give module:Class, as scldm.train.tensorboard:TensorBoard")


class Tracker(contextlib.AbstractContextManager["Tracker"]):
    """Writes metrics and forwards them. All ranks may make one. The active one does all but to sample other nodes.

    run_dir: the run's folder. Rows are appended to its metrics.jsonl
    active: True on rank 0 alone
    place: where this rank runs
    stage: what runs, as `train vae`. The MLflow run's name where the config gives none
    params: the resolved config, nested mappings allowed. On a resume, values that differ become tags `resumed.KEY`
    tags: what else to note, besides user, command, commit, versions, host and job
    datasets: what is read, of MLflow: name, source, digest, context, profile
    started: when it did, in seconds since 1970, where that was before
    by_parent: leave the sending to the parent's process, where there is one: importing mlflow takes longer than the
        short work of some stages
    """

    def __init__(
        self,
        run_dir: Path | str,
        cfg: TrackingConfig,
        *,
        active: bool = True,
        place: Place = ALONE,
        stage: str = "",
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, Any] | None = None,
        datasets: Sequence[Mapping[str, Any]] = (),
        started: float = 0.0,
        by_parent: bool = False,
    ) -> None:
        self.run_dir = Path(run_dir)
        self.path = self.run_dir / METRICS
        self.stage = stage
        self.note: dict[str, Any] = {}
        self.parent: Path | None = None
        self._file = None
        self._forwarder = self._also = self._sampler = None
        self._alive = contextlib.ExitStack()
        self._warned = False
        if not active:
            if place.node and (cfg.enabled or cfg.also):
                self._start_sampler(cfg, place, is_first=False)
            return
        if cfg.enabled:
            uri_of_environment()  # to be refused. What fails from here on is told, and training goes on
        if cfg.also:
            self._also = _Also(follower_named(cfg.also)(self.run_dir), cfg)
        with self._reported("opening"):
            self.run_dir.mkdir(parents=True, exist_ok=True)
            drop_torn_line(self.path)
            self._file = self.path.open("ab", buffering=0)
        if self._also is not None:
            self._also.start()
            self._start_sampler(cfg, place, is_first=True)
        if not cfg.enabled:
            return
        with self._reported("opening", tracked.NOTE):
            self.note = begin_note(self.run_dir, cfg, stage, params or {}, tags, datasets, started)
            self.parent = tracked.parent_of(self.run_dir, self.note)
            for path in cfg.attach:
                self.log_artifact(path, "attached")
            self._note_parent("RUNNING")
            if by_parent and self.parent is not None and tracked.is_followed(self.parent):
                self._alive.enter_context(tracked.followed_alone(self.run_dir))
            else:
                self._forwarder = _Forwarder(self.run_dir, cfg, self.note["uri"])
                self._forwarder.start()
                self._start_sampler(cfg, place, is_first=True)

    def _start_sampler(self, cfg: TrackingConfig, place: Place, is_first: bool) -> None:
        if self._sampler is None and cfg.system_s and place.samples:
            self._sampler = Sampler(self.run_dir, place, cfg.system_s, is_first)
            self._sampler.start()

    def log(self, step: int, metrics: Mapping[str, Any], *, split: str = "train", cells_seen: int | None = 0) -> None:
        """One row: numbers (or tensors of one) by name. What is not finite is written as null.

        cells_seen: None for what is no matter of training, such as scores
        """
        if self._sampler is not None:
            self._sampler.step = int(step)
        if self._file is None:
            return
        with self._reported("writing"):
            seen = {} if cells_seen is None else {"cells_seen": int(cells_seen)}
            append_row(self._file, step, seen, metrics, split)

    def log_artifact(self, path: Path | str, folder: str = "") -> None:
        """Have a file copied to MLflow in the background, into a folder of the run's artifacts. It is copied again
        when it has changed."""
        entry = [os.path.relpath(Path(path).resolve(), self.run_dir.resolve()), folder]
        if self.note and entry not in self.note["artifacts"]:
            self.note["artifacts"].append(entry)
            self._write_note()

    def tag(self, **tags: str) -> None:
        """What is known only now, such as where the best checkpoint lies."""
        if self.note:
            self.note["tags"] |= tags
            self._write_note()

    def log_on_parent(self, metrics: Mapping[str, Any], split: str) -> None:
        """A row of the parent's, such as the scores by which pipelines are compared. Without a parent, nothing."""
        if self.parent is None or not (self.parent / tracked.NOTE).is_file():
            return
        with self._reported("writing", METRICS), (self.parent / METRICS).open("ab", buffering=0) as file:
            append_row(file, 0, {}, metrics, split)

    def close(self, status: tracked.Status = "FINISHED") -> None:
        """Note the end and forward the rest. A local database is waited for DATABASE_S at most, a server `close_s`,
        either HURRY_S for a run that did not finish. A second call does nothing."""
        if self._sampler is not None:
            self._sampler.close()
            self._sampler = None
        if self._file is not None:
            self._file.close()
            self._file = None
        if self.note:
            with self._reported("writing", tracked.NOTE):
                tracked.note_end(self.run_dir, self.note, status)
                self._note_parent(status)
            self.note = {}
            self._alive.close()
        if self._forwarder is not None:
            self._forwarder.close(in_a_hurry=status != "FINISHED")
            self._forwarder = None
        if self._also is not None:
            self._also.close(in_a_hurry=status != "FINISHED")
            self._also = None

    def _note_parent(self, status: tracked.Status) -> None:
        """A parent that no process follows is what its children are, and ends with the last of them."""
        of = tracked.read_note(self.parent) if self.parent else None
        if self.parent is None or of is None or not of["closed_by"]:
            return
        if status != "FINISHED" or self.stage == of["closed_by"]:
            tracked.note_end(self.parent, of, status)

    def _write_note(self) -> None:
        with self._reported("writing", tracked.NOTE):
            write_json(self.run_dir / tracked.NOTE, self.note)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if kind is None:
            self.close("FINISHED")
        else:
            self.close("FAILED" if issubclass(kind, Exception) else "KILLED")

    @contextlib.contextmanager
    def _reported(self, doing: str, name: str = METRICS) -> Iterator[None]:
        """Training outlives a disk that takes no metrics, and a note that is damaged: the first failure is one line."""
        try:
            yield
        except (OSError, InputError) as error:
            if not self._warned:
                self._warned = True
                say(f"{doing} {self.run_dir / name} failed ({error}). Training goes on without it")


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


class _Forwarder(_Background):
    """Sends to MLflow, and tries again."""

    def __init__(self, run_dir: Path, cfg: TrackingConfig, place: str) -> None:
        super().__init__("mlflow", cfg, DATABASE_S if database_of(place) else cfg.close_s)
        self.run_dir, self.place = run_dir, place
        self.uri = cfg.uri if cfg.uri != place and without_passwords(cfg.uri) == place else ""

    def left(self) -> str:
        lacks = ", ".join(tracked.unsent(self.run_dir)) or "rows of runs below"
        replay = f"`scldm track replay {self.run_dir}` sends the rest"
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
                Sender(folder, self.uri).send()


class _Also(_Background):
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


def uri_of_environment() -> str:
    """Raises: InputError where it can't be told what in it is a password."""
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    check_uri("MLFLOW_TRACKING_URI", uri)
    return uri


def begin_note(
    run_dir: Path,
    cfg: TrackingConfig,
    stage: str,
    params: Mapping[str, Any],
    tags: Mapping[str, Any] | None = None,
    datasets: Sequence[Mapping[str, Any]] = (),
    started: float = 0.0,
    closed_by: str = "",
) -> dict[str, Any]:
    """Write what is known when a run starts, over what an earlier start has noted. Returns the note.

    closed_by: of a pipeline, which no process follows: the stage that is its last
    """
    given = cfg.parent or ("" if cfg.parent_run_id else os.environ.get(PARENT, ""))
    parent = Path(given).resolve() if given else None
    parent = None if parent == run_dir.resolve() else parent
    above = (tracked.read_note(parent) if parent else None) or {}
    environment = without_passwords(uri_of_environment())
    own = database_uri((run_dir / "mlflow.db").resolve())
    place = without_passwords(cfg.uri) or above.get("uri") or environment or own
    experiment = cfg.experiment or above.get("experiment") or os.environ.get("MLFLOW_EXPERIMENT_NAME") or "scldm"
    note = tracked.read_note(run_dir) or tracked.new_note(place, experiment, cfg.run_name or stage or run_dir.name)
    first, now = note["params"], _texts(params)
    note["started"] = min(note["started"], started or note["started"])
    note |= {
        "uri": place,
        "parent": os.path.relpath(parent, run_dir.resolve()) if parent else "",
        "params": {**now, **first},
        "resumed": note["resumed"] | {k: v for k, v in now.items() if first.get(k, v) != v},
        "tags": note["tags"] | about_start(stage) | _texts(tags or {}),
        "datasets": list(datasets) or note["datasets"],
        "closed_by": closed_by,
    }
    if cfg.parent_run_id:
        note["tags"]["mlflow.parentRunId"] = cfg.parent_run_id
    run_dir.mkdir(parents=True, exist_ok=True)
    tracked.note_end(run_dir, note, "RUNNING")
    return note


def check_tracking(cfg: TrackingConfig, run_dir: Path) -> None:
    """What a Tracker would refuse or lack, before anything is computed.

    Raises: InputError for a class of `also` or a URI that is none, and for a file of `attach` that is not there when a
    run begins. A resume goes on without it.
    """
    if cfg.also:
        follower_named(cfg.also)
    if cfg.enabled:
        uri_of_environment()
    missing = [path for path in cfg.attach if not Path(path).is_file()]
    if missing and not (run_dir / "config.json").is_file():
        raise InputError(f"tracking.attach={','.join(missing)}: no such file")
    if missing:
        say(f"tracking.attach={','.join(missing)}: gone since the run began. The run goes on")


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


def about_start(stage: str) -> dict[str, str]:
    """Who started what where, as MLflow's own tags where it has such. Its UI shows of a source what follows the last
    slash, so that is no place for a command."""
    here = describe()
    commit = here["git"] or ""
    tags = {
        "mlflow.source.name": f"scldm {stage}" if stage else "",
        "command": here["command"],
        "mlflow.source.type": "JOB" if here["slurm_job"] else "LOCAL",
        "mlflow.source.git.commit": commit.removesuffix("-dirty"),
        "git.dirty": str(commit.endswith("-dirty")).lower() if commit else "",
        "hosts": os.environ.get("SLURM_JOB_NODELIST") or here["host"],
        "slurm.job": here["slurm_job"] or "",
        "slurm.restarts": os.environ.get("SLURM_RESTART_COUNT", "0") if here["slurm_job"] else "",
        "python": here["python"],
        **{f"version.{name}": version for name, version in here["versions"].items()},
    }
    with contextlib.suppress(OSError, KeyError):  # a user without a name, as in some containers
        tags["mlflow.user"] = getpass.getuser()
    return {key: value for key, value in tags.items() if value}


def replay(folder: Path) -> str:
    """Send what MLflow lacks of the run in a folder. Returns a line about it. A run whose process ended without a word
    was killed.

    Raises: InputError where its own process still follows it. Else whatever MLflow raises.
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
        Sender(folder).send()
        return f"{folder}: sent {', '.join(lacks)} to {note['uri']}"


def followed_in(folder: Path) -> list[Path]:
    """The folders of the runs that are followed below a folder, a parent before its children."""
    return sorted(path.parent for path in folder.rglob(tracked.NOTE))


def read_metrics(run_dir: Path | str, split: str | None = None) -> list[dict[str, Any]]:
    """The rows of a run in order of steps, of one split or of all. Of a step that a resume repeated, it is the last."""
    path = Path(run_dir) / METRICS
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    rows = [row for line in lines if line.endswith(b"\n") and (row := row_of(line, path)) is not None]
    last = {(row["step"], row["split"]): row for row in rows if split in (None, row["split"])}
    return [last[key] for key in sorted(last)]


def drop_torn_line(path: Path) -> None:
    """Cut what a killed writer left of a last row that it did not finish."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        data = file.read()
        file.truncate(data.rfind(b"\n") + 1)


def _texts(params: Mapping[str, Any]) -> dict[str, str]:
    """Dotted keys and texts of a nested mapping, as MLflow allows them: its longest value has 6,000 characters."""
    return {re.sub(r"[^/\w.\- :]", "_", key): str(value)[:6000] for key, value in flat(params)}
