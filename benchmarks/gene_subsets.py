"""`python -m benchmarks.gene_subsets`: how many genes an autoencoder should be given at a step. One that is trained on
all genes, on a half, a quarter and a sixteenth, each for the same CPU time, by what it then knows of held-out cells
over all genes.

A trial is one of `benchmarks.speedrun`, with the steps that the CPU time allows.
Reading order: BenchGeneSubsetsConfig, main, steps_for, trial.
"""

from __future__ import annotations

import statistics
import sys
from dataclasses import dataclass

import torch
from threadpoolctl import threadpool_limits

from benchmarks.quality.__main__ import write_task
from benchmarks.quality.cells import Task, read_task
from benchmarks.quality.config import QualityConfig
from benchmarks.quality.work import Place
from benchmarks.report import Report, Row, run_benchmark
from benchmarks.speedrun import GivenBack, Scores, SpeedrunConfig
from benchmarks.speedrun import trial as trial_of
from scldm.errors import InputError

PURPOSE = """Train an autoencoder on parts of the genes, each part for the same CPU time, and compare what each knows of
held-out cells over all genes."""
EXAMPLE = """
python -m benchmarks.gene_subsets h5ad=pbmc3k.h5ad conditions=cell_type out=runs/gene-subsets
"""
PROBE = (5, 30)  # steps of two short trials, of which the time of a step is taken
LEAST_STEPS = 20
NEVER = 1_000_000


@dataclass(frozen=True)
class BenchGeneSubsetsConfig:
    """What to measure.

    h5ad: file with raw counts
    conditions: obs columns that splits know, and within which correlations are taken
    out: folder of cells and shard set
    n_top_genes: most variable genes of the training cells that are kept
    shares: parts of the genes that are given and asked
    seconds: CPU-seconds of a training, with its set-up
    seeds: of the trainings
    words: more words for `scldm train vae`
    json: print JSON, not the table
    save: write the JSON to this file as well
    """

    h5ad: str
    conditions: tuple[str, ...]
    out: str
    n_top_genes: int = 2_000
    shares: tuple[float, ...] = (1.0, 0.5, 0.25, 0.0625)
    seconds: float = 75.0
    seeds: tuple[int, ...] = (0, 1)
    words: tuple[str, ...] = ()
    json: bool = False
    save: str = ""

    def __post_init__(self) -> None:
        if not self.shares or not all(0 < share <= 1 for share in self.shares):
            raise InputError(f"shares={','.join(map(str, self.shares))} must be above 0 and at most 1, at least one")
        if not self.seconds > 0:
            raise InputError(f"seconds={self.seconds} must be above 0")
        if not self.seeds:
            raise InputError("seeds must name at least one")


CONFIG = BenchGeneSubsetsConfig


def main(config: BenchGeneSubsetsConfig) -> Report:
    """Print the table; returns it."""
    torch.set_num_threads(1)
    quality = QualityConfig(config.h5ad, config.conditions, config.out, n_top_genes=config.n_top_genes)
    place, task = Place(quality), read_task(quality)
    if not place.cells.is_file():
        place.out.mkdir(parents=True, exist_ok=True)
        write_task(task, place.cells)
    about = {"genes": len(task.genes), "training cells": len(task.train)}
    report = Report(
        "gene_subsets", {**about, "seconds": config.seconds, "words": " ".join(config.words)}, save=config.save
    )
    with threadpool_limits(1):
        judge = GivenBack(task, 0)
        for share in config.shares:
            steps, found = steps_for(config, share, task, place, judge), []
            for seed in config.seeds:
                seconds, scores = trial(config, share, seed, steps, task, place, judge)
                found.append(scores)
                report.add(Row(f"{share:g} of the genes, seed {seed}: nats a validation cell", scores.nll, "nats"))
                report.add(Row(f"{share:g} of the genes, seed {seed}: W2 of reconstructed cells", scores.w2, ""))
                report.add(Row(f"{share:g} of the genes, seed {seed}: CPU-seconds", seconds, "s"))
            report.add(Row(f"{share:g} of the genes: steps", steps, "steps"))
            for name, title, unit in (("nll", "nats", "nats"), ("w2", "W2", ""), ("r", "gene-gene r", "")):
                mean = statistics.mean(getattr(of, name) for of in found)
                report.add(Row(f"{share:g} of the genes: {title}, mean", mean, unit))
    report.print(config.json)
    return report


def steps_for(config: BenchGeneSubsetsConfig, share: float, task: Task, place: Place, judge: GivenBack) -> int:
    """Steps that take the CPU time, by two short trials. A third one before them pays for what is compiled."""
    trial(config, share, 0, PROBE[0], task, place, judge)
    few, more = (trial(config, share, 0, n, task, place, judge)[0] for n in PROBE)
    step_s = max((more - few) / (PROBE[1] - PROBE[0]), 1e-4)
    return max(LEAST_STEPS, round((config.seconds - few) / step_s) + PROBE[0])


def trial(
    config: BenchGeneSubsetsConfig, share: float, seed: int, steps: int, task: Task, place: Place, judge: GivenBack
) -> tuple[float, Scores]:
    """CPU-seconds, and the scores after the last step."""
    words = (
        f"data.given.share={share}", "train.ema_decay=0.99", "train.patience=0", f"train.steps={steps}", *config.words
    )  # fmt: skip
    of = SpeedrunConfig(config.h5ad, config.conditions, config.out, words=words, every=NEVER, seed=seed)
    ((_, seconds, scores),) = trial_of(of, task, place, judge).points
    return seconds, scores


if __name__ == "__main__":
    sys.exit(run_benchmark("gene_subsets"))
