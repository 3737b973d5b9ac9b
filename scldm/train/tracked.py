"""What MLflow is to get of a run, and what it has got. Both lie in the run's folder, and this needs no MLflow.

    tracked.json     what MLflow is to get besides the rows: experiment, parameters, tags, artifacts, the final status
    metrics.jsonl    the rows, see tracking.py
    system.jsonl     rows of the machine: processor, memory, GPU. Those of other nodes are in system/, see machine.py
    mlflow_run.json  what MLflow has got, and what it refused
    tracking.lock    held by the process that follows the run

Reading order: TrackingConfig, the note, what MLflow lacks, who follows the run.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from scldm.checked import Checked, checked
from scldm.environment import check_uri, without_passwords
from scldm.errors import InputError
from scldm.files import locked, write_json
from scldm.given_json import Count, PathText, read_checked, typed
from scldm.train.follower import row_files, say_once

NOTE, STATE, LOCK = "tracked.json", "mlflow_run.json", "tracking.lock"
# what MLflow and its databases take from the environment
SECRETS = tuple(f"MLFLOW_TRACKING_{name}" for name in ("PASSWORD", "TOKEN", "AUTH", "AWS_SIGV4", "CLIENT_CERT_PATH"))
SECRETS += ("PGPASSWORD", "MYSQL_PWD")

Status = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]


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


# --- the note ------------------------------------------------------------------------------------------------------


def new_note(place: str, experiment: str, run_name: str) -> dict[str, Any]:
    """The note of a run that begins now.

    uri: of the store, without a password
    parent: folder of the run that this one is nested in, from this folder. Empty for none
    params: of the first start
    resumed: those that a later start changed
    tags, datasets, artifacts: of MLflow. An artifact is (file from this folder, folder in MLflow)
    status: RUNNING until the run ends
    started, ended: seconds since 1970
    closed_by: of a parent that no process follows: the stage of the child whose end is its own end
    """
    return {
        "uri": place,
        "experiment": experiment,
        "run_name": run_name,
        "parent": "",
        "closed_by": "",
        "started": time.time(),
        "ended": None,
        "status": "RUNNING",
        "params": {},
        "resumed": {},
        "tags": {},
        "datasets": [],
        "artifacts": [],
    }


def read_note(folder: Path) -> dict[str, Any] | None:
    """What MLflow is to get of the run in a folder. None where no run there is followed. Raises: InputError."""
    return read_checked(_Note, folder / NOTE)


@dataclass(frozen=True)
class _Dataset:
    name: str
    source: str
    digest: str
    context: str
    profile: dict[str, Any]

    def __post_init__(self) -> None:
        typed(str, self.profile.get("kind", ""), "profile.kind")
        typed(dict[str, int], {key: n for key, n in self.profile.items() if key != "kind"}, "profile")


@dataclass(frozen=True)
class _Note:
    """The keys of `new_note`."""

    uri: str
    experiment: str
    run_name: str
    parent: PathText
    closed_by: str
    started: float
    ended: float | None
    status: Status
    params: dict[str, str]
    resumed: dict[str, str]
    tags: dict[str, str]
    datasets: list[_Dataset]
    artifacts: list[tuple[PathText, str]]


class Untrusted(InputError):
    """A note by which something would be sent that its user may not want to be sent."""


def check_followed(run: Path) -> None:
    """Raises: InputError for a run that MLflow does not have, and as `check_trusted`."""
    if (note := read_note(run)) is None:
        raise InputError(f"register: {run} was trained without MLflow: it has no {NOTE}. Leave register out")
    check_trusted([], "", run, note)


def check_trusted(roots: Sequence[Path] | None, store: str, folder: Path, note: Mapping[str, Any]) -> None:
    """Of a note that somebody else may have written, before anything is sent by it.

    roots: folders whose files may be sent, as may the run's own. None: all may
    store: that the user names, besides the one in the environment

    Raises: Untrusted where a file lies elsewhere, and where MLflow would find a password for the note's server that
        the user may not have meant for it: it gives one to any server.
    """
    if roots is not None and (files := unsent_from_elsewhere(folder, note, roots)):
        raise Untrusted(
            f"{folder}: it is to send {files[0]}, which is in no folder that was given. Where it may be sent: "
            f"`{replay_of(folder, note)}`"
        )
    uri, named = note["uri"], (store, without_passwords(os.environ.get("MLFLOW_TRACKING_URI", "")))
    if uri not in named and (at := secret_for(uri)):
        raise Untrusted(f"{folder}: its server is {uri}. Set MLFLOW_TRACKING_URI={uri} where it may have {at}")


def unsent_from_elsewhere(folder: Path, note: Mapping[str, Any], roots: Sequence[Path] = ()) -> list[Path]:
    """Files of a run that MLflow lacks, and that lie neither in its folder nor in one of `roots`."""
    sent, within = read_state(folder)["artifacts"], [root.resolve() for root in (folder, *roots)]
    paths = [(folder / name).resolve() for name, _ in note["artifacts"] if sent.get(name) != stamp_of(folder / name)]
    return [path for path in paths if not any(map(path.is_relative_to, within))]


def replay_of(folder: Path, note: Mapping[str, Any]) -> str:
    """The command that sends what MLflow lacks of a run."""
    return f"scldm track replay {folder}{' outside=true' * bool(unsent_from_elsewhere(folder, note))}"


def secret_for(uri: str) -> str:
    """Where MLflow would find a password or such for a store. Empty where it has none, and for a local store."""
    scheme, kept = urlsplit(uri.strip()).scheme.lower(), Path("~/.mlflow/credentials").expanduser()
    if scheme in ("file", "sqlite") or (not scheme and not uri.strip().lower().startswith(("databricks", "uc"))):
        return ""
    is_sql = scheme.partition("+")[0] in ("mssql", "mysql", "postgres", "postgresql")
    names = [name for name in SECRETS if os.environ.get(name) and name.startswith("MLFLOW_") != is_sql]
    return names[0] if names else str(kept) if kept.exists() and not is_sql else ""


def parent_of(folder: Path, note: Mapping[str, Any]) -> Path | None:
    return Path(os.path.normpath(folder.resolve() / note["parent"])) if note["parent"] else None


def note_end(folder: Path, note: dict[str, Any], status: Status) -> None:
    note |= {"status": status, "ended": None if status == "RUNNING" else time.time()}
    write_json(folder / NOTE, note)


def note_failed(parent: Path) -> bool:
    """Note that a pipeline failed, where no process follows it and no stage has ended it. Returns whether it was so."""
    note = read_note(parent)
    if note is None or not note["closed_by"] or note["status"] != "RUNNING":
        return False
    note_end(parent, note, "FAILED")
    return True


# --- what MLflow lacks ------------------------------------------------------------------------------------------------


def unsent(folder: Path) -> list[str]:
    """What MLflow lacks of the run in a folder, by the files there: it is not asked. Empty where it has all."""
    note, state = read_note(folder), read_state(folder)
    if note is None:
        return []
    rows = sum(_rows_after(folder / name, state["sent"].get(name, 0)) for name in row_files(folder))
    files = sum(state["artifacts"].get(name) != stamp_of(folder / name) for name, _ in note["artifacts"])
    texts = [kind for kind in ("params", "resumed", "tags", "datasets") if state[kind] != note[kind]]
    lacks = [f"{n} {what}{'s' * (n > 1)}" for n, what in ((rows, "row"), (files, "artifact")) if n]
    return [*lacks, *texts, *(["its status"] if state["status"] != note["status"] else [])]


def _rows_after(path: Path, offset: int) -> int:
    if not path.is_file() or path.stat().st_size <= offset:
        return 0
    with path.open("rb") as file:
        file.seek(offset)
        return file.read().count(b"\n")


@dataclass(frozen=True)
class _State:
    """sent: bytes of each file of rows
    artifacts: the `stamp_of` each
    refused: how often, by name
    The rest is as in the note."""

    uri: str = ""
    run_id: str = ""
    status: str = ""
    sent: dict[str, Count] = field(default_factory=dict)
    params: dict[str, str] = field(default_factory=dict)
    resumed: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    datasets: list[_Dataset] = field(default_factory=list)
    artifacts: dict[str, tuple[int, int]] = field(default_factory=dict)
    refused: dict[str, Count] = field(default_factory=dict)


NOTHING = asdict(_State())


def read_state(folder: Path) -> dict[str, Any]:
    """What MLflow has got. Nothing where that is not noted, or the note is damaged: then all is sent again."""
    try:
        return {**NOTHING, **(read_checked(_State, folder / STATE) or {})}
    except InputError as error:
        say_once(folder / STATE, f"{error}. All is sent again, to a new run of MLflow")
        return dict(NOTHING)


def stamp_of(path: Path) -> list[int] | None:
    """Size and time of a file, by which a changed one is sent again. None for one that is gone, or can't be one."""
    try:
        of = path.stat()
    except (OSError, ValueError):  # also a name that no file system takes
        return None
    return [of.st_size, of.st_mtime_ns] if stat.S_ISREG(of.st_mode) else None


# --- who follows the run ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def followed_alone(folder: Path) -> Iterator[None]:
    """Within, no other process follows the run in this folder. Raises: InputError where one does."""
    with locked(folder / LOCK, f"{folder}: its own process still follows it"):
        yield


def is_followed(folder: Path) -> bool:
    """Whether a process follows the run in this folder."""
    try:
        with followed_alone(folder):
            return False
    except InputError:
        return True
