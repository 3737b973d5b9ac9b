"""A run's folder: made once, and resumed only by the same command, or one whose changes are allowed and noted.

config.json       the resolved config, as given
changes.json      what changed the course of the run, see changes.py
environment.json  versions, commit, host, command line, how attention is computed: one entry per start. A damaged file
                  is begun again, and kept as environment.json.broken
plan.json         what training this config was planned to take, see launch/planning/of_run.py
metrics.jsonl     see tracking.py
previews/         see previews.py
tracked.json, mlflow_run.json, tracking.lock    see tracked.py
system.jsonl, system/    see machine.py
outcome.json      running, finished, stopped or failed, with the exit code and why
checkpoints/      see checkpoint.py
errors/rank-K.txt, stacks/rank-K.txt    see scldm/parallel/watch.py
nonfinite.jsonl   the cells of every step that was skipped
stop, save, profile    files that ask for it, see requests.py
profiles/         see profile.py
diffs/            how the code differed from its commit, a file for each difference
slurm/            notes of the job that trains, if one does: may be there first
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
import shlex
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from scldm.environment import describe
from scldm.errors import Busy, InputError, Stopped, read_json
from scldm.files import ASIDE, flat, outlived, put_in_place, remove_left, write_json
from scldm.given_json import read_entries, read_known, typed
from scldm.train import changes
from scldm.train.changes import CHANGES
from scldm.train.steps import BROKEN, pointed

if TYPE_CHECKING:  # it imports torch, which `scldm status` needs nothing of
    from scldm.train.branch import Branch

CONFIG = "config.json"
PLAN, PREVIEWS = "plan.json", "previews"
DIFFS = "diffs"  # how the code of a start differed from its commit
ENVIRONMENT = "environment.json"
NOTES = "slurm"
OUTCOME = "outcome.json"
LOCK = "lock"
OWNER = "lock.owner"
WAIT_S = 120.0  # for a lock that another process holds


@contextmanager
def open_run_folder(
    run_dir: Path,
    config: Mapping[str, Any],
    free: tuple[str, ...],
    notes: Mapping[str, str] | None = None,
    *,
    can_change: tuple[str, ...] = (),
    allowed: tuple[str, ...] = (),
    branch: Branch | None = None,
) -> Iterator[None]:
    """Make the folder, or check that the run in it has this config. What differs and may is printed. Within, no other
    process may train in it.

    free: keys, or groups of keys, that a resume may change because they do not change the result
    notes: of this start, kept with its environment
    can_change: keys, or groups, that change the course of the same run
    allowed: those that this start may change. They are noted in the run's history, with their step
    branch: what the run begins with. Its config may differ from the parent's in what can change

    Raises: InputError where the folder holds another run, with the keys that differ, or another process trains in it.
    """
    path = run_dir / CONFIG
    config = json.loads(json.dumps(config))
    changed: dict[str, tuple[Any, Any]] = {}
    if not path.is_file() and run_dir.is_dir() and any(not _may_lie_there(entry) for entry in run_dir.iterdir()):
        raise InputError(f"{run_dir} is not empty and not a run folder. Choose another run_dir")
    if branch is not None:
        changed = _differing(branch.config, config, (*free, "init_from"))
        if wrong := [key for key in changed if not _within(key, can_change)]:
            can = f"A branch may differ in {', '.join(can_change)}, and in what changes no result"
            raise InputError(f"branch_from={branch}: {_told(changed, wrong)}. {can}")
    elif path.is_file():
        changed = _differing(read_config(run_dir), config, free)
        if wrong := [key for key in changed if not _within(key, allowed)]:
            named = f", or name what may change: allow_changes={','.join(wrong)}"
            hint = named if all(_within(key, can_change) for key in wrong) else ""
            raise InputError(f"{run_dir} holds another run: {_told(changed, wrong)}. Choose another run_dir{hint}")
        if every := _differing(read_config(run_dir), config, ()):
            told = _told(every, list(every), len(every))
            print(f"scldm: {run_dir} goes on with: {told}", file=sys.stderr, flush=True)
    run_dir.mkdir(parents=True, exist_ok=True)
    with locked(run_dir):
        for folder in (run_dir, run_dir / DIFFS, run_dir / PREVIEWS):  # in others, verbs may be writing
            remove_left(folder)
        begins = branch is not None and _latest(run_dir) is None
        # before the config: what changed can be told from the two of them, and from nothing later
        if branch is not None and begins:
            changes.note(run_dir, branch.step, changed, branch.run)
        elif branch is None and changed:
            changes.note(run_dir, step_of(run_dir), changed)
        if not path.is_file() or read_json(path) != config:
            write_json(path, config)
        write_json(run_dir / ENVIRONMENT, [*_starts(run_dir), {**describe(), **(notes or {})}])
        if branch is not None and begins:
            from scldm.train.branch import begin

            begin(branch, run_dir)
            print(f"scldm: {run_dir} {changes.told(changes.read(run_dir)[0])}", file=sys.stderr, flush=True)
        yield


def step_of(run_dir: Path) -> int:
    """The step of the checkpoint that the run goes on from."""
    latest = _latest(run_dir)
    return int(latest.name.removeprefix("step-")) if latest else 0


def _latest(run_dir: Path) -> Path | None:
    return pointed(run_dir / "checkpoints" / "latest")


def _differing(before: Mapping[str, Any], now: Mapping[str, Any], free: tuple[str, ...]) -> dict[str, tuple[Any, Any]]:
    """Key -> (before, now) of all that differs, but what is free to."""
    was, is_ = dict(flat(before)), dict(flat(now))
    keys = sorted(key for key in was.keys() | is_.keys() if was.get(key) != is_.get(key))
    return {key: (was.get(key), is_.get(key)) for key in keys if not _within(key, free)}


def _told(changed: Mapping[str, tuple[Any, Any]], keys: Sequence[str], most: int = 4) -> str:
    more = f" and {len(keys) - most} more" if len(keys) > most else ""
    return "; ".join(f"{key} was {changed[key][0]!r}, now {changed[key][1]!r}" for key in keys[:most]) + more


def _may_lie_there(entry: Path) -> bool:
    """Before the first start: what Slurm's side made, or what a start left that died before its config was whole."""
    return entry.name in (NOTES, LOCK, OWNER, CHANGES) or bool(ASIDE.fullmatch(entry.name))


