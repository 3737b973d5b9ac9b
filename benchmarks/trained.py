"""Small autoencoders trained on real cells, for the benchmarks that compare what they learn.

Each is trained, exported and loaded as a user does it. Reading order: CellsConfig, RealCells, Trained, knn_accuracy.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import anndata as ad
import numpy as np
import torch

import scldm
from data_pipeline.convert.config import ShardsWriteConfig
from data_pipeline.convert.write_shards import write_shards
from launch.config import compose
from launch.export import ExportConfig
from launch.export import main as export
from launch.quickstart import write_builtin_cells
from launch.train_vae import TrainVAEConfig
from launch.train_vae import main as train_vae
from scldm.errors import InputError

NEIGHBOURS = 15


@dataclass(frozen=True)
class CellsConfig:
    """Which real cells.

    h5ad: file with raw counts in X; empty takes the quickstart's 700 PBMCs
    label: obs column with the cells' types
    top_genes: of a file with more genes, only so many most variable ones are kept; 0 keeps all
    """

    h5ad: str = ""
    label: str = "cell_type"
    top_genes: int = 0


class RealCells:
    """The cells, and shards of them with a fifth held out for validation, in a folder."""

    def __init__(self, config: CellsConfig, folder: Path) -> None:
        self.folder, path = folder, Path(config.h5ad)
        if not config.h5ad:
            path = folder / "cells.h5ad"
            write_builtin_cells(path)
        elif not path.is_file():
            raise InputError(f"cells.h5ad={path}: no such file")
        written = compose(ShardsWriteConfig, [
            f"source.paths={path}", f"out={folder}/shards", "block_cells=64", "shard_cells=1024",
            f"conditions={json.dumps([config.label])}", f"split.stratify={json.dumps([config.label])}",
            "split.validation=0.2", "split.test=0", f"filter.n_top_genes={config.top_genes}",
        ])  # fmt: skip
        manifest = write_shards(written)
        assert manifest is not None
        genes = list(manifest.genes.ids)
        self.adata = ad.read_h5ad(path)[:, genes].to_memory()
        self.label_n = self.adata.obs[config.label].astype(str).to_numpy()
        self.n_genes, self.n_cells = manifest.genes.n_genes, manifest.n_cells

    def train(self, name: str, arguments: Iterable[str]) -> Trained:
        """`vae/tiny` with these arguments, on one process, validated once, at its end."""
        run = self.folder / name
        words = ["vae/tiny", f"run_dir={run}", f"data.shards={self.folder}/shards", "tracking.enabled=false"]
        words += ["hardware.engine=plain", "hardware.micro_batch=30", "gate=false", *arguments]
        config = compose(TrainVAEConfig, [*words, "train.validate_every=1000000", "train.save_every=1000000"])
        began = time.process_time()
        metrics = train_vae(config)
        seconds = time.process_time() - began
        export(ExportConfig(vae=str(run), out=f"{run}-model"))
        return Trained(scldm.load(f"{run}-model"), metrics, seconds)


@dataclass(frozen=True)
class Trained:
    """model: as loaded from its exported folder; metrics: of the validation cells, on all genes, per cell;
    seconds: of CPU time that training took, its one validation included
    """

    model: scldm.Pretrained
    metrics: dict[str, float]
    seconds: float


def knn_accuracy(queries: np.ndarray, references: np.ndarray, label_n: np.ndarray) -> float:
    """How often a cell's label is that of most of its 15 nearest references, itself left out. Rows are the same
    cells; a tie goes to the label that comes first.
    """
    nearest = torch.cdist(torch.tensor(queries).double(), torch.tensor(references).double()).fill_diagonal_(torch.inf)
    codes = np.unique(label_n, return_inverse=True)[1]
    votes = codes[nearest.topk(NEIGHBOURS, largest=False).indices.numpy()]
    found = [np.bincount(row).argmax() for row in votes]
    return float((np.array(found) == codes).mean())
