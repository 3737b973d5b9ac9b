"""Metrics of a run: always to `metrics.jsonl` in its folder, from there to MLflow.

A row is written and flushed before `log` returns. All else that MLflow is to get lies in `tracked.json` before any work
begins. A background thread sends what MLflow lacks, see sending.py. What it can't send stays in the folder: the next
verb there sends it, or `scldm track replay`. Nothing that MLflow does or fails to do reaches the training thread.

    with Tracker(run_dir, config.tracking, active=rank == 0, stage="train vae", params=asdict(config)) as tracker:
        tracker.log(step, {"loss": loss}, split="train", cells_seen=cells_seen)

Reading order: Tracker, begin_note, check_tracking, read_metrics.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from scldm.environment import check_uri, describe, without_passwords
from scldm.errors import InputError
from scldm.files import flat, write_json
from scldm.train import tracked
from scldm.train.follower import METRICS, append_row, follower_named, rows_from, say
from scldm.train.machine import Place, Sampler
from scldm.train.mlflow_run import database_uri
from scldm.train.sending import Also, Forwarder
from scldm.train.tracked import TrackingConfig

PARENT = "SCLDM_PARENT"  # variable: the folder of the run that all runs started here are nested in
ALONE = Place()


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
            self._also = Also(follower_named(cfg.also)(self.run_dir), cfg)
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
                self._forwarder = Forwarder(self.run_dir, cfg, self.note["uri"])
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
        "artifacts": [of for of in note["artifacts"] if (run_dir / of[0]).resolve().is_relative_to(run_dir.resolve())],
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


def read_metrics(run_dir: Path | str, split: str | None = None) -> list[dict[str, Any]]:
    """The rows of a run in order of steps, of one split or of all. Of a step that a resume repeated, it is the last."""
    rows = [row for some, _ in rows_from(Path(run_dir) / METRICS, 0) for row in some]
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
