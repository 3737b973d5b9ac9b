"""Small atlases for tests: h5ad files of every storage, SOMA, and what a shard set of them must hold."""

from __future__ import annotations

import hashlib
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp

from data_pipeline.convert.config import FilterConfig, ShardsWriteConfig, SourceConfig, SplitConfig
from data_pipeline.format.block import decode_block
from data_pipeline.format.schema import Manifest, read_manifest

__all__ = ["FilterConfig", "ShardsWriteConfig", "SourceConfig", "SplitConfig"]


def counts(n_cells: int, n_genes: int, seed: int = 0, density: float = 0.15) -> sp.csr_matrix:
    """Counts as atlases have them: mostly 1, some past a byte, one past 16 bits; every cell has some."""
    rng = np.random.default_rng(seed)
    x = sp.random(n_cells, n_genes, density, "csr", np.float32, rng=rng)
    x.data = rng.choice([1, 2, 3, 250, 300], len(x.data), p=[0.65, 0.15, 0.1, 0.05, 0.05]).astype(np.float32)
    x = x.tolil()
    x[:, 0] = 1
    x[0, n_genes - 1] = 70_000
    return x.tocsr()


def atlas(n_cells: int = 600, n_genes: int = 900, seed: int = 0, prefix: str = "GENE") -> anndata.AnnData:
    rng = np.random.default_rng(seed + 1)
    obs = pd.DataFrame(
        {
            "cell_type": pd.Categorical(rng.choice(["B", "NK", "T"], n_cells, p=[0.5, 0.2, 0.3])),
            "donor": rng.choice([f"d{k}" for k in range(8)], n_cells),
            "batch": rng.integers(0, 3, n_cells),
        },
        index=pd.Index([f"cell{k}" for k in range(n_cells)]),
    )
    var = pd.DataFrame(index=pd.Index([f"{prefix}{k}" for k in range(n_genes)]))
    return anndata.AnnData(counts(n_cells, n_genes, seed), obs, var)


def config(out: Path, *paths: Path | str, **kwargs) -> ShardsWriteConfig:
    """A small command: blocks of 32 cells, tars of 128."""
    source = kwargs.pop("source", {})
    given = {"conditions": ("cell_type",), "block_cells": 32, "shard_cells": 128, **kwargs}
    return ShardsWriteConfig(out=str(out), source=SourceConfig(paths=tuple(map(str, paths)), **source), **given)


def read_set(url: str) -> tuple[Manifest, dict[tuple[int, int], dict], list[tuple[int, int]]]:
    """The manifest; every cell by its identity: split, conditions, gene -> count; and the identities in set order."""
    manifest = read_manifest(url)
    blocks = np.load(f"{url}/index/blocks.npy")
    cells, order = {}, []
    for record in blocks:
        with open(f"{url}/{manifest.shards[record['shard']].path}", "rb") as file:
            file.seek(record["offset"])
            block = decode_block(file.read(record["length"]))
        for k in range(block.n_cells):
            mine = slice(block.indptr[k], block.indptr[k + 1])
            identity = int(block.sources[k]), int(block.rows[k])
            labels = zip(manifest.conditions.names, block.conditions)
            cells[identity] = {
                "split": manifest.splits[block.split].name,
                "labels": {n: manifest.conditions.labels[n][ids[k]] for n, ids in labels},
                "counts": dict(
                    zip((manifest.genes.ids[c] for c in block.columns[mine]), block.counts[mine].tolist(), strict=True)
                ),
            }
            order.append(identity)
    return manifest, cells, order


def row_counts(adata: anndata.AnnData, row: int) -> dict[str, int]:
    """gene -> count of one row, zeros left out."""
    assert adata.X is not None
    x = sp.csr_matrix(adata.X[row])
    return {str(adata.var_names[c]): int(v) for c, v in zip(x.indices, x.data, strict=True) if v}


def digest(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a set."""
    files = sorted(p for p in Path(folder).rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
