"""`python -m benchmarks.speedrun`: how soon an autoencoder knows held-out cells. CPU-seconds, steps and cells of
training until it gives held-out cells back as well as a mark, by two scores over all genes: the negative
log-likelihood of validation cells, and W2 from test cells to one draw of each, reconstructed. W2 is taken in components
of the validation cells: those of the judged cells would hold their noise, which nobody can give back.

The marks are scVI's, trained on the same cells until it stops early; or one number of nats. Each trial is one choice of
words for `scldm train vae`, and a line in the folder's log. benchmarks/speedrun.md says what they showed.
Reading order: SpeedrunConfig, Scores and GivenBack, Course, main, the trial, the marks.
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
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
from threadpoolctl import threadpool_limits

from benchmarks.quality.__main__ import write_task
from benchmarks.quality.cells import Task, read_task
from benchmarks.quality.config import QualityConfig
from benchmarks.quality.judge import N_COMPONENTS
from benchmarks.quality.methods import scvi_tools
from benchmarks.quality.methods.gaussian import negative_binomial
from benchmarks.quality.methods.ours import shards_of
from benchmarks.quality.work import Place, say, trained_once
from benchmarks.report import Report, Row
from data_pipeline.stream.loader import CellLoader
from launch.cli import config_of
from launch.config import compose
from launch.evaluation.reconstructed_cells import reconstructed
from launch.run_data import library_sizes_of
from scldm.errors import InputError
from scldm.evaluate.cells import with_genes
from scldm.evaluate.metrics import score
from scldm.evaluate.reconstruction import nb_nll
from scldm.evaluate.space import Profile, fit_pca, log_normalise
from scldm.files import write_json
from scldm.parallel.surface import Engine
from scldm.pretrained import Pretrained
from scldm.train import loop
from scldm.train.ema import EMA
from scldm.train.losses import VAEStage

JUDGED = ("w2", "correlation_r")
MOST_CELLS = 2_000  # whose W2 is taken
COMMON = ("vae/tiny", "hardware/cpu", "hardware.engine=plain", "tracking.enabled=false", "gate=false")


@dataclass(frozen=True)
class SpeedrunConfig:
    """Cells, the mark and the trial.

    h5ad: file with raw counts
    conditions: obs columns that cells are generated for; scVI and splits know them
    out: folder of cells, shard set and log; kept from trial to trial
    n_top_genes: most variable genes of the training cells that are kept
    mark: nats a validation cell; 0 takes scVI's nats and W2, which needs scvi-tools
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


# --- scores --------------------------------------------------------------------------------------------------------


class Scores(NamedTuple):
    """nll: nats a validation cell. Of test cells given back, one draw each: w2, and r of gene-gene correlations within
    combinations."""

    nll: float
    w2: float
    r: float


class GivenBack:
    """Compares draws of reconstructed test cells with these cells, as `benchmarks.quality` compares."""

    def __init__(self, task: Task, seed: int) -> None:
        self.cells, self.seed = task.test.to_cells("test"), seed
        self.pca = fit_pca(log_normalise(task.validation.counts), N_COMPONENTS, 0)
        self.real = self.profile(self.cells.counts)

    def profile(self, counts: sp.csr_matrix) -> Profile:
        return Profile.of(counts, self.cells.types, self.pca)

    def scores(self, nll: float, drawn: sp.csr_matrix) -> Scores:
        found = score(self.real, self.profile(drawn), MOST_CELLS, self.seed, JUDGED)
        return Scores(nll, *(found[name] for name in JUDGED))

    def of_training(self, nll: float, stage: VAEStage, ema: EMA, loader: CellLoader) -> Scores:
        """Of the averaged weights of a training that is under way."""
        about = loader.manifest
        with ema.applied():
            vae = stage.module.eval()
            model = Pretrained(vae, None, loader.vocab, about.conditions, library_sizes_of(about), {}, "")
            drawn = with_genes(reconstructed(model, self.cells, self.seed), self.cells.genes).counts
            vae.train()
        return self.scores(nll, drawn)


@dataclass
class Course:
    """Validations of a trial: step, CPU-seconds of training before it, scores."""

    began: float = field(default_factory=time.process_time)
    validating: float = 0.0
    points: list[tuple[int, float, Scores]] = field(default_factory=list)

    def first_below(self, name: str, mark: float) -> tuple[int, float] | None:
        """Step and CPU-seconds of the first validation whose score is at or below the mark."""
        return next(((step, seconds) for step, seconds, of in self.points if getattr(of, name) <= mark), None)


def main(config: SpeedrunConfig) -> Report:
    quality = QualityConfig(config.h5ad, config.conditions, config.out, n_top_genes=config.n_top_genes)
    place, task = Place(quality), read_task(quality)
    if not place.cells.is_file():
        place.out.mkdir(parents=True, exist_ok=True)
        write_task(task, place.cells)
    torch.set_num_threads(1)
    with threadpool_limits(1):
        judge = GivenBack(task, config.seed)
        scvi = None if config.mark else scvi_marks(task, place, config.seed, judge)
        course = trial(config, task, place, judge)
    about = {"cells": Path(config.h5ad).name, "genes": len(task.genes), "training cells": len(task.train)}
    words = [f"h5ad={Path(config.h5ad).name}" if word.startswith("h5ad=") else word for word in sys.argv[1:]]
    command = shlex.join(["python", "-m", "benchmarks.speedrun", *words])
    report = Report("benchmarks.speedrun", {**about, "trial": config.name, "seed": config.seed}, command=command)
    add_rows(report, course, config, scvi, batch_of(config, place))
    written = {**report.to_json(), "course": [(step, seconds, *of) for step, seconds, of in course.points]}
    with (place.out / "log.jsonl").open("a") as log:
        log.write(json.dumps(written) + "\n")
    print(report.table())
    if config.save:
        write_json(Path(config.save), written)
    return report


