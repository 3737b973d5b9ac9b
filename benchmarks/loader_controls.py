"""What the loader's benchmark is measured against: the same cells through other readers, to the same dense counts.

Each control is a function (data, folder, batch, n_genes) -> endless iterator of the number of cells of each batch,
after the batch's counts of random genes stand in a float32 or int32 tensor. What other packages need of data is
written once.

Reading order: memory-mapped CSR (the limit), tiledbsoma-ml, scDataset, WebDataset with a sample per cell.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numba import njit

from data_pipeline.format.block import decode_block
from data_pipeline.format.read_shards import ShardSet
from data_pipeline.stream.gene_set_config import GeneSetConfig
from data_pipeline.stream.gene_sets import GeneSets
from data_pipeline.stream.order import DRAW_GIVEN, Order, Units

SOMA_IO_BATCH = 16_384
SCDATASET_BLOCK, SCDATASET_FETCH = 16, 64


def gene_sets(n_genes_all: int, n_genes: int, batch: int) -> GeneSets:
    return GeneSets(
        GeneSetConfig("random", n_genes, batch), "given", seed=1, purpose=DRAW_GIVEN, n_genes=n_genes_all,
        n_expressed_largest=0, weights=None, micro_batch=batch, loud=False,
    )  # fmt: skip


# --- memory-mapped CSR ---------------------------------------------------------------------------------------------


def write_mmap(shards: Path, folder: Path) -> None:
    """The set's cells, in set order, as uint16 genes and counts."""
    cells = ShardSet(str(shards))
    folder.mkdir()
    n_nonzeros = cells.manifest.statistics.n_nonzeros
    genes, counts = (
        np.lib.format.open_memmap(folder / f"{name}.npy", "w+", "<u2", (n_nonzeros,)) for name in ("genes", "counts")
    )
    start = np.zeros(cells.manifest.n_cells + 1, np.int64)
    at = 0
    for block in range(len(cells.blocks)):
        found = decode_block(cells.fetch(block).data)
        first, n = int(cells.blocks["first_cell"][block]), len(found.columns)
        genes[at : at + n], counts[at : at + n] = found.columns, found.counts
        start[first + 1 : first + 1 + found.n_cells] = at + found.indptr[1:]
        at += n
    np.save(folder / "start.npy", start)
    cells.close()


@njit(nogil=True)
def _take(cells, start, genes, counts, table, width, flat, totals):
    """As the loader's own gather: one pass over the cell, a place to throw other genes away, sums."""
    flat[:width] = 0
    for i in range(len(cells)):
        base = np.uint64(i * width)
        for k in range(np.uint64(start[cells[i]]), np.uint64(start[cells[i] + 1])):
            flat[base + np.uint64(table[genes[k]])] = counts[k]
        total = np.int64(0)
        row = flat[i * width : (i + 1) * width]
        for k in range(np.uint64(width)):
            total += np.int64(row[k])
        totals[i] = total
        flat[(i + 1) * width : min((i + 2) * width, len(flat))] = 0


def mmap_reader(shards: Path, folder: Path, batch: int, n_genes: int) -> Iterator[int]:
    """The same order, gene sets, counts, library sizes, labels and identities, read from mapped pages."""
    cells = ShardSet(str(shards))
    blocks = cells.blocks
    order = Order(Units.whole(np.arange(len(blocks)), blocks["n_cells"]), 1, 32, batch, 2)
    sets = gene_sets(cells.manifest.genes.n_genes, n_genes, batch)
    start, genes, counts = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("start", "genes", "counts"))
    names = ("source", "row", "total_counts", *(f"condition.{n}" for n in cells.manifest.conditions.names))
    columns = [np.load(shards / "index" / f"cells.{name}.npy", mmap_mode="r") for name in names]
    table = np.full(cells.manifest.genes.n_genes, n_genes, np.uint16)
    step, positions = 0, np.arange(batch)
    while True:
        epoch, t = divmod(step, order.steps_per_epoch)
        n = min(64, order.steps_per_epoch - t)
        block, row = order.epoch(epoch).plan(t, n, 0, batch)
        for k, where in enumerate(blocks["first_cell"][block].astype(np.int64) + row):
            ids = sets.ids(epoch, t + k, positions)
            table[ids - 1] = np.arange(n_genes)
            flat, totals = np.empty(batch * n_genes + 1, np.int32), np.empty(batch, np.int64)
            _take(where, start, genes, counts, table, n_genes, flat, totals)
            table[ids - 1] = n_genes
            made = [torch.from_numpy(flat[:-1].reshape(batch, n_genes)), torch.from_numpy(totals.astype(np.float32))]
            made += [torch.from_numpy(column[where].astype(np.int64)) for column in columns]
            yield batch
        step += n


