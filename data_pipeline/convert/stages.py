"""The units of work of a conversion. Each can be done by any process, in any order, again and again with the same
result. It leaves a file that says it is done.

    transpose   a group of columns of a CSC matrix       only for such matrices
    scan        per-gene sums over a unit of cells       only where genes are chosen by their counts
    clip        the same of clipped counts               only for the most variable genes
    scatter     a unit of cells, narrowed, as runs
    gather      one tar

Reading order: Worker, then its methods in that order.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO

import numpy as np

from data_pipeline.convert.narrow import CountError, GeneSums, Rows, check_columns, narrow_rows
from data_pipeline.convert.open import open_matrix
from data_pipeline.convert.plan import Plan
from data_pipeline.convert.shuffle import Arena, RunWriter, read_range
from data_pipeline.convert.source import Matrix
from data_pipeline.convert.variable_genes import add_moments
from data_pipeline.format.block import encode_block
from data_pipeline.format.schema import BLOCK_INDEX, ShardEntry, member_name, vocab_tag
from data_pipeline.stores import file_system, local_folder, store_explained
from scldm.errors import InputError
from scldm.files import disk_explained, made_aside, put_in_place, write_bytes, written_aside
from scldm.given_json import Count, read_sealed, sealed
from scldm.vocab import GeneVocab

STAGES = ("transpose", "scan", "clip", "scatter", "gather")
Tick = Callable[[int], None]


@dataclass
class Worker:
    """What a process keeps between units. work: the folder of unfinished work. process_bytes: what it may take for
    cells. tick: called with the number of cells (or columns) that have been worked through."""

    work: Path
    out: str
    process_bytes: int
    tick: Tick

    def __post_init__(self) -> None:
        self.matrices: dict[int, Matrix] = {}

    @cached_property
    def plan(self) -> Plan:
        return Plan.load(self.work / "plan")

    @cached_property
    def chosen(self) -> tuple[GeneVocab, np.ndarray]:
        """The set's genes, and for each gene of the plan its column among them or -1. Known after the scan."""
        chosen = ChosenGenes.load(self.work)
        return chosen.genes, np.array(chosen.place, np.int32)

    @cached_property
    def arena(self) -> Arena:
        return Arena(self.process_bytes // 3)

    def close(self) -> None:
        for matrix in self.matrices.values():
            matrix.close()
        self.matrices = {}

    def marker(self, stage: str, unit: int) -> Path:
        return self.work / stage / f"{unit:05d}.npz"

    def do(self, stage: str, unit: int) -> None:
        """Raises: InputError for what the sources hold that they should not, and a full disk."""
        with disk_explained(str(self.work)):
            (self.work / stage).mkdir(exist_ok=True)
            result = getattr(self, stage)(unit)
            with written_aside(self.marker(stage, unit)) as file:
                np.savez(file, **result)

    def _rows(self, unit: int) -> Iterator[tuple[int, int, Rows]]:
        """Chunks of a unit: position of the first cell among the plan's, source number, rows."""
        source, low, high = self.plan.units[unit]
        if source not in self.matrices:
            self.close()  # one open file at a time: there may be thousands
            transposed = self.work / "csc" / str(source) if self.plan.csc_groups[source] else None
            self.matrices[source] = open_matrix(self.plan.sources[source], transposed)
        at = low
        for rows in self.matrices[source].read(np.asarray(self.plan.row[low:high]), self.process_bytes // 4):
            spec = self.plan.sources[source]
            check_columns(rows, spec.n_columns, spec.uri or spec.kind)
            yield at, source, rows
            at += len(rows.rows)
            self.tick(len(rows.rows))
        assert at == high, f"unit {unit}: {at - low} of {high - low} rows read"

    def _explain(self, source: int, rows: Rows, error: CountError) -> InputError:
        spec = self.plan.sources[source]
        cell = self.matrices[source].row_name(int(rows.rows[error.row]))
        gene = self.plan.gene_ids(source)[error.column]
        return InputError(
            f"{spec.uri or spec.kind}: {spec.layer}: cell {cell}, gene {gene}: {error.value!r} is no count "
            f"({error.fault}). Counts are whole numbers of at least 0"
        )

    # --- before the cells ---------------------------------------------------------------------------------------

    def transpose(self, unit: int) -> dict[str, np.ndarray]:
        from data_pipeline.convert.source_h5ad import transpose_csc  # SOMA users need no h5py

        source, number = [(s, k) for s, groups in enumerate(self.plan.csc_groups) for k in range(len(groups))][unit]
        group = self.plan.csc_groups[source][number]
        transpose_csc(self.plan.sources[source], group, self.work / "csc" / str(source), number)
        self.tick(group[1] - group[0])
        return {}

    def scan(self, unit: int) -> dict[str, np.ndarray]:
        return self._moments(unit, np.full(self.plan.genes.n_genes, np.inf))

    def clip(self, unit: int) -> dict[str, np.ndarray]:
        return self._moments(unit, np.load(self.work / "clip_at.npy"))

    def _moments(self, unit: int, clip_at: np.ndarray) -> dict[str, np.ndarray]:
        """Sums over a unit's cells with enough genes, per gene of the plan, and how many of them are for training."""
        sums = np.zeros((4, self.plan.genes.n_genes), np.int64)
        n_cells, min_genes = 0, self.plan.settings["filter"]["min_genes"]
        for at, source, rows in self._rows(unit):
            in_train = np.asarray(self.plan.split[at : at + len(rows.rows)]) == 0
            try:
                n_cells += add_moments(rows, self.plan.column_of(source), clip_at, min_genes, in_train, sums)
            except CountError as error:
                raise self._explain(source, rows, error) from None
        return {"sums": sums, "n_cells": np.array(n_cells)}

    # --- the cells ----------------------------------------------------------------------------------------------

    def scatter(self, unit: int) -> dict[str, np.ndarray]:
        """Write a unit's cells as runs. Returns what the set's index and statistics need of them."""
        vocab, place = self.chosen
        source, low, high = self.plan.units[unit]
        column_of = self.plan.column_of(source)
        column_of = np.where(column_of >= 0, place[column_of], -1).astype(np.int32)
        min_genes = self.plan.settings["filter"]["min_genes"]
        folder = self.work / "runs"
        folder.mkdir(exist_ok=True)
        writer = RunWriter(folder, unit, self.arena)
        sums = GeneSums(vocab.n_genes)
        totals, n_expressed = np.zeros(high - low, np.uint64), np.zeros(high - low, np.uint32)
        too_few = 0
        for at, _, rows in self._rows(unit):
            mine = slice(at, at + len(rows.rows))
            in_train = np.asarray(self.plan.split[mine]) == 0
            try:
                found = narrow_rows(rows, column_of, vocab.n_genes, sums, in_train, min_genes)
            except CountError as error:
                raise self._explain(source, rows, error) from None
            if not min_genes and (found.n_genes_all == 0).any():
                row = int(rows.rows[np.flatnonzero(found.n_genes_all == 0)[0]])
                spec, name = self.plan.sources[source], self.matrices[source].row_name(row)
                raise InputError(f"{spec.uri or spec.kind}: cell {name} has no counts. filter.min_genes=1 drops it")
            kept = (found.n_genes_all >= min_genes) & (found.cells.nonzeros > 0)
            too_few += int((found.n_genes_all < min_genes).sum())
            cells, positions = found.cells, np.asarray(self.plan.position[mine])
            if not kept.all():
                cells, positions = cells.take(np.flatnonzero(kept)), positions[kept]
            writer.add(cells, positions)
            totals[at - low : at - low + len(kept)] = np.where(kept, found.totals, 0)
            n_expressed[at - low : at - low + len(kept)] = np.where(kept, found.cells.nonzeros, 0)
        writer.flush()
        return {
            "total_counts": totals,
            "n_expressed": n_expressed,
            "gene_total": sums.total,
            "gene_cells": sums.cells,
            "n_runs": np.array(writer.n_runs),
            "too_few_genes": np.array(too_few),
            "largest_count": np.array(writer.largest, np.uint64),
        }

    @cached_property
    def layout(self) -> Layout:
        return Layout.load(self.work)

    def gather(self, unit: int) -> dict[str, np.ndarray]:
        """Deliver one tar of the set to its place. Returns its blocks' records, size and hash."""
        plan, settings, layout = self.plan, self.plan.settings, self.layout
        shard = layout.shards[unit]
        vocab, _ = self.chosen
        tag = vocab_tag(vocab)
        per_block = settings["block_cells"]
        # the cells of one read: a third of the memory, since they are held once as read and once as blocks
        at_a_time = max(int(self.process_bytes / 3 / layout.cell_bytes) // per_block, 1) * per_block
        records, runs = [], layout.runs(self.work)
        end = shard.first_cell + shard.n_cells
        local = self.work / "tars" / Path(shard.path).name
        local.parent.mkdir(exist_ok=True)
        with written_aside(local) as file:
            tar = TarWriter(file)
            for low in range(shard.first_cell, end, at_a_time):
                high = min(low + at_a_time, end)
                first, last = int(layout.kept[low]), int(layout.kept[high - 1])
                positions, cells, order = read_range(runs, first, last + 1)
                assert len(positions) == high - low, "a cell is missing from the runs, or there twice"
                for start in range(0, high - low, per_block):
                    mine = slice(start, min(start + per_block, high - low))
                    cell = np.asarray(plan.cell_at[positions[mine]])
                    number = shard.first_block + len(records)
                    data = encode_block(
                        cells.take(order[mine]),
                        split=shard.split,
                        n_genes=vocab.n_genes,
                        vocab_tag=tag,
                        sources=plan.source[cell],
                        rows=plan.row[cell],
                        conditions=[ids[cell] for ids in plan.condition_ids],
                        codec=settings["codec"],
                        level=settings["codec_level"],
                    )
                    offset = tar.add(member_name(number), data)
                    records.append((shard.split, unit, offset, len(data), len(cell), low + start, zlib.crc32(data)))
                    self.tick(len(cell))
            n_bytes, digest = tar.finish()
        deliver(local, self.out, shard.path)
        return {
            "blocks": np.array(records, BLOCK_INDEX),
            "bytes": np.array(n_bytes),
            "sha256": np.frombuffer(bytes.fromhex(digest), np.uint8),
        }


# --- genes.json: the set's vocabulary ------------------------------------------------------------------------------


@dataclass(frozen=True)
class ChosenGenes:
    """place: of each gene of the plan its column among them, or -1
    dropped: genes by the filter that left them out"""

    genes: GeneVocab
    place: list[int]
    dropped: dict[str, int]

    def save(self, work: Path) -> None:
        write_bytes(work / "genes.json", json.dumps(sealed({**vars(self), "genes": self.genes.to_json()})).encode())

    @classmethod
    def load(cls, work: Path) -> ChosenGenes:
        """Raises: InputError for a file that is damaged."""
        return read_sealed(cls, work / "genes.json")


# --- layout: which cells are in which tar --------------------------------------------------------------------------


@dataclass(frozen=True)
class _Shards:
    """What layout.json says of a Layout."""

    shards: tuple[ShardEntry, ...]
    n_runs: tuple[Count, ...]
    cell_bytes: float


@dataclass(frozen=True)
class Layout:
    """What is known once every cell was seen. kept: positions in set order of the plan's cells that are in the set.

    shards: as in the manifest, without bytes and sha256
    n_runs: of every unit
    cell_bytes: mean size of a narrow cell
    """

    shards: tuple[ShardEntry, ...]
    n_runs: tuple[int, ...]
    cell_bytes: float
    kept: np.ndarray

    def runs(self, work: Path) -> list[Path]:
        return [work / "runs" / f"{unit:05d}-{k:03d}" for unit, n in enumerate(self.n_runs) for k in range(n)]

    def save(self, work: Path) -> None:
        with written_aside(work / "kept.npy") as file:
            np.save(file, self.kept)
        obj = {"shards": [vars(s) for s in self.shards], "n_runs": list(self.n_runs), "cell_bytes": self.cell_bytes}
        write_bytes(work / "layout.json", json.dumps(sealed(obj)).encode())

    @classmethod
    def load(cls, work: Path) -> Layout:
        """Raises: InputError for a file that is damaged."""
        of = read_sealed(_Shards, work / "layout.json")
        return cls(of.shards, of.n_runs, of.cell_bytes, np.load(work / "kept.npy", mmap_mode="r"))


# --- tars and where they go ----------------------------------------------------------------------------------------


class TarWriter:
    """A plain POSIX tar whose bytes depend on names and data alone."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.at, self.digest = file, 0, hashlib.sha256()

    def _write(self, data: bytes) -> None:
        self.file.write(data)
        self.digest.update(data)
        self.at += len(data)

    def add(self, name: str, data: bytes) -> int:
        """The offset of the data in the tar."""
        info = tarfile.TarInfo(name)
        info.size, info.mtime, info.mode = len(data), 0, 0o644
        self._write(info.tobuf(tarfile.USTAR_FORMAT))
        offset = self.at
        self._write(data)
        self._write(bytes(-len(data) % tarfile.BLOCKSIZE))
        return offset

    def finish(self) -> tuple[int, str]:
        """Bytes and SHA-256 of the whole."""
        self._write(bytes(2 * tarfile.BLOCKSIZE))
        return self.at, self.digest.hexdigest()


def deliver(local: Path, out: str, relative: str) -> None:
    """Move a whole file to its place in the set."""
    folder = local_folder(out)
    if folder is None:
        fs, root = file_system(out)
        target = f"{root.rstrip('/')}/{relative}"
        with store_explained(out):
            fs.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
            fs.put_file(str(local), target)
    else:
        place = folder / relative
        place.parent.mkdir(parents=True, exist_ok=True)
        if local.stat().st_dev == place.parent.stat().st_dev:
            put_in_place(local, place)
            return
        with made_aside(place) as part:
            shutil.copyfile(local, part)
    local.unlink()


def delivered_bytes(out: str, relative: str) -> int | None:
    """The size of a file of the set, or None where it is not there."""
    fs, root = file_system(out)
    try:
        with store_explained(out):
            return fs.size(f"{root.rstrip('/')}/{relative}")
    except FileNotFoundError:
        return None
