"""Cells of combinations that were never trained, beside real ones and what anyone could guess.

Cells of some types under a treatment are held out, of all donors; both stages are trained on the rest, and the held-out
combinations are generated, from noise and from the control cells of their type. A guess that begins with real control
cells is the harder one to beat: it has their noise, as no network has.
Reading order: BenchUnseenConfig, main, the runs, the cells, the rivals, the table.
"""

from __future__ import annotations

import csv
import itertools
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
from sklearn.decomposition import PCA

import scldm
from benchmarks.report import Report, Row, run_benchmark
from benchmarks.resampled import METRICS, resampled
from launch.evaluation.cells import cells_of_shards
from launch.quickstart import Stages
from scldm.errors import InputError
from scldm.evaluate.distances import mmd2, w2
from scldm.evaluate.markers import log2_fold_change
from scldm.evaluate.space import fit_pca, log_normalise
from scldm.flow.sampler import SamplerConfig
from scldm.pretrained import Pretrained

PURPOSE = """Hold treated cells of some types out of training, generate them, and compare: fold changes of genes that
are known to respond, and MMD2 and W2 to the real cells beside three guesses. Trains both stages; run again, it goes
on."""
EXAMPLE = """
python -m benchmarks.unseen h5ad=kang.h5ad out=runs/unseen
python -m benchmarks.unseen h5ad=kang.h5ad out=runs/unseen vae=[train.steps=4500] ldm=[model.condition_means=true]
python -m benchmarks.unseen h5ad=kang.h5ad out=runs/unseen sampler.guidance=compositional save=benchmarks/unseen.json
"""
NOTE = "unseen.json"


@dataclass(frozen=True)
class BenchUnseenConfig:
    """The cells, what is held out of them, and how both stages are trained. Defaults are those of Kang et al. 2018 as
    in muscat: control and IFN-beta, five types of blood cells.

    h5ad: file with raw counts
    out: folder of everything that it makes
    type: obs column of the cell types
    treatment: obs column of the treatment
    control: its label of untreated cells
    treated: its label of treated cells
    sample: obs column whose last characters name the donor
    donor_characters: how many
    held_out: types whose treated cells are held out
    genes: genes that respond
    seed: of both trainings
    vae: more words for `scldm train vae`
    ldm: more words for `scldm train ldm`
    repeats: draws of generated and real cells; the table has means
    bootstrap: samples of their cells, of which the intervals are taken
    json: print JSON, not the table
    save: write the JSON to this file as well
    """

    h5ad: str
    out: str
    type: str = "cell_type"
    treatment: str = "condition"
    control: str = "ctrl"
    treated: str = "stim"
    sample: str = "sample"
    donor_characters: int = 3
    held_out: tuple[str, ...] = ("B cells", "CD14+ Monocytes")
    genes: tuple[str, ...] = ("ISG15", "IFIT1", "IFIT3", "IFI6", "MX1")
    seed: int = 0
    vae: tuple[str, ...] = ()
    ldm: tuple[str, ...] = ()
    sampler: SamplerConfig = field(default_factory=lambda: SamplerConfig(n_steps=20))
    repeats: int = 5
    bootstrap: int = 200
    json: bool = False
    save: str = ""


CONFIG = BenchUnseenConfig


def main(config: BenchUnseenConfig) -> Report:
    """Print the table; returns it."""
    out = Path(config.out)
    train_both(config, out)
    model = scldm.load(out / "model")
    train, validation, test = real_cells(config, str(out / "shards"))
    pca = fit_pca(validation.log)
    report = Report("unseen", {"held out": " and ".join(config.held_out), "repeats": config.repeats}, save=config.save)
    report.settings |= {"guidance": config.sampler.guidance, "scale": config.sampler.guidance_scale}
    report.settings |= {"steps": config.sampler.n_steps, "seed": config.seed}
    report.settings |= {"vae": " ".join(config.vae), "ldm": " ".join(config.ldm)}
    for kind in config.held_out:
        compare(config, model, kind, train, test, pca, report)
    report.print(config.json)
    return report


