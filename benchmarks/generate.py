"""What a generated cell costs, in the network and in the decoder, beside two plain recipes.

The controls use the same weights. One is the reference's recipe (Palla et al., arXiv 2511.02986, its published code):
an adaptive ODE at a tolerance of 1e-5 through torchdiffeq, three network calls an evaluation, the decoder's formula for
every gene, counts drawn and kept as a dense matrix. The other is 50 steps of Heun, one call an evaluation, and the same
decoding. What is timed of ours is what `scldm generate` runs: the decoder scores all genes, as a share is one of all,
and counts are drawn of the asked ones. Whether few steps are as good as many is judged on real cells by MMD2 and W2, in
the ten principal components of `scldm evaluate`.

Reading order: BenchGenerateConfig, main, the parts of a cell's cost, the controls, quality, memory.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from sklearn.decomposition import PCA
from torch import Tensor

import scldm
from benchmarks.generate_random import random_speed
from benchmarks.measure import measure
from benchmarks.report import Report, Row, run_benchmark
from launch.evaluation.cells import cells_of_shards
from scldm import draws
from scldm.errors import InputError
from scldm.evaluate.distances import mmd2, w2
from scldm.evaluate.space import Profile, fit_pca, log_normalise
from scldm.flow.generate import generate_latents
from scldm.flow.sampler import SamplerConfig
from scldm.library_size import LibrarySizeModel, LogNormal
from scldm.model.dit import DiT, DiTConfig
from scldm.model.predicted import Predicted
from scldm.model.vae import VAE, VAEConfig
from scldm.model_folder import save_pretrained
from scldm.networks import Precision, written
from scldm.pretrained import Pretrained
from scldm.request.wanted import Wanted
from scldm.vocab import ConditionVocab, GeneVocab

PURPOSE = """Measure generation with a trained model: cells/s by steps and by genes, in the network and in the decoder;
against the reference's recipe and against 50 plain steps of Heun; quality of few steps; peak memory. With random=70m,
cells/s alone, of that autoencoder and the diffusion transformer of ldm/base with random weights."""
EXAMPLE = """
python -m benchmarks.generate model=runs/quickstart/model shards=runs/quickstart/shards
python -m benchmarks.generate speed=false save=benchmarks/generate-memory.json
python -m benchmarks.generate random=70m genes=3_699 batch=64,512 precision=float32,bfloat16
"""


@dataclass(frozen=True)
class BenchGenerateConfig:
    """What to measure.

    model: model folder that `scldm export` wrote
    shards: the cells that it was trained on, with validation and test cells
    random: name of a shape in configs/vae, of which a model with random weights is measured instead, and nothing else
    random_ldm: its diffusion transformer, a name in configs/ldm
    genes: its number of genes
    batch: its numbers of cells that go through the networks at once
    precision: its precisions, float32 or bfloat16
    compile: torch.compile the blocks of its transformer, at the fastest of these
    condition: of the model; its labels are asked for as the test cells have them
    cells: of a timing
    repeats: of a timing
    steps: of Heun, whose costs are listed
    sampler: of few steps, which is compared with the controls and with 100 steps of Heun
    bootstrap: samples of the cells of 100 steps, of which the interval is taken
    speed: measure cost and quality; needs model and shards
    memory: measure the peak memory of 20,000 and 200,000 cells, as the command line writes them
    threads: of torch
    json: print JSON, not the table
    save: write the JSON to this file as well
    """

    model: str = ""
    shards: str = ""
    random: str = ""
    random_ldm: str = "base"
    genes: int = 3_699
    batch: tuple[int, ...] = (64, 512)
    precision: tuple[Precision, ...] = ("float32", "bfloat16")
    compile: bool = False
    condition: str = "cell_type"
    cells: int = 128
    repeats: int = 3
    steps: tuple[int, ...] = (5, 10, 25, 50, 100)
    sampler: SamplerConfig = field(default_factory=lambda: SamplerConfig("heun", 8))
    bootstrap: int = 200
    speed: bool = True
    memory: bool = True
    threads: int = 1
    json: bool = False
    save: str = ""


CONFIG = BenchGenerateConfig
HEUN_50, HEUN_100 = SamplerConfig("heun", 50), SamplerConfig("heun", 100)
REFERENCE_TOLERANCE = 1e-5
POOL = 4  # as many times the test cells are generated for the interval


def main(config: BenchGenerateConfig) -> Report:
    """Print the table; returns it."""
    torch.set_num_threads(config.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    report = Report("generate", {"threads": config.threads}, save=config.save)
    if config.random:
        presets = (config.random, config.random_ldm)
        how = (config.batch, config.precision, config.sampler, config.repeats, device, config.compile)
        random_speed(report, presets, config.genes, *how)
    elif config.speed:
        speed(report, config, device)
    if config.memory and not config.random:
        memory(report)
    report.print(config.json)
    return report


def speed(report: Report, config: BenchGenerateConfig, device: torch.device) -> None:
    """Cost and quality of cells with the labels of the test cells."""
    if not (config.model and config.shards):
        raise InputError("model and shards must be given: a trained model and its cells; or speed=false")
    model = scldm.load(config.model, device, precision="float32")
    _, validation, test = cells_of_shards(config.shards, [config.condition] if config.condition else [])
    if test.genes != model.genes.ids:
        raise InputError(f"shards={config.shards} has other genes than model={config.model}")
    few = f"{config.sampler.method} {config.sampler.n_steps}"
    report.settings |= {"cells": config.cells, "genes": model.genes.n_genes, "few steps": few}
    labels = np.resize(test.types, config.cells)
    costs(report, model, model.check_conditions(pd.DataFrame({config.condition: labels}), seed=0), config, device)
    pca = fit_pca(log_normalise(validation.counts))
    quality(report, model, Profile.of(test.counts, test.types, pca), pca, config)
    if device.type == "cpu":
        name = "base DiT, 70m VAE, 3,699 genes, few steps, on an H100-class GPU: not measured on a GPU"
        report.add(Row(name, None, "cells/s", ">= 2000"))


# --- a cell's cost -------------------------------------------------------------------------------------------------


def costs(report: Report, model: Pretrained, wanted: Wanted, config: BenchGenerateConfig, device: torch.device) -> None:
    """Rows of cells/s, and of how many times faster than the controls."""
    n, every = wanted.n_cells, range(wanted.n_cells)
    numbers_B = torch.arange(n, device=device)
    conditions = {name: torch.from_numpy(ids) for name, ids in wanted.ids_of(every).items()}
    size_B = torch.from_numpy(wanted.library_size(every)).float().to(device)
    all_genes_G = torch.arange(1, model.genes.n_genes + 1, device=device)
    assert model.dit is not None
    dit, vae = model.dit, model.vae
    plain = VAE(replace(vae.config, attention="plain"), vae.n_genes).to(device).eval()
    plain.load_state_dict(vae.state_dict())

    def seconds(work: Callable[[], object]) -> float:
        return measure(work, config.repeats, device).seconds

    def rate(name: str, took: float, note: str = "") -> float:
        report.add(Row(name, n / took, f"cells/s{note}"))
        return took

    def latents(sampler: SamplerConfig) -> Tensor:
        return generate_latents(dit, conditions, numbers_B, 0, sampler, size_B=size_B).latent_BLZ

    def counts(predicted: Predicted, columns_Q: Tensor) -> sp.csr_matrix:
        keys_BQ = draws.keys(0, "counts", numbers_B, columns_Q + 1)
        return written(predicted.take(columns_Q), "counts", size_B, keys_BQ)

    for n_steps in config.steps:
        rate(f"network, Heun, {n_steps} steps", seconds(partial(latents, SamplerConfig("heun", n_steps))))
    ours = rate("network, few steps", seconds(partial(latents, config.sampler)))
    latent_BLZ = latents(config.sampler)
    normalised_BLZ = vae.normalised(latent_BLZ)
    with torch.no_grad():
        predicted = vae.decode(normalised_BLZ, all_genes_G)
        rate("decoder, shares of all genes", seconds(lambda: vae.decode(normalised_BLZ, all_genes_G)))
        rate("decoder, its formula, shares of all genes", seconds(lambda: plain.decode(normalised_BLZ, all_genes_G)))
    for n_genes in sorted({min(k, model.genes.n_genes) for k in (10, 64, 256, model.genes.n_genes)}):
        columns_Q = all_genes_G[:n_genes] - 1
        rate(f"counts drawn and kept as CSR, {n_genes} genes asked", seconds(partial(counts, predicted, columns_Q)))
        decoded = partial(model.decoded, latent_BLZ, columns_Q, size_B, numbers_B, 0, "counts")
        rate(f"decoder and counts, {n_genes} genes asked", seconds(decoded))

    columns = model.columns(None)
    evaluations = model.make(wanted, every, columns, config.sampler, "counts", lambda _: None).n_evaluations_n
    report.add(Row("network evaluations a cell, few steps", float(evaluations.mean()), ""))
    whole = rate(
        "whole, few steps",
        seconds(lambda: model.make(wanted, every, columns, config.sampler, "counts", lambda _: None)),
    )
    calls: list[int] = []
    reference = rate(
        "network, the reference's recipe",
        seconds(lambda: calls.append(reference_latents(dit, conditions, numbers_B, size_B)[1])),
    )
    report.add(Row("network calls of the reference's recipe", calls[0], ""))
    z_BLZ = reference_latents(dit, conditions, numbers_B, size_B)[0]
    dense = seconds(lambda: dense_counts(plain, vae.normalised(z_BLZ), all_genes_G, size_B))
    rate("decoder and counts, the reference's recipe", dense)
    heun = rate("network, Heun, 50 steps, as a control", seconds(partial(latents, HEUN_50)))
    report.add(Row.at_least("network: few steps against the reference's recipe", reference / ours, "x", 8))
    report.add(Row.at_least("whole: few steps against the reference's recipe", (reference + dense) / whole, "x", 4))
    report.add(Row.at_least("whole: few steps against 50 plain steps of Heun", (heun + dense) / whole, "x", 2))


# --- the controls --------------------------------------------------------------------------------------------------


@torch.no_grad()
def reference_latents(dit: DiT, conditions: dict[str, Tensor], numbers_B: Tensor, size_B: Tensor) -> tuple[Tensor, int]:
    """Latents as the reference draws them, and its network calls: each evaluation asks without conditions, with them,
    and once more for the guided sum."""
    from torchdiffeq import odeint

    conditions = {name: ids.to(numbers_B.device) for name, ids in conditions.items()}
    null = {name: torch.full_like(ids, dit.null(name)) for name, ids in conditions.items()}
    n_calls = 0

    def v(t: Tensor, z: Tensor) -> Tensor:
        nonlocal n_calls
        n_calls += 3
        t_B = t.float().expand(len(z))
        v_null, v_given, again = (dit(z, t_B, of, size_B=size_B) for of in (null, conditions, conditions))
        return v_null + 0.5 * ((v_given - v_null) + (again - v_null))

    noise_BLZ = draws.normal(0, "generate noise", 0, numbers_B, dit.latent_shape)
    ends = torch.tensor([1.0, 0.0], device=noise_BLZ.device)
    path = odeint(v, noise_BLZ, ends, rtol=REFERENCE_TOLERANCE, atol=REFERENCE_TOLERANCE, method="dopri5")
    assert isinstance(path, Tensor)
    return dit.unstandardise(path[-1]), n_calls


@torch.no_grad()
def dense_counts(plain: VAE, latent_BLZ: Tensor, gene_ids_Q: Tensor, size_B: Tensor) -> np.ndarray:
    """Counts of every gene by the formula, as a dense matrix, drawn at once by torch."""
    predicted = plain.decode(latent_BLZ, gene_ids_Q)
    mu_BQ = predicted.mu(size_B)
    if predicted.likelihood != "nb":
        raise InputError(f"the controls are written for likelihood nb, not {predicted.likelihood}")
    assert predicted.dispersion is not None
    theta_BQ = predicted.dispersion.expand_as(mu_BQ)
    rate_BQ = torch.distributions.Gamma(theta_BQ, theta_BQ / mu_BQ.clamp_min(1e-30)).sample()
    return torch.poisson(rate_BQ).cpu().numpy()


# --- quality -------------------------------------------------------------------------------------------------------


def quality(report: Report, model: Pretrained, test: Profile, pca: PCA, config: BenchGenerateConfig) -> None:
    """Distances to the test cells, as many generated ones of each type: of few steps, and the interval of 100 steps."""
    n = len(test)
    table = pd.DataFrame({config.condition: np.tile(test.types, POOL)})
    made = (sp.csr_matrix(model.generate(table, seed=1, sampler=sampler).X) for sampler in (HEUN_100, config.sampler))
    many, few = (Profile.of(counts, np.tile(test.types, POOL), pca).components for counts in made)
    rng = np.random.default_rng(0)
    for name, distance in (("MMD2", mmd2), ("W2", w2)):
        # of each test cell's label one of the pool's cells, so that every sample has the types' numbers
        of_pool = [np.arange(n) + n * rng.integers(0, POOL, n) for _ in range(config.bootstrap)]
        interval = np.quantile([distance(test.components, many[rows]) for rows in of_pool], (0.025, 0.975))
        value = float(np.mean([distance(test.components, few[rows]) for rows in of_pool]))
        report.add(Row(f"{name}, Heun, 100 steps, lower end of the 95 % interval", float(interval[0]), ""))
        report.add(Row(f"{name}, Heun, 100 steps, upper end of the 95 % interval", float(interval[1]), ""))
        within = bool(interval[0] <= value <= interval[1])
        report.add(Row(f"{name}, few steps", value, "", f"{interval[0]:.4g} to {interval[1]:.4g}", within))


# --- memory --------------------------------------------------------------------------------------------------------


def memory(report: Report, few: int = 20_000, many: int = 200_000) -> None:
    """Peak of `scldm generate` by format: a network of random weights and one step, so that it is the writer's."""
    with tempfile.TemporaryDirectory(prefix="scldm-bench-") as folder:
        model = Path(folder) / "model"
        random_model(model, n_genes=200)
        for suffix in (".h5ad", ".zarr", ".soma"):
            peaks = []
            for n in (few, many):
                out = Path(folder) / f"{n}{suffix}"
                words = ["generate", f"model={model}", f"n={n}", f"out={out}", "device=cpu"]
                peaks.append(peak_of([*words, "sampler.method=euler", "sampler.n_steps=1"]))
                report.add(Row(f"peak memory, {n:,} cells, {suffix}", peaks[-1] / 2**20, "MiB"))
            report.add(Row.at_most(f"peak memory, {many:,} / {few:,} cells, {suffix}", peaks[1] / peaks[0], "x", 1.1))


