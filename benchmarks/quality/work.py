"""Rows and trained models that are made once: a folder counts when its note is there, and the note is written last.

An interrupted row or training starts over, because CPU time is only comparable when it is spent in one go.
Reading order: Clock, Made, Place, trained_once, run_row.
"""

from __future__ import annotations

import json
import resource
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from benchmarks.quality.cells import LabelledCells, Task
from benchmarks.quality.config import QualityConfig
from scldm.errors import read_json
from scldm.files import made_aside, write_json

FIRST_STAGE = 0.7  # share of the CPU time that an autoencoder may take where a flow is trained after it


class Clock:
    """CPU-seconds of this process and of its children that have ended, and wall seconds, since it was made."""

    def __init__(self) -> None:
        self._cpu, self._wall = self._used(), time.monotonic()

    @staticmethod
    def _used() -> float:
        of = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        return sum(usage.ru_utime + usage.ru_stime for usage in of)

    @property
    def cpu_s(self) -> float:
        return self._used() - self._cpu

    @property
    def wall_s(self) -> float:
        return time.monotonic() - self._wall


@dataclass(frozen=True)
class Made:
    """Cells of a method.

    counts: CSR of whole numbers (cells, genes of the task)
    labels: a column for each condition
    impossible: combination -> why the method has none of it
    train_cpu_s: CPU-seconds of what was trained while these were made
    facts: steps, best validation loss and the like, for the row's note
    """

    counts: sp.csr_matrix
    labels: pd.DataFrame
    impossible: dict[str, str] = field(default_factory=dict)
    train_cpu_s: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Place:
    """Where the benchmark works and with what."""

    config: QualityConfig

    @property
    def out(self) -> Path:
        return Path(self.config.out)

    @property
    def cells(self) -> Path:
        """The task's cells as a file."""
        return self.out / "cells.h5ad"

    def row(self, method: str, seed: int) -> Path:
        return self.out / f"{method}-{seed}"

    def model(self, name: str, seed: int) -> Path:
        return self.out / "models" / f"{name}-{seed}"


def trained_once(folder: Path, train: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """What `train` says of its training, with the CPU time that it took. A folder with a note is not trained again."""
    note = folder / "trained.json"
    if not note.is_file():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        say(f"trains {folder.name}")
        clock = Clock()
        facts = train(folder)
        write_json(note, {**facts, "cpu_s": round(clock.cpu_s, 1), "wall_s": round(clock.wall_s, 1)})
    return read_json(note)


def run_row(
    folder: Path, task: Task, name: str, training: dict[str, Any], draw: Callable[[], Made], seed: int
) -> dict[str, Any]:
    """The row's note. A folder with one is finished, and `draw` is not called.

    training: note of the model that the method needs; empty for none
    """
    note = folder / "row.json"
    if note.is_file():
        return read_json(note)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    say(f"draws {folder.name}")
    clock = Clock()
    made = draw()
    drawn_cpu_s, wall_s = clock.cpu_s - made.train_cpu_s, clock.wall_s
    check(made, task)
    write_cells(made, task, folder / "generated.h5ad")
    stages = {key: value for key, value in training.items() if key not in ("cpu_s", "wall_s")}
    row = {
        "method": name,
        "seed": seed,
        "train_cpu_s": round(training.get("cpu_s", 0.0) + made.train_cpu_s, 1),
        "draw_cpu_s": round(drawn_cpu_s, 1),
        "wall_s": round(training.get("wall_s", 0.0) + wall_s, 1),
        "impossible": made.impossible,
        **stages,
        **made.facts,
    }
    write_json(note, row)
    return row


def check(made: Made, task: Task) -> None:
    """A method makes whole numbers, and of each combination that it can as many cells as are tested."""
    values = made.counts.data
    assert (values >= 0).all(), "negative counts"
    assert (values == np.rint(values)).all(), "counts that are not whole"
    assert made.counts.shape == (len(made.labels), len(task.genes))
    found = LabelledCells(made.counts, made.labels, task.genes).numbers()
    wanted = {key: n for key, n in task.numbers.items() if key not in made.impossible}
    assert all(n <= wanted[key] for key, n in found.items()), (found, wanted)
    assert set(found) == set(wanted), (found, wanted)


def write_cells(made: Made, task: Task, path: Path) -> None:
    """The cells as h5ad, whole or not at all."""
    adata = LabelledCells(made.counts, made.labels, task.genes).to_anndata()
    adata.X = sp.csr_matrix(adata.X, dtype=np.int32)
    with made_aside(path) as part:
        adata.write_h5ad(part, compression="gzip")


def settings_note(place: Place, settings: dict[str, Any]) -> list[str]:
    """What differs from the settings with which the folder's rows were made; nothing for a new folder."""
    path = place.out / "quality.json"
    settings = json.loads(json.dumps(settings))
    if not path.is_file():
        place.out.mkdir(parents=True, exist_ok=True)
        write_json(path, settings)
    before = read_json(path)
    return [f"{k} was {before.get(k)!r}, now {v!r}" for k, v in settings.items() if before.get(k) != v]


def labels_frame(task: Task, keys: np.ndarray) -> pd.DataFrame:
    """Labels of combinations given by name, a row for each."""
    return pd.DataFrame([task.labels_of[key] for key in keys], columns=pd.Index(task.conditions))


def say(text: str) -> None:
    print(f"quality: {text}", file=sys.stderr, flush=True)