# --- the runs ------------------------------------------------------------------------------------------------------


def train_both(config: BenchUnseenConfig, out: Path) -> None:
    """Shards without the held-out cells in training, both stages, the model folder; what is finished is not repeated.

    Raises: InputError where the folder holds another run.
    """
    settings = {
        name: getattr(config, name)
        for name in ("h5ad", "type", "treatment", "control", "treated", "sample", "donor_characters", "seed")
    }
    settings |= {name: list(getattr(config, name)) for name in ("held_out", "vae", "ldm")}
    out.mkdir(parents=True, exist_ok=True)
    note = {**settings, "stages": {}}
    if (out / NOTE).is_file():
        note = json.loads((out / NOTE).read_text())
        changed = [f"{key} was {note[key]!r}, now {value!r}" for key, value in settings.items() if note[key] != value]
        if changed:
            raise InputError(f"{out} holds another run: {changed[0]}; choose another out")
    todo = Stages(out, note, NOTE)
    todo.call("cells", "name the donor of every cell", lambda: write_cells(config, out))
    conditions = json.dumps([config.type, "donor", config.treatment])
    todo.verb("shards", "shards write", [
        f"source.paths={out}/cells.h5ad", f"out={out}/shards", "block_cells=64", f"conditions={conditions}",
        f"split.held_out={out}/held_out.csv", "split.validation=0.15", "split.test=0", f"split.stratify={conditions}",
    ])  # fmt: skip
    common = ["hardware/cpu", "hardware.engine=plain", "tracking.enabled=false", f"train.seed={config.seed}"]
    todo.verb("vae", "train vae", [
        "vae/tiny", *common, f"data.shards={out}/shards", "data.given.n_genes=423", f"run_dir={out}/vae", *config.vae,
    ])  # fmt: skip
    todo.verb("latents", "encode", [f"vae={out}/vae", f"shards={out}/shards", f"out={out}/latents"])
    todo.verb(
        "ldm", "train ldm", ["ldm/tiny", *common, f"data.shards={out}/latents", f"run_dir={out}/ldm", *config.ldm]
    )
    todo.verb("model", "export", [f"vae={out}/vae", f"ldm={out}/ldm", f"out={out}/model"])