def peak_of(words: list[str]) -> int:
    """Most resident bytes of a process of its own that runs a verb. Raises: InputError where it fails."""
    # not by its resource usage, in which a child begins with what its parent had
    code = "import sys; from launch.cli import main; code = main(sys.argv[1:]); "
    code += "print(open('/proc/self/status').read()); sys.exit(code)"
    root = str(Path(__file__).resolve().parent.parent.parent)
    path = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH")) if p)
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code, *words], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"scldm {' '.join(words)} failed: {done.stderr.strip()}")
    return next(int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("VmHWM")) * 1024


def random_model(folder: Path, n_genes: int) -> None:
    """A small model without conditions, whose cells have some half of 200 genes."""
    torch.manual_seed(0)
    vae = VAE(VAEConfig(16, 2, 4, 1, 2, 1), n_genes)
    dit = DiT(DiTConfig(16, 1, 2), 2, 4, {})
    for name, parameter in [*vae.named_parameters(), *dit.named_parameters()]:
        if "log_theta" not in name:
            parameter.data.normal_(std=0.3)
    genes = GeneVocab(tuple(f"ENSG{k:011d}" for k in range(n_genes)), "ensembl")
    sizes = LibrarySizeModel((), {(): {(): LogNormal(1, 6.2, 0.3)}})
    save_pretrained(folder, vae, dit, genes, ConditionVocab({}), sizes, {})


if __name__ == "__main__":
    sys.exit(run_benchmark("generate"))
