"""Small shard sets whose every count is known, written as data_pipeline/README.md says (and not by the code that writes
real ones, so that reading is tested against the specification)."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.convert.narrow import GeneSums, Rows, narrow_rows
from data_pipeline.format import schema
from data_pipeline.format.block import NarrowCells, encode_block
from data_pipeline.format.schema import FileEntry, Manifest, ShardEntry, SplitEntry
from data_pipeline.format.statistics import compute_statistics
from scldm.vocab import ConditionVocab, GeneVocab

BLOCKS_PER_SHARD = 3


@dataclass(frozen=True)
class Known:
    """Cells in set order: counts (n, G), the splits' sizes, label ids, identities."""

    counts: np.ndarray
    split_sizes: dict[str, int]
    labels: dict[str, np.ndarray]
    identity: np.ndarray
    genes: GeneVocab
    conditions: ConditionVocab

    def rows_of(self, split: str) -> slice:
        names = list(self.split_sizes)
        start = sum(self.split_sizes[n] for n in names[: names.index(split)])
        return slice(start, start + self.split_sizes[split])


def known_cells(n_train=420, n_validation=70, n_genes=700, expressed=0.1, seed=0) -> Known:
    """Counts with every escape of the format: steps over 255 genes, counts over 15, over 255 and over 65,535."""
    rng = np.random.default_rng(seed)
    n = n_train + n_validation
    counts = rng.poisson(3, (n, n_genes)) * (rng.random((n, n_genes)) < expressed)
    counts[:, 1:300] *= rng.random((n, 1)) < 0.5  # every other cell has a step over 255
    counts[rng.random((n, n_genes)) < 0.001] = 300
    counts[:, 7] *= 20
    counts[3, 5], counts[4, 6] = 70_000, 2_000_000_000
    counts[:, 0] += 1  # no cell is empty
    labels = {
        "type": rng.choice(3, n, p=[0.8, 0.15, 0.05]).astype(np.uint8),
        "donor": rng.integers(0, 300, n).astype(np.uint16),
    }
    vocab = ConditionVocab({"type": ("a", "b", "c"), "donor": tuple(f"d{k}" for k in range(300))})
    identity = np.stack([rng.integers(0, 3, n), rng.permutation(n) * 1_000_003], axis=1)
    genes = GeneVocab(tuple(f"g{k}" for k in range(n_genes)), "symbol")
    return Known(counts, {"train": n_train, "validation": n_validation}, labels, identity, genes, vocab)


def write_set(folder: Path, cells: Known, codec: schema.Codec = "zstd", block_cells: int = 256) -> Path:
    """The cells as a finished shard set."""
    (folder / "shards").mkdir(parents=True)
    (folder / "index").mkdir()
    blocks, shards, splits = [], [], []
    first_cell = 0
    for number, (name, n_cells) in enumerate(cells.split_sizes.items()):
        first_block = len(blocks)
        starts = list(range(first_cell, first_cell + n_cells, block_cells))
        for k in range(0, len(starts), BLOCKS_PER_SHARD):
            path = schema.shard_name(name, k // BLOCKS_PER_SHARD)
            first_of_shard = len(blocks)
            with tarfile.open(folder / path, "w", format=tarfile.USTAR_FORMAT) as tar:
                for start in starts[k : k + BLOCKS_PER_SHARD]:
                    rows = slice(start, min(start + block_cells, first_cell + n_cells))
                    data = _block(cells, rows, number, codec)
                    member = tarfile.TarInfo(schema.member_name(len(blocks)))
                    member.size = len(data)
                    offset = tar.fileobj.tell() + 512
                    tar.addfile(member, io.BytesIO(data))
                    n_rows = rows.stop - rows.start
                    blocks.append((number, len(shards), offset, len(data), n_rows, start, zlib.crc32(data)))
            data = (folder / path).read_bytes()
            mine = np.array([b[4] for b in blocks[first_of_shard:]])
            shards.append(
                ShardEntry(path, number, int(mine.sum()), starts[k], len(mine), first_of_shard, len(data), _sha(data))
            )
        splits.append(SplitEntry(name, n_cells, first_cell, len(blocks) - first_block, first_block))
        first_cell += n_cells
    train = cells.counts[cells.rows_of("train")]
    columns = {
        schema.BLOCK_INDEX_PATH: np.array(blocks, schema.BLOCK_INDEX),
        schema.cell_column_path("source"): cells.identity[:, 0].astype("<u2"),
        schema.cell_column_path("row"): cells.identity[:, 1].astype("<i8"),
        schema.cell_column_path("total_counts"): cells.counts.sum(1).astype("<u8"),
        schema.cell_column_path("n_expressed"): (cells.counts > 0).sum(1).astype("<u4"),
        **{schema.cell_column_path(f"condition.{k}"): v for k, v in cells.labels.items()},
        schema.gene_column_path("mean"): train.mean(0),
        schema.gene_column_path("fraction_expressed"): (train > 0).mean(0),
    }
    index = []
    for path, values in columns.items():
        np.save(folder / path, values)
        data = (folder / path).read_bytes()
        index.append(FileEntry(path, len(data), _sha(data)))
    statistics = compute_statistics(
        np.repeat(np.arange(len(splits)), list(cells.split_sizes.values())),
        len(splits),
        cells.labels,
        cells.counts.sum(1),
        (cells.counts > 0).sum(1),
        int(cells.counts.max()),
    )
    n = len(cells.counts)
    source = {"kind": "h5ad", "uri": "cells.h5ad", "layer": "X", "n_rows": n, "n_cells": n}
    manifest = Manifest(
        "cells", len(cells.counts), cells.genes, cells.conditions, tuple(splits), {}, tuple(shards), tuple(index),
        block_cells, codec, 1, 0, (source,), {}, {}, {}, statistics,
    )  # fmt: skip
    document = manifest.to_json()
    document["sha256"] = _sha(json.dumps(document, sort_keys=True).encode())
    (folder / schema.MANIFEST).write_text(json.dumps(document))
    return folder


def narrow(indptr: np.ndarray, columns: np.ndarray, counts: np.ndarray, n_genes: int) -> NarrowCells:
    """CSR cells as a conversion makes them narrow."""
    n_cells, every = len(indptr) - 1, np.arange(n_genes, dtype=np.int32)
    rows = Rows(np.arange(n_cells), np.asarray(indptr, np.int64), columns, counts)
    return narrow_rows(rows, every, n_genes, GeneSums(n_genes), np.ones(n_cells, bool)).cells


def _block(cells: Known, rows: slice, split: int, codec: schema.Codec) -> bytes:
    counts = cells.counts[rows]
    cell, column = np.nonzero(counts)
    indptr = np.concatenate([[0], np.cumsum((counts > 0).sum(1))])
    n_genes = cells.genes.n_genes
    return encode_block(
        narrow(indptr, column, counts[cell, column], n_genes),
        split=split,
        n_genes=n_genes,
        vocab_tag=schema.vocab_tag(cells.genes),
        sources=cells.identity[rows, 0],
        rows=cells.identity[rows, 1],
        conditions=[v[rows] for v in cells.labels.values()],
        codec=codec,
    )


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
