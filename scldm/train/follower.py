"""A place where runs are followed: MLflow (mlflow_run.py) is one, TensorBoard (tensorboard.py) is another.

All that is known of a run lies in its folder first. A Follower sends what its place lacks of it. For a place of your
own, subclass Follower, give it `send`, and name it: `tracking.also=mylab.followers:OurTracker`.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from scldm.errors import InputError, read_json
from scldm.files import write_json
from scldm.given_json import Count, typed

METRICS, SYSTEM = "metrics.jsonl", "system.jsonl"
SYSTEM_OF = "system"  # folder with a file of each node but the first, see machine.py
ROWS_AT_ONCE = 200  # rows sent between two notes of how far. At 20 metrics a row, they are 4 requests of MLflow


class Follower(ABC):
    """Made with the run's folder before training begins: what it lacks, such as a package, it says by raising there.

    In the folder are config.json, tracked.json (parameters, tags, data sets, artifacts and the state, as tracked.py
    says) and rows of metrics: {"step", "time", "split", NAME: number or null}. No secret is in any of them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @abstractmethod
    def send(self) -> None:
        """Send what the place lacks. Called in a background thread every `tracking.every_s`, and once at the end.

        It may raise anything: the first failure is told, and it is called again. Training never waits for it.
        """

    def new_rows(self) -> Iterator[list[dict[str, Any]]]:
        """Rows that were not sent, some at a time. They count as sent when the next are asked for, across restarts."""
        kind = type(self)
        state = self.folder / f"followed_by-{kind.__module__}.{kind.__qualname__}.json"
        sent: dict[str, int] = {}
        try:
            sent = typed(dict[str, Count], read_json(state), str(state)) if state.is_file() else {}
        except InputError as error:
            say_once(state, f"{error}. All rows are sent again")
        for name in row_files(self.folder):
            for rows, end in rows_from(self.folder / name, sent.get(name, 0)):
                yield rows
                sent[name] = end
                write_json(state, sent)


def follower_named(name: str) -> type[Follower]:
    """Raises: InputError for a module that is not found, and for what is no Follower. ModuleNotFoundError where the
    module needs a package that is not there."""
    module, _, kind = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), kind, None)
    except ModuleNotFoundError as error:
        if not f"{module}.".startswith(f"{error.name}."):
            raise
        raise InputError(
            f"tracking.also={name}: no module {error.name!r} is found. PYTHONPATH must name the folder that it lies "
            "in, unless it is installed"
        ) from None
    if not (isinstance(found, type) and issubclass(found, Follower)):
        raise InputError(
            f"tracking.also={name}: {module} has no class {kind!r} that is a scldm.train.follower.Follower"
        )
    return found


_unreadable: set[Path] = set()


def row_files(folder: Path) -> list[str]:
    """The files of a run that hold rows, from its folder."""
    return [METRICS, SYSTEM, *sorted(f"{SYSTEM_OF}/{path.name}" for path in (folder / SYSTEM_OF).glob("*.jsonl"))]


def append_row(file: Any, step: int, more: Mapping[str, Any], metrics: Mapping[str, Any], split: str) -> None:
    """Write one row, now. What is not finite is null. Raises: OSError."""
    row = {"step": int(step), **more, "time": round(time.time(), 3), "split": split}
    data = (json.dumps(row | {name: _number(value) for name, value in metrics.items()}) + "\n").encode()
    end = file.seek(0, os.SEEK_END)
    if file.write(data) != len(data):  # a full disk takes a part: no half row may stay
        file.truncate(end)
        raise OSError("no space left")


def _number(value: Any) -> float | int | None:
    number = value if isinstance(value, int) else float(value)
    return number if math.isfinite(number) else None


def rows_from(path: Path, start: int) -> Iterator[tuple[list[dict[str, Any]], int]]:
    """Complete rows from an offset on, some at a time, with the offset they end at."""
    if not path.exists():
        return
    with path.open("rb") as file:
        end = file.seek(min(start, path.stat().st_size))
        while True:
            rows, start = list[dict[str, Any]](), end
            for _ in range(ROWS_AT_ONCE):
                line = file.readline()
                if not line.endswith(b"\n"):
                    break
                end += len(line)
                if (row := row_of(line, path)) is not None:
                    rows.append(row)
            if end == start:
                return
            yield rows, end


def row_of(line: bytes, path: Path) -> dict[str, Any] | None:
    """A row, as `log` writes them. None for a line that is not one, as a machine that went down may leave it. That is
    told once for a file: no run ends, and no other row is lost, for want of it."""
    try:
        row = json.loads(line)
        if isinstance(row["step"], int) and isinstance(row["time"], int | float) and isinstance(row["split"], str):
            return row
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    say_once(path, f"{path} has lines that are no rows. They are passed over")
    return None


def say_once(path: Path, text: str) -> None:
    """What is wrong with a file, once in a process."""
    if path not in _unreadable:
        _unreadable.add(path)
        say(text)


def say(text: str) -> None:
    print(f"tracking: {text}", file=sys.stderr, flush=True)