def started_at(run_dir: Path) -> float:
    """When the run was last started, in seconds since 1970. 0 where that is not noted."""
    starts = starts_of(run_dir)
    return datetime.fromisoformat(starts[-1]["time"]).timestamp() if starts else 0.0


@dataclass(frozen=True)
class Start:
    """What verbs read of a start. It is noted with more, see scldm/environment.py."""

    time: str
    command: str
    host: str
    git: str | None
    slurm_job: str | None
    versions: dict[str, str]
    diff: str = ""

    def __post_init__(self) -> None:
        try:
            datetime.fromisoformat(self.time)
            shlex.split(self.command)
        except ValueError as error:
            raise InputError(f"a start at time={self.time!r} with command={self.command!r}: {error}") from None


def starts_of(run_dir: Path) -> list[dict[str, Any]]:
    """The notes of all starts of a run, the first one first. Raises: InputError for a file that says anything else."""
    return read_entries(Start, run_dir / ENVIRONMENT)


def _starts(run_dir: Path) -> list[Any]:
    """The notes of earlier starts. Where they can't be read the file is put aside: no run ends for want of them."""
    try:
        return starts_of(run_dir)
    except InputError as error:
        names = (f"{ENVIRONMENT}{BROKEN}{k or ''}" for k in itertools.count())
        aside = next(path for name in names if not (path := run_dir / name).exists())
        put_in_place(run_dir / ENVIRONMENT, aside)
        print(f"scldm: {error}. It is begun again, and what it held is now {aside}", file=sys.stderr, flush=True)
        return []


@dataclass(frozen=True)
class Outcome:
    """How a run ended, or that it has not."""

    state: Literal["running", "finished", "stopped", "failed"]
    exit_code: int | None = None
    reason: str = ""


def outcome_of(run_dir: Path) -> Outcome | None:
    """None where no start has noted any. Raises: InputError for a file that says anything else."""
    path = run_dir / OUTCOME
    return read_known(Outcome, path) if path.is_file() else None