# --- other packages ------------------------------------------------------------------------------------------------


def soma_reader(soma: Path, folder: Path, batch: int, n_genes: int) -> Iterator[int]:
    """tiledbsoma-ml as its documentation shows it (shuffled, dense rows), with smaller reads than its 65,536 cells, and
    not ahead in a thread: that work would be charged to the readers whose turn comes next."""
    import tiledbsoma
    from tiledbsoma_ml import ExperimentDataset  # pyright: ignore[reportMissingImports]

    with tiledbsoma.Experiment.open(f"{soma}/census_data/homo_sapiens") as experiment:
        sets = gene_sets(experiment.ms["RNA"].var.count, n_genes, batch)
        with experiment.axis_query("RNA") as query:
            data = ExperimentDataset(
                query, "raw", batch_size=batch, io_batch_size=SOMA_IO_BATCH, seed=1, use_eager_fetch=False
            )
            counts: Any
            while True:
                for step, (counts, _) in enumerate(data):
                    ids = sets.ids(0, step, np.arange(batch))
                    torch.from_numpy(counts[:, ids - 1])
                    yield counts.shape[0]


def scdataset_reader(h5ad: Path, folder: Path, batch: int, n_genes: int) -> Iterator[int]:
    """scDataset over a backed h5ad file."""
    import anndata
    from scdataset import BlockShuffling, scDataset  # pyright: ignore[reportMissingImports]

    backed = anndata.read_h5ad(h5ad, backed="r")
    sets = gene_sets(backed.n_vars, n_genes, batch)
    data = scDataset(
        backed,
        BlockShuffling(block_size=SCDATASET_BLOCK),
        batch_size=batch,
        fetch_factor=SCDATASET_FETCH,
        fetch_transform=lambda part: part.to_memory(),
        batch_callback=lambda part, rows: part.X[rows],
        seed=1,
    )
    while True:
        for step, counts in enumerate(data):
            ids = sets.ids(0, step, np.arange(batch))
            torch.from_numpy(counts[:, ids - 1].toarray())
            yield counts.shape[0]


def write_samples(shards: Path, folder: Path) -> None:
    """Tars of one sample a cell: genes.npy, counts.npy and cell.json with its label and identity."""
    cells = ShardSet(str(shards))
    folder.mkdir()
    for k, shard in enumerate(cells.manifest.shards):
        with tarfile.open(folder / f"{k:06d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for block in range(shard.first_block, shard.first_block + shard.n_blocks):
                found = decode_block(cells.fetch(block).data)
                for cell in range(found.n_cells):
                    mine = slice(found.indptr[cell], found.indptr[cell + 1])
                    labels = {"cell_type": int(found.conditions[0][cell]), "row": int(found.rows[cell])}
                    parts = {"cell.json": json.dumps(labels).encode()}
                    for name, values in (("genes", found.columns), ("counts", found.counts)):
                        buffer = io.BytesIO()
                        np.save(buffer, values[mine].astype("<u2"))
                        parts[f"{name}.npy"] = buffer.getvalue()
                    for name, data in parts.items():
                        info = tarfile.TarInfo(f"{block:08d}-{cell:03d}.{name}")
                        info.size = len(data)
                        tar.addfile(info, io.BytesIO(data))
    cells.close()


def webdataset_reader(samples: Path, folder: Path, batch: int, n_genes: int) -> Iterator[int]:
    """WebDataset's own reading and shuffling; the loader's kind of gather."""
    from webdataset.compat import WebDataset

    files = sorted(map(str, samples.glob("*.tar")))
    n_genes_all = int((folder / "n_genes").read_text())
    sets, table = gene_sets(n_genes_all, n_genes, batch), np.full(n_genes_all, n_genes, np.uint16)
    step = 0
    while True:
        data: Any = (
            WebDataset(files, shardshuffle=len(files), seed=1).shuffle(1000).decode().batched(batch, collation_fn=None)
        )
        for part in data:
            start = np.concatenate([[0], np.cumsum([len(sample["genes.npy"]) for sample in part])])
            genes, counts = (np.concatenate([sample[name] for sample in part]) for name in ("genes.npy", "counts.npy"))
            torch.tensor([[sample["cell.json"]["cell_type"], sample["cell.json"]["row"]] for sample in part])
            ids = sets.ids(0, step, np.arange(batch))
            table[ids - 1] = np.arange(n_genes)
            flat, totals = np.empty(len(part) * n_genes + 1, np.int32), np.empty(len(part), np.int64)
            _take(np.arange(len(part)), start, genes, counts, table, n_genes, flat, totals)
            table[ids - 1] = n_genes
            torch.from_numpy(flat[:-1].reshape(len(part), n_genes))
            step += 1
            yield len(part)