def write_cells(config: BenchUnseenConfig, out: Path) -> None:
    """The file with an obs column `donor`, and the table of held-out combinations."""
    adata = ad.read_h5ad(config.h5ad)
    for column in (config.type, config.treatment, config.sample):
        if column not in adata.obs:
            raise InputError(f"h5ad={config.h5ad}: obs has no column {column!r}; it has {', '.join(adata.obs.columns)}")
    donors = adata.obs[config.sample].astype(str).str[-config.donor_characters :]
    adata.obs["donor"] = donors.astype("category")
    adata.write_h5ad(out / "cells.h5ad")
    with (out / "held_out.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow([config.type, "donor", config.treatment])
        rows.writerows((*pair, config.treated) for pair in itertools.product(config.held_out, sorted(set(donors))))


# --- the cells -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Labelled:
    """counts: CSR; obs: type, donor, treatment, a row per cell."""

    counts: sp.csr_matrix
    obs: pd.DataFrame
    genes: tuple[str, ...]

    @cached_property
    def log(self) -> sp.csr_matrix:
        """log1p of counts per 10,000."""
        return log_normalise(self.counts)

    def rows(self, **labels: str) -> np.ndarray:
        """Indices of the cells with these labels."""
        return np.flatnonzero(np.logical_and.reduce([self.obs[c].to_numpy() == v for c, v in labels.items()]))


def real_cells(config: BenchUnseenConfig, url: str) -> tuple[Labelled, Labelled, Labelled]:
    """Training, validation and test cells."""
    columns = {"type": config.type, "donor": "donor", "treatment": config.treatment}
    train, validation, test = (
        Labelled(cells.counts, pd.DataFrame({n: cells.labels[c] for n, c in columns.items()}), cells.genes)
        for cells in cells_of_shards(url, list(columns.values()))
    )
    return train, validation, test


def generated(config: BenchUnseenConfig, model: Pretrained, numbers: Mapping[tuple, int], seed: int) -> sp.csr_matrix:
    """Log-normalised cells of each (type, donor, treatment), as many as asked for."""
    rows = [key for key, n in numbers.items() for _ in range(n)]
    wanted = pd.DataFrame(dict(zip((config.type, "donor", config.treatment), zip(*rows, strict=True), strict=True)))
    made = model.generate(wanted, seed=seed, sampler=config.sampler)
    return log_normalise(sp.csr_matrix(made.X))


def taken_over(
    config: BenchUnseenConfig, model: Pretrained, kind: str, train: Labelled, numbers: Mapping[str, int], seed: int
) -> sp.csr_matrix:
    """Log-normalised control cells of the type as `transform` takes them to the treatment, of each donor as many as
    asked for."""
    rng = np.random.default_rng([seed, config.seed])
    of = [train.rows(type=kind, donor=donor, treatment=config.control) for donor in numbers]
    rows = np.concatenate([rng.choice(own, n, replace=False) for own, n in zip(of, numbers.values(), strict=True)])
    obs = train.obs.iloc[rows].rename(columns={"type": config.type, "treatment": config.treatment})
    obs.index = pd.Index([str(k) for k in range(len(rows))])
    control = ad.AnnData(train.counts[rows].astype(np.float32), obs=obs, var=pd.DataFrame(index=pd.Index(train.genes)))
    moved = model.transform(control, {config.treatment: config.treated}, seed=seed, sampler=config.sampler)
    return log_normalise(sp.csr_matrix(moved.X))


# --- the rivals ----------------------------------------------------------------------------------------------------

OURS = ("generated", "control cells of the type, transformed")
RIVALS = ("control cells of the type", "treated cells of other types", "control cells + mean log-shift of other types")


def rivals(
    config: BenchUnseenConfig, kind: str, train: Labelled, numbers: Mapping[str, int], rng: np.random.Generator
) -> list[np.ndarray]:
    """Log-normalised expression of what could be guessed from the training cells, (n, genes) each, donor by donor.

    The shift of a gene is the mean over the other types of the difference of its mean log expression, treated less
    control; it may make a cell's value negative.
    """
    others = sorted(set(train.obs["type"]) - set(config.held_out))

    def draw(n: int, rows: np.ndarray) -> np.ndarray:
        return rng.choice(rows, n, replace=False)

    def mean(rows: np.ndarray) -> np.ndarray:
        return np.asarray(train.log[rows].mean(0)).ravel()

    control = [draw(n, train.rows(type=kind, donor=donor, treatment=config.control)) for donor, n in numbers.items()]
    elsewhere = [
        draw(n, np.concatenate([train.rows(type=t, donor=donor, treatment=config.treated) for t in others]))
        for donor, n in numbers.items()
    ]
    shifts = [
        mean(train.rows(type=t, treatment=config.treated)) - mean(train.rows(type=t, treatment=config.control))
        for t in others
    ]
    own = train.log[np.concatenate(control)].toarray()
    return [own, train.log[np.concatenate(elsewhere)].toarray(), own + np.mean(shifts, axis=0)]


# --- the table -----------------------------------------------------------------------------------------------------


def compare(
    config: BenchUnseenConfig,
    model: Pretrained,
    kind: str,
    train: Labelled,
    test: Labelled,
    pca: PCA,
    report: Report,
) -> None:
    """Rows of one held-out type. All sets have as many cells of each donor as the smallest of them."""
    donors = sorted(set(test.obs["donor"]))
    numbers = {
        donor: min(
            len(test.rows(type=kind, donor=donor)), len(train.rows(type=kind, donor=donor, treatment=config.control))
        )
        for donor in donors
    }
    scores: dict[str, list[tuple[float, float]]] = {}
    changes, drawn = [], []
    for repeat in range(config.repeats):
        rng = np.random.default_rng([config.seed, repeat])
        real = test.log[
            np.concatenate([rng.choice(test.rows(type=kind, donor=d), n, replace=False) for d, n in numbers.items()])
        ]
        reference = pca.transform(real)
        made = generated(config, model, {(kind, d, config.treated): n for d, n in numbers.items()}, repeat)
        made_control = generated(config, model, {(kind, d, config.control): n for d, n in numbers.items()}, repeat)
        changes.append(fold_changes(made, made_control, config, train.genes))
        sets = dict(zip(RIVALS, rivals(config, kind, train, numbers, rng), strict=True))
        moved = taken_over(config, model, kind, train, numbers, repeat)
        sets = dict(zip(OURS, (made.toarray(), moved.toarray()), strict=True)) | sets
        drawn.append((reference, {name: pca.transform(log) for name, log in sets.items()}))
        for name, components in drawn[-1][1].items():
            scores.setdefault(name, []).append((mmd2(reference, components), w2(reference, components)))
    true = fold_changes(
        test.log[test.rows(type=kind)], train.log[train.rows(type=kind, treatment=config.control)], config, train.genes
    )
    for gene, found, expected in zip(config.genes, np.mean(changes, axis=0), true, strict=True):
        report.add(Row(f"{kind}: log2 fold change of {gene}, real", float(expected), ""))
        report.add(Row(f"{kind}: log2 fold change of {gene}, generated", float(found), "", "> 0", bool(found > 0)))
    again = resampled(drawn, config.bootstrap, np.random.default_rng(config.seed))
    for k, metric in enumerate(METRICS):
        mean = {name: float(np.mean([score[k] for score in of_set])) for name, of_set in scores.items()}
        for name in RIVALS:
            report.add(Row(f"{kind}: {metric}, {name}", mean[name], ""))
        for ours in OURS:
            spread = float(np.std([score[k] for score in scores[ours]], ddof=1)) if config.repeats > 1 else 0.0
            report.add(Row(f"{kind}: {metric}, {ours}", mean[ours], ""))
            report.add(Row(f"{kind}: {metric}, {ours}, standard deviation of draws", spread, ""))
            for name in RIVALS:
                against(
                    report, f"{kind}: {metric}, {ours}", name, mean[ours], mean[name], (again[ours] - again[name])[:, k]
                )


def against(report: Report, ours: str, rival: str, own: float, other: float, differences: np.ndarray) -> None:
    """Rows of one distance beside a rival's: the difference with its interval, and the ratio where there is one, as an
    unbiased MMD2 may fall below 0.

    differences: of the cells drawn again
    """
    low, high = np.quantile(differences, (0.025, 0.975))
    report.add(Row.at_most(f"{ours} - {rival}", own - other, "", 0.0))
    report.add(Row(f"{ours} - {rival}, lower end of the 95 % interval", float(low), ""))
    report.add(Row(f"{ours} - {rival}, upper end of the 95 % interval", float(high), ""))
    if other > 0:
        report.add(Row.at_most(f"{ours} / {rival}", own / other, "x", 1.0))
    else:
        report.add(Row.not_measured(f"{ours} / {rival}", "the rival's is not above 0", "x", "<= 1"))


def fold_changes(
    treated: sp.csr_matrix, control: sp.csr_matrix, config: BenchUnseenConfig, genes: tuple[str, ...]
) -> np.ndarray:
    """log2 fold changes of the responding genes, treated against control cells."""
    columns = [genes.index(gene) for gene in config.genes]
    both = sp.csr_matrix(sp.vstack((treated, control)))
    types = np.where(np.arange(len(both.indptr) - 1) < len(treated.indptr) - 1, config.treated, config.control)
    return log2_fold_change(both, types, config.treated, columns)


if __name__ == "__main__":
    sys.exit(run_benchmark("unseen"))