def is_trained(run_dir: Path) -> bool:
    """Whether a process trains in the folder now, as far as its locks are seen from this host."""
    try:
        with (run_dir / LOCK).open() as file:
            fcntl.flock(file.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no lock, or a file system without locks
        pass
    owner = run_dir / OWNER
    return owner.is_file() and not _ended(owner)


def trained_on(run_dir: Path) -> str:
    """The host that last trained in the folder. Empty where that is not noted."""
    owner = _owner_in(run_dir / LOCK)
    return owner.host if owner else ""


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Within, no other process trains in this folder. The lock ends with the process, however that ends. It is waited
    for: what a killed launcher left behind may train on for a while.

    Raises: InputError where another process still trains in it. Busy where this one is a job that Slurm put back into
    the queue, whose earlier ranks may still be ending.
    """
    with (run_dir / LOCK).open("a+") as file:
        end, told = time.monotonic() + WAIT_S, False
        while not (held := _try_lock(run_dir, file.fileno())):
            who = f"{run_dir}: another process is training in it ({_named(run_dir / LOCK)})"
            if time.monotonic() > end:
                kind = Busy if int(os.environ.get("SLURM_RESTART_COUNT") or 0) else InputError
                raise kind(f"{who}. Wait for it, or end it")
            if not told:
                told = True
                print(f"scldm: {who}. This one waits for it, {WAIT_S:g} s at most", file=sys.stderr, flush=True)
            time.sleep(WAIT_S / 60)
        try:
            with outlived(run_dir / LOCK):
                file.truncate(0)
                file.write(_owner())
                file.flush()
            yield
        finally:
            held()


def _try_lock(run_dir: Path, descriptor: int) -> Callable[[], None] | None:
    """What gives the lock back. None where another process has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return lambda: None  # with the file
    except BlockingIOError:
        return None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
            raise
    # a file system without locks: a file that only one process can make
    path = run_dir / OWNER
    try:
        with path.open("x") as file:
            file.write(_owner())
    except FileExistsError:
        if not _ended(path):
            return None
        path.unlink(missing_ok=True)
        return _try_lock(run_dir, descriptor)
    print(
        f"scldm: {run_dir} is on a file system without locks: {OWNER} in it keeps other processes out, and has to be "
        "removed by hand where its process was killed on another host",
        file=sys.stderr,
        flush=True,
    )
    return lambda: path.unlink(missing_ok=True)


@dataclass(frozen=True)
class _Owner:
    """The process that holds a lock. job: of Slurm, empty for none"""

    host: str
    pid: Annotated[int, range(1, 1 << 31)]
    job: str = ""


def _owner() -> str:
    return json.dumps(asdict(_Owner(socket.gethostname(), os.getpid(), os.environ.get("SLURM_JOB_ID", ""))))


def _owner_in(path: Path) -> _Owner | None:
    """None where the file does not say."""
    with suppress(OSError, InputError):
        return read_known(_Owner, path)
    return None


def _ended(path: Path) -> bool:
    """Whether the process that made an owner file is known to have ended: Slurm starts no job anew beside itself."""
    owner = _owner_in(path)
    if owner is None:
        return False
    if owner.job and owner.job == os.environ.get("SLURM_JOB_ID"):
        return True
    if owner.host != socket.gethostname():
        return False
    try:
        os.kill(owner.pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def _named(path: Path) -> str:
    if (owner := _owner_in(path)) is None:
        return "which does not say who it is"
    return f"process {owner.pid} on {owner.host}" + (f", job {owner.job}" if owner.job else "")


@contextmanager
def outcome_noted(run_dir: Path) -> Iterator[Callable[[str, int], None]]:
    """Note that the run runs, and how it ended. Yields what notes from another thread why it fails, with which code."""

    writing, known = threading.Lock(), False

    def note(state: str, exit_code: int | None, reason: str) -> None:
        told = {"state": state, "exit_code": exit_code, "reason": reason}
        with outlived(run_dir / OUTCOME):  # a full disk is itself the cause, and is what is to be told
            write_json(run_dir / OUTCOME, {**told, "time": datetime.now(UTC).isoformat(timespec="seconds")})

    def note_cause(reason: str, code: int) -> None:
        nonlocal known
        with writing:
            known = True
            note("failed", code, reason)

    note("running", None, "")
    try:
        yield note_cause
    except Stopped as stopped:
        note("stopped", stopped.exit_code, stopped.reason)
        raise
    except BaseException as error:
        with writing:
            if not known:  # else this one is the consequence of it
                note("failed", error.exit_code if isinstance(error, InputError) else 1, " ".join(f"{error!r}".split()))
        raise
    note("finished", 0, "")


def read_config(run_dir: Path) -> dict[str, Any]:
    """The config of the run in a folder. Raises: InputError where it is none."""
    path = run_dir / CONFIG
    if not path.is_file():
        raise InputError(f"{run_dir} is not a run folder: it has no {CONFIG}")
    return typed(dict[str, Any], read_json(path), str(path))


def _within(key: str, groups: tuple[str, ...]) -> bool:
    return any(key == group or key.startswith(f"{group}.") for group in groups)
