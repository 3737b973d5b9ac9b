"""`python -m benchmarks.speedrun`: how soon an autoencoder knows held-out cells. CPU-seconds, steps and cells of
training until the validation cells' negative log-likelihood, over all genes, falls to a mark.

The mark is scVI's, trained on the same cells until it stops early; or a number. Each trial is one choice of words for
`scldm train vae`, and a line in the folder's log; what they showed is written up in benchmarks/speedrun.md.
Reading order: SpeedrunConfig, main, the trial, the mark.
"""

from __future__ import annotations

import importlib
import json
import shlex
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from threadpoolctl import threadpool_limits

from benchmarks.quality.__main__ import write_task
from benchmarks.quality.cells import Task, read_task
from benchmarks.quality.config import QualityConfig
from benchmarks.quality.methods import scvi_tools
from benchmarks.quality.methods.ours import shards_of
from benchmarks.quality.work import Place, say, trained_once
from benchmarks.report import Report, Row
from launch.cli import config_of
from launch.config import compose
from scldm.errors import InputError, read_json
from scldm.files import write_json
from scldm.train import loop

COMMON = ("vae/tiny", "hardware/cpu", "hardware.engine=plain", "tracking.enabled=false", "gate=false")


@dataclass(frozen=True)
class SpeedrunConfig:
    """Cells, the mark and the trial.

    h5ad: file with raw counts
    conditions: obs columns that cells are generated for; scVI and splits know them
    out: folder of cells, shard set and log; kept from trial to trial
    n_top_genes: most variable genes of the training cells that are kept
    mark: nats a validation cell; 0 takes scVI's, which needs scvi-tools
    name: of the trial, in the log
    words: for `scldm train vae`
    every: steps between two validations, which are not counted; the set-up and the saving of a best checkpoint are
    seed: of the trial
    save: write the JSON to this file as well
    """

    h5ad: str
    conditions: tuple[str, ...]
    out: str
    n_top_genes: int = 2_000
    mark: float = 0.0
    name: str = "as it is"
    words: tuple[str, ...] = ()
    every: int = 50
    seed: int = 0
    save: str = ""

    def __post_init__(self) -> None:
        if self.every < 1:
            raise InputError(f"every={self.every} must be at least 1")


@dataclass
class Course:
    """Validations of a trial: step, CPU-seconds of training before it, nats a cell."""

    began: float = field(default_factory=time.process_time)
    validating: float = 0.0
    points: list[tuple[int, float, float]] = field(default_factory=list)

    def first_below(self, mark: float) -> tuple[int, float] | None:
        """Step and CPU-seconds of the first validation at or below the mark."""
        return next(((step, seconds) for step, seconds, nll in self.points if nll <= mark), None)


def main(config: SpeedrunConfig) -> Report:
    quality = QualityConfig(config.h5ad, config.conditions, config.out, n_top_genes=config.n_top_genes)
    place, task = Place(quality), read_task(quality)
    if not place.cells.is_file():
        place.out.mkdir(parents=True, exist_ok=True)
        write_task(task, place.cells)
    torch.set_num_threads(1)
    with threadpool_limits(1):
        mark, mark_s = (config.mark, None) if config.mark else scvi_mark(task, place, config.seed)
        course = trial(config, task, place)
    about = {"cells": Path(config.h5ad).name, "genes": len(task.genes), "training cells": len(task.train)}
    words = [f"h5ad={Path(config.h5ad).name}" if word.startswith("h5ad=") else word for word in sys.argv[1:]]
    command = shlex.join(["python", "-m", "benchmarks.speedrun", *words])
    report = Report("benchmarks.speedrun", {**about, "trial": config.name, "seed": config.seed}, command=command)
    best = min(course.points, key=lambda point: point[2])
    report.add(Row.at_most("best nats a validation cell", best[2], "nats", round(mark, 2)))
    report.add(Row("CPU-seconds until then", best[1], "s"))
    found = course.first_below(mark)
    if found is None:
        report.add(Row.not_measured("CPU-seconds to the mark", "it was not reached", "s"))
    elif mark_s is None:
        report.add(Row("CPU-seconds to the mark", found[1], "s"))
    else:
        report.add(Row.at_most("CPU-seconds to the mark", found[1], "s", mark_s))
    if found is not None:
        batch = config_of(importlib.import_module("launch.train_vae"), words_of(config, place)).train.global_batch
        report.add(Row("steps to the mark", found[0], "steps"))
        report.add(Row("cells to the mark", found[0] * batch, "cells"))
    written = {**report.to_json(), "mark": mark, "course": course.points}
    with (place.out / "log.jsonl").open("a") as log:
        log.write(json.dumps(written) + "\n")
    print(report.table())
    if config.save:
        write_json(Path(config.save), written)
    return report


# --- the trial -----------------------------------------------------------------------------------------------------


def words_of(config: SpeedrunConfig, place: Place) -> list[str]:
    own = [f"data.shards={place.out}/shards", f"run_dir={place.out}/trial", f"train.seed={config.seed}"]
    return [*COMMON, *own, f"train.validate_every={config.every}", "train.save_every=1000000", *config.words]


def trial(config: SpeedrunConfig, task: Task, place: Place) -> Course:
    """Train as the verb does, in this process, with a clock around every validation."""
    if not (place.out / "shards").is_dir():
        shards_of(task, place, place.out / "shards")
    shutil.rmtree(place.out / "trial", ignore_errors=True)
    train_vae = importlib.import_module("launch.train_vae")
    n_steps = config_of(train_vae, words_of(config, place)).train.steps
    validate, course = loop.validate, Course()

    def timed(*given: Any) -> dict[str, float] | None:
        began = time.process_time()
        found = validate(*given)
        if found is not None:
            step = min(config.every * (len(course.points) + 1), n_steps)
            course.points.append((step, round(began - course.began - course.validating, 2), found["nll"]))
        course.validating += time.process_time() - began
        return found

    loop.validate = timed
    try:
        train_vae.main(config_of(train_vae, words_of(config, place)))
    finally:
        loop.validate = validate
        shutil.rmtree(place.out / "trial", ignore_errors=True)
    return course


# --- the mark ------------------------------------------------------------------------------------------------------


def scvi_mark(task: Task, place: Place, seed: int) -> tuple[float, float]:
    """scVI's nats a validation cell, at the mean of a cell's latent as ours, and the CPU-seconds of its training."""
    scvi_tools.check_installed()
    folder = place.model("scvi", seed)
    if (folder / "trained.json").is_file():
        say(f"{folder.name} was trained by an earlier trial, on this machine as it was then")
    note = trained_once(folder, lambda of: scvi_tools.train(task, seed, of, place))
    path = folder / "validation_nll.json"
    if not path.is_file():
        found = scvi_tools.Trained.load(task, folder, conditioned=False).nll(task.validation)
        path.write_text(json.dumps(found))
    return float(read_json(path)), note["cpu_s"]


if __name__ == "__main__":
    main(compose(SpeedrunConfig, sys.argv[1:]))
