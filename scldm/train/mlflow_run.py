"""Sends MLflow what it lacks of a run. MLflow is known here alone.

What it is to get, and what it has got, lies in the run's folder, see tracked.py. A Sender sends the difference. Any
process may do so, at any time and any number of times: the run's own, the next one in the folder, a child's, or
`scldm track replay`.

Reading order: Sender, its errors, stores.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import math
import os
import re
import socket
import sqlite3
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from scldm.environment import without_passwords
from scldm.errors import InputError
from scldm.files import write_json, written_aside
from scldm.train.follower import Follower, row_files, rows_from, say
from scldm.train.tracked import NOTE, NOTHING, STATE, followed_alone, parent_of, read_note, read_state, stamp_of

Check = Callable[[Path, Mapping[str, Any]], None]
METRICS_PER_BATCH, PER_BATCH = 1_000, 100  # MLflow's own limits of one log_batch. The second is of params and tags
OLDER_LIMITS = (500, 250)  # characters of a parameter: MLflow before 2.10, and before 1.28
SURE = 3  # a name that was refused alone so often is not sent again
# A server that is gone would block one call for minutes by default. None of ours blocks for more than some seconds.
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

# of an experiment, by which UIs of MLflow 3 tell training from language models
KIND = {"mlflow.experimentKind": "custom_model_development"}


# --- sending -------------------------------------------------------------------------------------------------------


class Sender(Follower):
    """Sends what is in one folder to MLflow.

    uri: of the store, where it has a password that the environment does not tell
    check: of a folder's note, before anything is sent: for notes that somebody else may have written
    """

    def __init__(self, folder: Path, uri: str = "", check: Check | None = None) -> None:
        super().__init__(folder)
        self.given, self.check = uri, check
        self.client: Any = None
        self.uri = self.place = self.run_id = ""
        self.state = read_state(folder)
        self.parent: Sender | None = None

    def send(self) -> None:
        """Send all that MLflow lacks. What it refuses is named and left out. Raises: whatever MLflow raises."""
        from mlflow.entities import Param, RunTag

        note = read_note(self.folder)
        assert note is not None
        try:
            self.begin(note)
            for kind, entity, prefix in (("params", Param, ""), ("resumed", RunTag, "resumed."), ("tags", RunTag, "")):
                new = [entity(prefix + k, v) for k, v in note[kind].items() if self.state[kind].get(k) != v]
                for k in range(0, len(new), PER_BATCH):
                    self._log("params" if entity is Param else "tags", new[k : k + PER_BATCH])
                if new:
                    self._noted(**{kind: note[kind]})
            self._send_datasets(note["datasets"])
            for name in row_files(self.folder):
                for metrics, end in self._rows(name):
                    for k in range(0, len(metrics), METRICS_PER_BATCH):
                        self._log("metrics", metrics[k : k + METRICS_PER_BATCH])
                    self._noted(sent=self.state["sent"] | {name: end})
            if self.check:  # again, by what the store is known to have: `begin` may have found that it has nothing
                self.check(self.folder, note)
            trouble = self._send_artifacts(note["artifacts"])
            self._send_status(note)
        except Exception as error:
            if _code_of(error) in (400, 404):
                self.client = None  # the store was emptied, or the run deleted: look for it again
            raise
        if trouble:
            raise trouble

    def begin(self, note: Mapping[str, Any]) -> None:
        """Find the run that the folder notes, or create it. Of two processes that do so at once, one creates it."""
        if self.client is not None:
            return
        if self.check:
            self.check(self.folder, note)
        self.place = note["uri"]
        self.uri = self.given or with_password(self.place)
        client = _client(self.uri)
        parent = self._parent_id(note)
        with (self.folder / f"{STATE}.lock").open("a") as lock:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(lock, fcntl.LOCK_EX)
            self.state = read_state(self.folder)
            run = None
            if self.state["uri"] == self.place:
                try:
                    run = client.get_run(self.state["run_id"])
                except Exception as error:
                    if _code_of(error) != 404:
                        raise
            if run is None or run.info.lifecycle_stage != "active":
                experiment = _experiment(client, self.uri, note["experiment"])
                tags = {"mlflow.parentRunId": parent} if parent else {}
                started = int(note["started"] * 1000)
                run = client.create_run(experiment, start_time=started, tags=tags, run_name=note["run_name"])
                self.state = {**NOTHING, "uri": self.place}
            self._noted(run_id=run.info.run_id)
        self.client, self.run_id = client, run.info.run_id

    def _parent_id(self, note: Mapping[str, Any]) -> str:
        """The id of the parent's run, which is created if need be: no child waits for it. Empty where there is none,
        or where the parent is in another store."""
        folder = parent_of(self.folder, note)
        if folder is None:
            return ""
        of = read_note(folder)
        if of is None or of["uri"] != self.place:
            where = of["uri"] if of else f"no store: {folder} has no {NOTE}"
            say(f"{self.folder}: its run is not nested: it goes to {self.place}, its parent to {where}")
            return ""
        self.parent = Sender(folder, self.given, self.check)
        self.parent.begin(of)
        return self.parent.run_id

    def _send_datasets(self, datasets: Sequence[Mapping[str, Any]]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        if self.state["datasets"] == datasets:
            return
        inputs = []
        for of in datasets:
            kind = of["source"].split("://")[0] if "://" in of["source"] else "local"
            kind = "http" if kind == "https" else kind
            source = json.dumps({"url" if kind == "http" else "uri": of["source"]})
            dataset = Dataset(of["name"], of["digest"][:36], kind, source, profile=json.dumps(of["profile"]))
            inputs.append(DatasetInput(dataset, [InputTag("mlflow.data.context", of["context"])]))
        try:
            self.client.log_inputs(self.run_id, inputs)
        except Exception as error:
            if not (_is_refused(error) or _code_of(error) == 404):  # 404: a server before 2.4
                raise
            self._tell_refused(f"dataset {', '.join(of['name'] for of in datasets)}", error)
        self._noted(datasets=list(datasets))

    def _send_artifacts(self, artifacts: Sequence[Sequence[str]]) -> Exception | None:
        """Returns the first failure. The others, and the run's status, do not wait for what the first one needs."""
        trouble = None
        for name, folder in artifacts:
            path = self.folder / name
            stamp = stamp_of(path)
            if stamp is None or self.state["artifacts"].get(name) == stamp:
                continue
            try:
                self.client.log_artifact(self.run_id, str(path), folder or None)
            except Exception as error:
                if not _is_refused(error):
                    trouble = trouble or OSError(f"artifact {path.name}: {cause_of(error, self.uri)}")
                    continue
                self._tell_refused(f"artifact {name}", error)
            self._noted(artifacts=self.state["artifacts"] | {name: stamp})
        return trouble

    def _send_status(self, note: Mapping[str, Any]) -> None:
        status = note["status"]
        if self.state["status"] == status:
            return
        if status == "RUNNING":
            self.client.update_run(self.run_id, status="RUNNING")
        else:
            self.client.set_terminated(self.run_id, status, end_time=int(note["ended"] * 1000))
        self._send_parent()
        self._noted(status=status)

    def _send_parent(self) -> None:
        """What a child's start and end are to its parent, where no process follows that one."""
        if self.parent is None:
            return
        with contextlib.suppress(InputError), followed_alone(self.parent.folder):
            self.parent.send()

    def _log(self, kind: str, entries: Sequence[Any]) -> None:
        """Entries of one kind. A request that is refused is cut in two until the refused entries are alone."""
        refused = self.state["refused"]
        entries = [entry for entry in entries if refused.get(f"{kind} {entry.key}", 0) < SURE]
        if not entries:
            return
        try:
            self.client.log_batch(self.run_id, **{kind: entries})
            return
        except Exception as error:
            if not _is_refused(error):
                raise
            cause = error
        if len(entries) > 1:  # by names: one that is refused, is so in all its rows
            entries = sorted(entries, key=lambda entry: entry.key)
            for half in (entries[: len(entries) // 2], entries[len(entries) // 2 :]):
                self._log(kind, half)
            return
        if self.client.get_run(self.run_id).info.lifecycle_stage != "active":  # deleted: it refuses all
            raise cause
        (entry,) = entries
        limit = next((n for n in OLDER_LIMITS if kind == "params" and len(entry.value) > n), 0)
        if limit:
            say(
                f"MLflow at {self.place} refuses {entry.key} of {len(entry.value)} characters, and gets {limit} of them"
            )
            self._log(kind, [type(entry)(entry.key, entry.value[:limit])])
            return
        name = f"{kind} {entry.key}"
        if name not in refused:
            self._tell_refused(f"{kind.removesuffix('s')} {entry.key}", cause)
        self._noted(refused=refused | {name: refused.get(name, 0) + 1})

    def _tell_refused(self, what: str, error: Exception) -> None:
        why = cause_of(error, self.uri)
        say(f"MLflow at {self.place} refuses {what} ({why}). It is in {self.folder} alone. All else is sent")

    def _rows(self, name: str) -> Iterator[tuple[list[Any], int]]:
        """Metrics of the complete rows that were not sent, some rows at a time, with the offset they end at.

        A row that was sent before its offset was noted is sent again: to MLflow equal (key, step, time, value) are one.
        """
        from mlflow.entities import Metric

        for rows, end in rows_from(self.folder / name, self.state["sent"].get(name, 0)):
            metrics = list[Metric]()
            for row in rows:
                step, milliseconds, split = row.pop("step"), int(row.pop("time") * 1000), row.pop("split")
                for key, value in row.items():
                    allowed = re.sub(r"[^/\w.\- :]", "_", f"{split}/{key}")
                    metrics.append(Metric(allowed, math.nan if value is None else value, milliseconds, step))
            yield metrics, end

    def _noted(self, **new: Any) -> None:
        self.state |= new
        write_json(self.folder / STATE, self.state)


# --- errors --------------------------------------------------------------------------------------------------------


def _code_of(error: BaseException) -> int:
    """The HTTP status of a failure, also of a store without HTTP. 0 where the server gave no answer."""
    found = re.search(r"failed with error code (\d{3})|too many (\d{3}) error responses", str(error))
    if found:
        return int(found[1] or found[2])
    answer = getattr(error, "response", None)  # requests' own, as for artifacts
    if answer is not None:
        return answer.status_code
    if getattr(error, "error_code", "") == "INTERNAL_ERROR" and not hasattr(error, "json"):
        return 0  # of MLflow's client itself, such as a connection that failed
    code = getattr(error, "get_http_status_code", None)
    return code() if code else 0


def _is_refused(error: BaseException) -> bool:
    """Whether what was sent is at fault, alone or by its size: sent again it would be refused again."""
    return _code_of(error) in (400, 413)


def may_pass(error: BaseException) -> bool:
    """Whether the same may succeed later: no answer, or an error of the server's own."""
    return _code_of(error) == 0 or _code_of(error) >= 500


def cause_of(error: BaseException, uri: str = "") -> str:
    """Why MLflow failed: the kind of failure first, then what the user can do, then the error's own words."""
    chain = [error]
    while inner := (chain[-1].__cause__ or chain[-1].__context__ or _first(chain[-1])):
        if inner in chain:
            break
        chain.append(inner)
    code = _code_of(error) if uri.startswith("http") else 0
    names = {type(e).__name__ for e in chain}
    server = without_passwords(uri)
    if code == 401:
        kind = "HTTP 401, not logged in. Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or _TOKEN"
    elif code == 403:
        kind = "HTTP 403, this user may not do that"
    elif code >= 500:
        kind = f"HTTP {code}, an error of the server. Its log says more"
    elif code:
        kind = f"HTTP {code}"
    elif names & {"ConnectTimeout", "ReadTimeout", "ConnectTimeoutError", "ReadTimeoutError"}:
        kind = f"timed out: no answer within {os.environ.get('MLFLOW_HTTP_REQUEST_TIMEOUT', '')} s"
    elif any(isinstance(e, ConnectionRefusedError) for e in chain):
        kind = "connection refused: no server listens there"
    elif any(isinstance(e, socket.gaierror) for e in chain):
        kind = "unknown host"
    else:
        kind = ""
    last = error if code else chain[-1]
    words = " ".join(without_passwords(str(last).replace(uri, server) if uri else str(last)).split())
    words = words if len(words) <= 300 else f"{words[:300]} ..."
    return ": ".join(part for part in (kind, words or type(last).__name__) if part)


def _first(error: BaseException) -> BaseException | None:
    """The error that requests and urllib3 keep within one of theirs."""
    inner = getattr(error, "reason", None) or (error.args[0] if error.args else None)
    return inner if isinstance(inner, BaseException) else None


# --- stores --------------------------------------------------------------------------------------------------------


def with_password(place: str) -> str:
    """The URI of a store with its password, which is in the environment alone: of the same server."""
    given = os.environ.get("MLFLOW_TRACKING_URI", "")
    return given if given and without_passwords(given) == place else place


def database_uri(database: Path) -> str:
    """The URI of a SQLite file. What would mean something else there is quoted, as SQLAlchemy reads it since 2.1."""
    return f"sqlite:///{quote(str(database)) if set('%?#') & set(str(database)) else database}"


def database_of(uri: str) -> Path | None:
    """The file of a SQLite store. None for another store, or where the URI says more than a path."""
    path = uri.removeprefix("sqlite:///")
    return None if path == uri or "?" in path or path in ("", ":memory:") else Path(unquote(path)).resolve()


def _client(uri: str) -> Any:
    for name, value in MLFLOW_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient  # a second of work, or many: in the background, and nowhere else

    for name in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.WARNING)  # a page of migrations for every new database
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # two lines for every try
    if (path := database_of(uri)) and not path.exists():
        _create_database(path)
    return MlflowClient(tracking_uri=uri)


def _experiment(client: Any, uri: str, name: str) -> str:
    """The experiment's id. One that we create in a SQLite file keeps its artifacts beside that file.

    Raises: InputError for one that is deleted.
    """
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        place = None
        if path := database_of(uri):
            place = (path.parent / "mlflow_artifacts").as_uri()
        try:
            return client.create_experiment(name, artifact_location=place, tags=KIND)
        except MlflowException as error:  # another run created it a moment ago
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(name)
    if found.lifecycle_stage == "deleted":
        raise InputError(
            f"experiment {name!r} is deleted in MLflow: `mlflow experiments restore -x {found.experiment_id}` brings "
            "it back, and `mlflow gc` frees its name. Or give another tracking.experiment"
        )
    return found.experiment_id


def _create_database(path: Path) -> None:
    """Have MLflow make its tables in memory, and copy them to a file when they are whole.

    It makes them by some fifty migrations, and SQLite keeps each at once. A run that is stopped between them, or a
    machine that goes down, would leave a store that MLflow can neither use nor mend.
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
