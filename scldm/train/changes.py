"""What changed the course of a run, in `changes.json` of its folder: where it branched off, and which keys changed.

    [{"step": 1500, "time": ..., "branched_from": "/runs/vae", "changed": {"optim.lr": [0.001, 0.0003]}},
     {"step": 4000, "time": ..., "changed": {"train.steps": [5000, 9000]}}]

A change holds from its step on. Only a run whose course was changed has the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from scldm.files import write_json
from scldm.given_json import Count, read_entries

CHANGES = "changes.json"


def read(run_dir: Path) -> list[dict[str, Any]]:
    """All changes of a run's course, in their order."""
    return read_entries(_Change, run_dir / CHANGES)


@dataclass(frozen=True)
class _Change:
    step: Count
    changed: dict[str, tuple[Any, Any]]


def note(run_dir: Path, step: int, changed: Mapping[str, tuple[Any, Any]], branched_from: Path | None = None) -> None:
    """Add a change, or begin with a branch: key -> (before, now)."""
    parent = {} if branched_from is None else {"branched_from": str(branched_from)}
    time = datetime.now(UTC).isoformat(timespec="seconds")
    entry = {"step": step, "time": time, **parent, "changed": {key: list(both) for key, both in changed.items()}}
    write_json(run_dir / CHANGES, [*([] if parent else read(run_dir)), entry])


def told(entry: Mapping[str, Any]) -> str:
    """A change in words."""
    changes = [f"{key} was {before!r}, is {now!r}" for key, (before, now) in entry["changed"].items()]
    if parent := entry.get("branched_from"):
        changes.insert(0, f"branched from {parent}")
    return f"at step {entry['step']}: {'; '.join(changes)}"