def add_rows(
    report: Report, course: Course, config: SpeedrunConfig, scvi: tuple[Scores, float] | None, batch: int
) -> None:
    """scVI's scores, those of the trial's best validation by nats, and what it took to each mark."""
    marks: dict[str, float] = {"nll": config.mark} if scvi is None else {"nll": scvi[0].nll, "w2": scvi[0].w2}
    titles = {"nll": ("nats a validation cell", "nats"), "w2": ("W2 of reconstructed cells", "")}
    if scvi is not None:
        for name, (title, unit) in titles.items():
            report.add(Row(f"scVI: {title}", getattr(scvi[0], name), unit))
        report.add(Row("scVI: gene-gene correlation of reconstructed cells, r", scvi[0].r, ""))
        report.add(Row("scVI: CPU-seconds to its early stop", scvi[1], "s"))
    _, seconds, best = min(course.points, key=lambda point: point[2].nll)
    for name, (title, unit) in titles.items():
        value, mark = getattr(best, name), marks.get(name)
        named = f"best {title}" if name == "nll" else f"{title} then"
        report.add(Row(named, value, unit) if mark is None else Row.at_most(named, value, unit, round(mark, 2)))
    r = "gene-gene correlation of reconstructed cells then, r"
    report.add(Row(r, best.r, "") if scvi is None else Row.at_least(r, best.r, "", round(scvi[0].r, 3)))
    report.add(Row("CPU-seconds until then", seconds, "s"))
    for name, mark in marks.items():
        of = "the mark's nats" if name == "nll" else "the mark's W2"
        found = course.first_below(name, mark)
        if found is None:
            report.add(Row.not_measured(f"CPU-seconds to {of}", "it was not reached", "s"))
            continue
        seconds = (f"CPU-seconds to {of}", found[1], "s")
        report.add(Row(*seconds) if scvi is None else Row.at_most(*seconds, scvi[1]))
        report.add(Row(f"steps to {of}", found[0], "steps"))
        report.add(Row(f"cells to {of}", found[0] * batch, "cells"))


# --- the trial -----------------------------------------------------------------------------------------------------


def words_of(config: SpeedrunConfig, place: Place) -> list[str]:
    own = [f"data.shards={place.out}/shards", f"run_dir={place.out}/trial", f"train.seed={config.seed}"]
    return [*COMMON, *own, f"train.validate_every={config.every}", "train.save_every=1000000", *config.words]


def batch_of(config: SpeedrunConfig, place: Place) -> int:
    return config_of(importlib.import_module("launch.train_vae"), words_of(config, place)).train.global_batch


def trial(config: SpeedrunConfig, task: Task, place: Place, judge: GivenBack) -> Course:
    """Train as the verb does, in this process, with a clock around every validation."""
    if not (place.out / "shards").is_dir():
        shards_of(task, place, place.out / "shards")
    shutil.rmtree(place.out / "trial", ignore_errors=True)
    train_vae = importlib.import_module("launch.train_vae")
    n_steps = config_of(train_vae, words_of(config, place)).train.steps
    validate, course = loop.validate, Course()

    def timed(stage: VAEStage, engine: Engine, ema: EMA, loader: CellLoader, *given: Any) -> dict[str, float] | None:
        began = time.process_time()
        found = validate(stage, engine, ema, loader, *given)
        if found is not None:
            step = min(config.every * (len(course.points) + 1), n_steps)
            seconds = round(began - course.began - course.validating, 2)
            course.points.append((step, seconds, judge.of_training(found["nll"], stage, ema, loader)))
        course.validating += time.process_time() - began
        return found

    loop.validate = timed
    try:
        train_vae.main(config_of(train_vae, words_of(config, place)))
    finally:
        loop.validate = validate
        shutil.rmtree(place.out / "trial", ignore_errors=True)
    return course


# --- the marks -----------------------------------------------------------------------------------------------------


def scvi_marks(task: Task, place: Place, seed: int, judge: GivenBack) -> tuple[Scores, float]:
    """scVI's scores, at the mean of a cell's latent as ours, and the CPU-seconds of its training."""
    scvi_tools.check_installed()
    folder = place.model("scvi", seed)
    if (folder / "trained.json").is_file():
        say(f"{folder.name} was trained by an earlier trial, on this machine as it was then")
    note = trained_once(folder, lambda of: scvi_tools.train(task, seed, of, place))
    model = scvi_tools.Trained.load(task, folder, conditioned=False)
    nll = float(nb_nll(task.validation.counts, *model.expected(task.validation)).mean())
    drawn = negative_binomial(*model.expected(task.test), np.random.default_rng([seed, 14]))
    return judge.scores(nll, sp.csr_matrix(drawn)), note["cpu_s"]


if __name__ == "__main__":
    main(compose(SpeedrunConfig, sys.argv[1:]))
