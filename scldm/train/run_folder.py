"""A run's folder: made once, and resumed only by the same command.

config.json       the resolved config, as given
environment.json  versions, commit, host, command line; one entry per start
metrics.jsonl     see tracking.py
outcome.json      running, finished, stopped or failed; the exit code and why
checkpoints/      see checkpoint.py
errors/rank-K.txt, stacks/rank-K.txt    see scldm/parallel/watch.py
nonfinite.jsonl   the cells of every step that was skipped
stop, save        files that ask for it, see requests.py
slurm/            notes of the job that trains, if one does: may be there first
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from scldm.environment import describe
from scldm.errors import REFUSED, InputError, Stopped, read_json

CONFIG = "config.json"
ENVIRONMENT = "environment.json"
NOTES = "slurm"
OUTCOME = "outcome.json"
LOCK = "lock"


@contextmanager
def open_run_folder(run_dir: Path, config: Mapping[str, Any], free: tuple[str, ...]) -> Iterator[None]:
    """Make the folder, or check that the run in it has this config; what differs and may is printed. Within, no other
    process may train in it.

    free: keys, or groups of keys, that a resume may change because they do not change the result

    Raises: InputError where the folder holds another run, with the keys that differ, or another process trains in it.
    """
    path = run_dir / CONFIG
    config = json.loads(json.dumps(config))
    if path.is_file():
        before = dict(flat(read_json(path)))
        now = dict(flat(config))
        changed = {
            key: f"{key} was {before.get(key)!r}, now {now.get(key)!r}"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key)
        }
        wrong = [told for key, told in changed.items() if not _within(key, free)]
        if wrong:
            more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
            raise InputError(f"{run_dir} holds another run: {'; '.join(wrong[:4])}{more}; choose another run_dir")
        if changed:
            print(f"scldm: {run_dir} goes on with: {'; '.join(changed.values())}", file=sys.stderr, flush=True)
    elif run_dir.is_dir() and any(entry.name not in (f"{CONFIG}.partial", NOTES, LOCK) for entry in run_dir.iterdir()):
        raise InputError(f"{run_dir} is not empty and not a run folder; choose another run_dir")
    run_dir.mkdir(parents=True, exist_ok=True)
    with locked(run_dir):
        write_json(path, config)
        starts = read_json(run_dir / ENVIRONMENT) if (run_dir / ENVIRONMENT).is_file() else []
        write_json(run_dir / ENVIRONMENT, [*starts, describe()])
        yield


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Within, no other process may train in this folder; the lock ends with the process, however that ends.

    Raises: InputError where another process, such as what a killed launcher left behind, still trains in it.
    """
    with (run_dir / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{run_dir}: another process is training in it; wait for it, or end it") from None
        except OSError:  # a file system without locks
            pass
        yield


@contextmanager
def outcome_noted(run_dir: Path) -> Iterator[Callable[[str, int], None]]:
    """Note that the run runs, and how it ended; yields what notes from another thread why it fails, with which code."""

    writing, known = threading.Lock(), False

    def note(state: str, exit_code: int | None, reason: str) -> None:
        told = {"state": state, "exit_code": exit_code, "reason": reason}
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
                note("failed", REFUSED if isinstance(error, InputError) else 1, " ".join(f"{error!r}".split()))
        raise
    note("finished", 0, "")


def read_config(run_dir: Path) -> dict[str, Any]:
    """The config of the run in a folder. Raises: InputError where it is none."""
    path = run_dir / CONFIG
    if not path.is_file():
        raise InputError(f"{run_dir} is not a run folder: it has no {CONFIG}")
    return read_json(path)


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all."""
    aside = path.with_name(path.name + ".partial")
    aside.write_text(json.dumps(value, indent=1))
    os.replace(aside, path)


def flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of a nested mapping."""
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _within(key: str, groups: tuple[str, ...]) -> bool:
    return any(key == group or key.startswith(f"{group}.") for group in groups)
