"""Metrics of a run: always to `metrics.jsonl` in its folder, from there to MLflow, which is known here alone.

A row is written and flushed before `log` returns. A background thread forwards complete rows by `log_batch` and notes
in `mlflow_run.json` how far it came, so that what a server missed is sent when it answers again, or when the run
resumes. Nothing that MLflow does or fails to do reaches the training thread; what it costs there is one line of JSON.

    with Tracker(run_dir, config.tracking, active=rank == 0, stage="train vae", params=asdict(config)) as tracker:
        tracker.log(step, {"loss": loss}, split="train", cells_seen=cells_seen)

Reading order: TrackingConfig, Tracker, _Forwarder, _create_database, read_metrics.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import sqlite3
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal
from urllib.parse import quote, unquote

from scldm.checked import Checked, checked
from scldm.environment import without_passwords
from scldm.files import flat, write_json, written_aside

METRICS = "metrics.jsonl"
STATE = "mlflow_run.json"

ROWS_AT_ONCE = 200  # rows forwarded between two notes of how far; at 20 metrics a row 4 requests
METRICS_PER_BATCH, PARAMS_PER_BATCH = 1_000, 100  # MLflow's own limits of one log_batch
LONGEST_WAIT_S = 60.0  # between two tries while the server is away
HURRY_S = 5.0  # for the last rows of a run that was stopped or failed: who ended it may kill what does not end soon
# A server that is gone would block one call for minutes by default; none of ours for more than some seconds.
# What the user has set stays.
MLFLOW_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "3",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_JITTER": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_SQLALCHEMYSTORE_POOLCLASS": "QueuePool",  # as SQLAlchemy has by itself for all but SQLite in memory
}

Status = Literal["FINISHED", "FAILED", "KILLED"]


@dataclass(frozen=True)
class TrackingConfig(Checked):
    """Where the metrics of a run go besides its own metrics.jsonl.

    enabled: forward to MLflow
    uri: tracking server or database; empty means $MLFLOW_TRACKING_URI, else mlflow.db in the run folder. A password in
        it is moved to that variable, and stands in no file of the run
    experiment: name of the MLflow experiment
    run_name: name of the MLflow run; empty means the stage's
    parent_run_id: MLflow run that this one is nested in; empty for none
    every_s: seconds between two forwards
    close_s: longest wait for the last rows at the end of the run, in seconds; of one that was stopped or failed, 5
    """

    enabled: bool = True
    uri: str = ""
    experiment: str = "scldm"
    run_name: str = ""
    parent_run_id: str = ""
    every_s: float = checked(5.0, above=0)
    close_s: float = checked(30.0, at_least=0)


class Tracker:
    """Writes metrics and forwards them. All ranks may make one; only the active one does anything.

    run_dir: the run's folder; metrics.jsonl in it is appended to
    active: True on rank 0 alone
    stage: what runs, as `train vae`; the MLflow run's name where the config gives none
    params: the resolved config, nested mappings allowed. On a resume, values that differ become tags `resumed.KEY`
    tags: what else to note once, as the git commit
    """

    def __init__(
        self,
        run_dir: Path | str,
        cfg: TrackingConfig,
        *,
        active: bool = True,
        stage: str = "",
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, Any] | None = None,
    ) -> None:
        self.run_dir = Path(run_dir)
        self.path = self.run_dir / METRICS
        self._file = None
        self._forwarder = None
        self._warned = False
        if not active:
            return
        with self._reported("opening"):
            self.run_dir.mkdir(parents=True, exist_ok=True)
            drop_torn_line(self.path)
            self._file = self.path.open("ab", buffering=0)
        if cfg.enabled:
            all_tags = {k: str(v) for k, v in (tags or {}).items()}
            self._forwarder = _Forwarder(self.run_dir, cfg, stage, _texts(params or {}), all_tags)
            self._forwarder.start()

    def log(self, step: int, metrics: Mapping[str, Any], *, split: str = "train", cells_seen: int = 0) -> None:
        """One row: numbers (or tensors of one) by name. What is not finite is written as null."""
        if self._file is None:
            return
        row = {"step": int(step), "cells_seen": int(cells_seen), "time": round(time.time(), 3), "split": split}
        line = json.dumps(row | {name: _number(value) for name, value in metrics.items()}) + "\n"
        with self._reported("writing"):
            data = line.encode()
            end = self._file.seek(0, os.SEEK_END)
            if self._file.write(data) != len(data):  # a full disk takes a part: no half row may stay
                self._file.truncate(end)
                raise OSError("no space left")

    def log_artifact(self, path: Path | str, folder: str = "") -> None:
        """Have a file copied to MLflow in the background, into a folder of the run's artifacts."""
        if self._forwarder is not None:
            self._forwarder.artifacts.append((Path(path), folder))

    def run_id(self, timeout_s: float = 60.0) -> str:
        """The MLflow run's id, as a child's `parent_run_id`; empty where there is none within the time."""
        if self._forwarder is None:
            return ""
        self._forwarder.begun.wait(timeout_s)
        return self._forwarder.run_id

    def close(self, status: Status = "FINISHED") -> None:
        """Forward the rest and end the MLflow run, waiting at most `close_s`, or HURRY_S for a run that did not finish.
        A second call does nothing."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._forwarder is not None:
            self._forwarder.close(status)
            self._forwarder = None

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if kind is None:
            self.close("FINISHED")
        else:
            self.close("FAILED" if issubclass(kind, Exception) else "KILLED")

    @contextlib.contextmanager
    def _reported(self, doing: str) -> Iterator[None]:
        """Training outlives a disk that takes no metrics: the first failure is one line."""
        try:
            yield
        except OSError as error:
            if not self._warned:
                self._warned = True
                _say(f"{doing} {self.path} failed ({error}); training goes on without these rows")


class _Forwarder(threading.Thread):
    """The background thread: starts or resumes the MLflow run, forwards rows, tries again, ends the run."""

    def __init__(self, run_dir: Path, cfg: TrackingConfig, stage: str, params: dict, tags: dict) -> None:
        super().__init__(name="mlflow", daemon=True)  # never keeps a finished program alive
        self.run_dir, self.cfg, self.params, self.tags = run_dir, cfg, params, tags
        self.run_name = cfg.run_name or stage or run_dir.name
        database = database_uri((run_dir / "mlflow.db").resolve())
        given = os.environ.get("MLFLOW_TRACKING_URI", "")
        # a password is in the environment alone: of the same server, its URI is the one with it
        self.uri = given if given and cfg.uri in ("", without_passwords(given)) else cfg.uri or database
        self.place = without_passwords(self.uri)
        self.artifacts: list[tuple[Path, str]] = []
        self.begun = threading.Event()  # the run id is known, or the first try failed
        self.closing = threading.Event()
        self.status: Status = "FINISHED"
        self.run_id = ""
        self.sent_bytes = 0
        self.client: Any = None
        self.failures = 0
        self.last_error = ""

    def close(self, status: Status) -> None:
        self.status = status
        self.closing.set()
        self.join(self.cfg.close_s if status == "FINISHED" else min(self.cfg.close_s, HURRY_S))
        if self.is_alive() or self.last_error:
            _say(f"not everything reached {self.place}; the rest is in {self.run_dir / METRICS}, sent on a resume")

    def run(self) -> None:
        warned = False
        while True:
            last = self.closing.is_set()
            try:
                self._forward_all(last)
            except Exception as error:  # whatever MLflow raises: none of it may end the run
                self.failures, self.last_error = self.failures + 1, self._one_line(error)
                if getattr(error, "error_code", "") == "RESOURCE_DOES_NOT_EXIST":
                    self.client = None  # the store was emptied under us: begin again there
                if not warned:
                    warned = True
                    _say(f"MLflow at {self.place} failed ({self.last_error}); {METRICS} goes on, sent later")
            else:
                if self.failures:
                    _say(f"MLflow at {self.place} answers again; all rows are sent")
                self.failures, self.last_error = 0, ""
            self.begun.set()
            if last:
                return
            self.closing.wait(min(self.cfg.every_s * 2**self.failures, LONGEST_WAIT_S))

    def _forward_all(self, last: bool) -> None:
        client: Any = self.client or self._begin()
        for metrics, end in self._unsent():
            for k in range(0, len(metrics), METRICS_PER_BATCH):
                self._log_batch(metrics=metrics[k : k + METRICS_PER_BATCH])
            self.sent_bytes = end
            self._save_state()
        while self.artifacts:
            path, folder = self.artifacts[0]
            client.log_artifact(self.run_id, str(path), folder or None)
            self.artifacts.pop(0)
        if last:
            client.set_terminated(self.run_id, self.status)

    def _begin(self) -> Any:
        """Resume the run noted in the folder where this store has it, else create one."""
        for name, value in MLFLOW_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient  # a second of work, here in the background and nowhere else
        from mlflow.entities import RunTag
        from mlflow.exceptions import MlflowException

        for name in ("alembic", "mlflow.store.db.utils"):
            logging.getLogger(name).setLevel(logging.WARNING)  # a page of migrations for every new database
        logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # two lines for every try
        if (path := _database_of(self.uri)) and not path.exists():
            _create_database(path)
        client = MlflowClient(tracking_uri=self.uri)
        state = self._load_state()
        run = None
        if state and state["uri"] == self.place:
            try:
                run = client.get_run(state["run_id"])
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
        if run is not None and run.info.lifecycle_stage == "active":
            self.sent_bytes = state["sent_bytes"]
            client.update_run(run.info.run_id, status="RUNNING")
        else:
            self.sent_bytes = 0
            tags = self.tags | ({"mlflow.parentRunId": self.cfg.parent_run_id} if self.cfg.parent_run_id else {})
            run = client.create_run(self._experiment(client), tags=tags, run_name=self.run_name)
        self.client, self.run_id = client, run.info.run_id
        self._save_state()
        self.begun.set()
        known = run.data.params
        differing = {k: v for k, v in self.params.items() if k in known and known[k] != v}
        self._log_params({k: v for k, v in self.params.items() if k not in known})
        self._log_batch(tags=[RunTag(f"resumed.{k}", v) for k, v in differing.items()])
        return client

    def _experiment(self, client: Any) -> str:
        """The experiment's id; one that we create in a SQLite file keeps its artifacts beside that file."""
        from mlflow.exceptions import MlflowException

        found = client.get_experiment_by_name(self.cfg.experiment)
        if found is None:
            place = None
            if path := _database_of(self.uri):
                place = (path.parent / "mlflow_artifacts").as_uri()
            try:
                return client.create_experiment(self.cfg.experiment, artifact_location=place)
            except MlflowException as error:  # another run created it a moment ago
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                found = client.get_experiment_by_name(self.cfg.experiment)
        return found.experiment_id

    def _log_params(self, params: dict[str, str]) -> None:
        from mlflow.entities import Param

        entries = [Param(key, value) for key, value in params.items()]
        for k in range(0, len(entries), PARAMS_PER_BATCH):
            self._log_batch(params=entries[k : k + PARAMS_PER_BATCH])

    def _log_batch(self, **what: list) -> None:
        """One request. What the server calls invalid is left out with a line: sent again it would be refused again."""
        from mlflow.exceptions import MlflowException

        try:
            self.client.log_batch(self.run_id, **what)
        except MlflowException as error:
            if error.error_code != "INVALID_PARAMETER_VALUE":
                raise
            _say(f"MLflow refuses {', '.join(what)} ({self._one_line(error)}); they are in {self.run_dir} alone")

    def _unsent(self) -> Iterator[tuple[list, int]]:
        """Metrics of the complete rows after `sent_bytes`, some rows at a time, with the offset they end at.

        A row that was sent before its offset was noted is sent again: to MLflow equal (key, step, time, value) are one.
        """
        from mlflow.entities import Metric

        path = self.run_dir / METRICS
        if not path.exists():
            return
        with path.open("rb") as file:
            end = file.seek(min(self.sent_bytes, path.stat().st_size))
            while True:
                metrics, start = list[Metric](), end
                for _ in range(ROWS_AT_ONCE):
                    line = file.readline()
                    if not line.endswith(b"\n"):
                        break
                    end += len(line)
                    row = _row(line, path)
                    if row is None:
                        continue
                    step, milliseconds, split = row.pop("step"), int(row.pop("time") * 1000), row.pop("split")
                    for name, value in row.items():
                        key = re.sub(r"[^/\w.\- :]", "_", f"{split}/{name}")
                        metrics.append(Metric(key, math.nan if value is None else value, milliseconds, step))
                if end == start:
                    return
                yield metrics, end

    def _one_line(self, error: Exception) -> str:
        text = " ".join(str(error).replace(self.uri, self.place).split())
        return text[:200] or type(error).__name__

    def _load_state(self) -> dict[str, Any]:
        try:
            return json.loads((self.run_dir / STATE).read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return {}

    def _save_state(self) -> None:
        state = {"uri": self.place, "run_id": self.run_id, "sent_bytes": self.sent_bytes}
        write_json(self.run_dir / STATE, state)


def database_uri(database: Path) -> str:
    """The URI of a SQLite file; what would mean something else there is quoted, as SQLAlchemy reads it since 2.1."""
    return f"sqlite:///{quote(str(database)) if set('%?#') & set(str(database)) else database}"


def _database_of(uri: str) -> Path | None:
    """The file of a SQLite store; none of another, or where the URI says more than a path."""
    path = uri.removeprefix("sqlite:///")
    return None if path == uri or "?" in path or path in ("", ":memory:") else Path(unquote(path)).resolve()


def _create_database(path: Path) -> None:
    """Have MLflow make its tables in memory, and copy them to a file when they are whole.

    It makes them by some fifty migrations, each of which SQLite keeps at once: a run that is stopped, or a machine that
    goes down, between them would leave a store that MLflow can neither use nor mend.
    """
    from mlflow import MlflowClient

    in_memory = f"file:{uuid.uuid4().hex}?mode=memory&cache=shared"
    with contextlib.closing(sqlite3.connect(in_memory, uri=True)) as made:  # it lasts as long as this
        MlflowClient(tracking_uri=f"sqlite:///{in_memory}&uri=true").search_experiments(max_results=1)
        path.parent.mkdir(parents=True, exist_ok=True)
        with (
            written_aside(path, replaces=False) as file,  # another run may have made it meanwhile
            contextlib.closing(sqlite3.connect(file.name)) as copy,
        ):
            made.backup(copy)


def read_metrics(run_dir: Path | str, split: str | None = None) -> list[dict[str, Any]]:
    """The rows of a run in order of steps, of one split or of all; of a step that a resume repeated, the last."""
    path = Path(run_dir) / METRICS
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    rows = [row for line in lines if line.endswith(b"\n") and (row := _row(line, path)) is not None]
    last = {(row["step"], row["split"]): row for row in rows if split in (None, row["split"])}
    return [last[key] for key in sorted(last)]


_unreadable: set[Path] = set()


def _row(line: bytes, path: Path) -> dict[str, Any] | None:
    """A row, as `log` writes them; none for a line that is not one, as a machine that went down may leave it. That is
    told once for a file: no run ends, and no other row is lost, for want of it."""
    try:
        row = json.loads(line)
        if isinstance(row["step"], int) and isinstance(row["time"], int | float) and isinstance(row["split"], str):
            return row
    except (ValueError, KeyError, TypeError):
        pass
    if path not in _unreadable:
        _unreadable.add(path)
        _say(f"{path} has lines that are no rows; they are passed over")
    return None


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


def _number(value: Any) -> float | int | None:
    number = value if isinstance(value, int) else float(value)
    return number if math.isfinite(number) else None


def _say(text: str) -> None:
    print(f"tracking: {text}", file=sys.stderr, flush=True)
