"""A model of the atlas' size with random weights, and how fast it generates: speed alone, as its cells mean nothing.

Reading order: LABELS, random_atlas, random_speed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import torch

import scldm
from benchmarks.measure import failure_of, measure
from benchmarks.report import Report, Row
from benchmarks.ways import of_preset
from launch.config import load_preset
from scldm.flow.sampler import SamplerConfig
from scldm.library_size import LibrarySizeModel, LogNormal
from scldm.model.dit import DiT, DiTConfig
from scldm.model.vae import VAE, VAEConfig
from scldm.model_folder import save_pretrained
from scldm.networks import Precision
from scldm.vocab import ConditionVocab, GeneVocab

LABELS = tuple(f"type {k}" for k in range(10))
SIZE = LogNormal(1, 8.5, 0.5)  # some 5,000 counts a cell
TARGET = ("70m", "base", 3_699)  # autoencoder, diffusion transformer, genes: 2,000 cells/s on an H100-class GPU
CELLS_PER_S = 2_000


@contextmanager
def random_atlas(vae_preset: str, dit_preset: str, n_genes: int) -> Iterator[Path]:
    """A model folder: presets of configs/vae and configs/ldm, one condition, and mean counts as uneven as real ones."""
    torch.manual_seed(0)
    vae = VAE(of_preset(vae_preset, VAEConfig()), n_genes)
    vae.start_at(torch.exp(2 * torch.randn(n_genes)))
    dit_config = DiTConfig(**dict(load_preset(f"ldm/{dit_preset}")["model"]))
    dit = DiT(dit_config, vae.config.n_latents, vae.config.latent_width, {"cell_type": len(LABELS)})
    for parameter in dit.parameters():  # its last layer starts at zero, and with it every velocity
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    genes = GeneVocab(tuple(f"ENSG{k:011d}" for k in range(n_genes)), "ensembl")
    sizes = LibrarySizeModel(("cell_type",), {(): {(): SIZE}, ("cell_type",): {(label,): SIZE for label in LABELS}})
    with tempfile.TemporaryDirectory(prefix="scldm-bench-") as folder:
        save_pretrained(Path(folder), vae, dit, genes, ConditionVocab({"cell_type": LABELS}), sizes, {})
        yield Path(folder)


def random_speed(
    report: Report,
    presets: tuple[str, str],
    n_genes: int,
    batches: Sequence[int],
    precisions: Sequence[Precision],
    sampler: SamplerConfig,
    repeats: int,
    device: torch.device,
    compiled: bool = False,
) -> None:
    """Cells/s of generation to counts in CSR, a batch at a time, by batch and precision; what fails is said so. The
    fastest once more with the transformer's blocks compiled, if asked."""
    few = f"{sampler.method} {sampler.n_steps}"
    report.settings |= {"autoencoder": presets[0], "transformer": presets[1], "genes": n_genes, "few steps": few}
    found: dict[tuple[int, Precision], float] = {}

    def measured(n: int, precision: Precision, compiled: bool = False) -> float:
        model = scldm.load(folder, device, batch=n, precision=precision)
        assert model.dit is not None
        for block in model.dit.blocks if compiled else ():
            block.compile()
        conditions = pd.DataFrame({"cell_type": [LABELS[k % len(LABELS)] for k in range(n)]})
        wanted, columns = model.check_conditions(conditions, 0, sampler), model.columns(None)

        def cells() -> object:
            return model.make(wanted, range(n), columns, sampler, "counts", lambda _: None)

        name = f"random weights, whole, few steps, batch {n}, {precision}{', compiled' if compiled else ''}"
        if why := failure_of(cells, device):
            report.add(Row.not_measured(name, why, "cells/s"))
            return 0.0
        cost = measure(cells, repeats, device)
        report.add(Row(name, n / cost.seconds, "cells/s"))
        report.add(Row(f"{name}: peak memory", cost.peak_bytes / 2**20, "MiB"))
        return n / cost.seconds

    with random_atlas(*presets, n_genes) as folder:
        for precision in precisions:
            for n in batches:
                found[n, precision] = measured(n, precision)
        best = max(found, key=lambda of: found[of])
        if compiled:
            measured(*best, compiled=True)
    if (*presets, n_genes) != TARGET:
        return
    name = "base DiT, 70m VAE, 3,699 genes, few steps, on an H100-class GPU"
    if found[best] and device.type == "cuda":
        report.add(Row.at_least(f"{name}: batch {best[0]}, {best[1]}", found[best], "cells/s", CELLS_PER_S))
    else:
        report.add(Row.not_measured(name, "not measured on a GPU", "cells/s", f">= {CELLS_PER_S}"))
