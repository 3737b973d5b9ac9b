"""Is a shard set what its manifest says, and what its source holds? Every byte is read, every cell decoded.

Reading order: Fault, verify_shards (the story), then its parts.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace

import numpy as np

from data_pipeline.convert.config import SourceConfig
from data_pipeline.convert.genes import join_genes
from data_pipeline.convert.narrow import GeneSums, check_columns, narrow_rows
from data_pipeline.convert.open import open_matrix, open_sources
from data_pipeline.convert.splits import keys
from data_pipeline.format.block import Block, BlockBuffers, decode_block
from data_pipeline.format.latent_block import LATENT_HEADER, LatentSlots
from data_pipeline.format.schema import (
    BLOCK_INDEX_PATH,
    Manifest,
    ShardEntry,
    column_dtype,
    count_dtype,
    gene_column_path,
    index_kinds,
    member_name,
    misfits_of_index,
    read_manifest,
    vocab_tag,
)
from data_pipeline.format.statistics import compute_statistics
from data_pipeline.stores import file_system, opened
from scldm.errors import InputError
from scldm.files import sha256_of
from scldm.given_json import typed
from scldm.progress import Progress


@dataclass(frozen=True)
class Fault:
    """Something that isn't as it must be. where: the file, and the block where one is to blame."""

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


@dataclass(frozen=True)
class Verdict:
    """What was found.

    faults: empty for a sound set
    notes: what could not be looked at, and files that are none of the set's
    n_compared: cells that were compared with their sources
    """

    manifest: Manifest
    faults: tuple[Fault, ...]
    notes: tuple[str, ...]
    n_compared: int


def verify_shards(url: str, sample: int = 256) -> Verdict:
    """Everything about a shard set that can be checked.

    sample: cells to compare with the sources, where those are reachable
    Raises: InputError where there is no set.
    """
    manifest = read_manifest(url)
    strays, notes = _check_strays(url, manifest)
    index, more = _read_index(url, manifest)
    faults = [*strays, *more]
    if index is None:  # without it nothing more can be said than whether the tars are whole
        faults += [f for shard in manifest.shards for f in _check_bytes(url, shard)]
        notes.append("the index is damaged: blocks and statistics were not checked")
        return Verdict(manifest, tuple(faults), tuple(notes), 0)
    seen = Seen(manifest)
    with Progress("verify", len(index["blocks"]), "blocks") as bar:
        for number, shard in enumerate(manifest.shards):
            faults += _check_shard(url, manifest, number, shard, index, seen, bar)
    faults += _check_order(manifest, index)
    faults += _check_statistics(manifest, index, seen)
    faults += _check_moments(manifest, seen)
    n_compared = 0
    if not faults and sample and manifest.kind == "cells":
        found, more_notes, n_compared = _compare_with_sources(url, manifest, index, sample)
        faults += found
        notes += more_notes
    return Verdict(manifest, tuple(faults), tuple(notes), n_compared)


class Seen:
    """What the blocks themselves say, to be compared with statistics.

    latents: sum and sum of squares over the training cells, (2, L, Z). None for a set of cells
    """

    def __init__(self, manifest: Manifest) -> None:
        self.gene_total = np.zeros(manifest.genes.n_genes)
        self.gene_cells = np.zeros(manifest.genes.n_genes)
        self.largest_count = 0
        self.whole = True
        self.slots = LatentSlots(manifest, 1) if manifest.kind == "latents" else None
        self.latents = np.zeros((2, *self.slots.shape)) if self.slots else None


# --- manifest and index --------------------------------------------------------------------------------------------


def _check_strays(url: str, manifest: Manifest) -> tuple[list[Fault], list[str]]:
    """Files that the manifest doesn't list: a tar is a fault, since readers without the manifest take all tars."""
    fs, root = file_system(url)
    listed = {entry.path for entry in (*manifest.shards, *manifest.index)}
    faults, notes = [], []
    for folder in ("shards", "index"):
        try:
            names = [name.rsplit("/", 1)[1] for name in fs.find(f"{root.rstrip('/')}/{folder}", maxdepth=1)]
        except Exception as error:  # plain web servers, say, list nothing, and each store refuses in its own way
            return faults, [f"not looked for files that the manifest does not list: {error}"]
        for path in sorted({f"{folder}/{name}" for name in names} - listed):
            if path.endswith(".tar"):
                faults.append(Fault(path, "is not in the manifest: another set's, or one that was added"))
            else:
                notes.append(f"{path}: is not in the manifest")
    return faults, notes


def _read_index(url: str, manifest: Manifest) -> tuple[dict[str, np.ndarray] | None, list[Fault]]:
    """The index's arrays by name. None where one of them can't be trusted."""
    faults, arrays = [], {}
    entries = {entry.path: entry for entry in manifest.index}
    for path, kind in index_kinds(manifest).items():
        try:
            with opened(f"{url.rstrip('/')}/{path}") as file:
                data = file.read()
        except FileNotFoundError:
            faults.append(Fault(path, "missing"))
            continue
        if len(data) != entries[path].bytes:
            faults.append(Fault(path, f"{len(data)} bytes, the manifest says {entries[path].bytes}"))
        elif hashlib.sha256(data).hexdigest() != entries[path].sha256:
            faults.append(Fault(path, "its SHA-256 is not the manifest's: changed or damaged"))
        else:
            try:
                array = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
            except (ValueError, OverflowError, MemoryError) as error:
                faults.append(Fault(path, f"not a .npy file as the format has it: {error}"))
                continue
            if (array.dtype, array.shape) != kind:
                faults.append(Fault(path, f"{array.dtype} {array.shape}, must be {kind[0]} {kind[1]}"))
            arrays[path.removeprefix("index/").removesuffix(".npy")] = array
    if not faults:
        faults += [Fault(BLOCK_INDEX_PATH, wrong) for wrong in misfits_of_index(manifest, arrays["blocks"])]
    return (None if faults else arrays), faults


# --- tars ----------------------------------------------------------------------------------------------------------


def _check_bytes(url: str, shard: ShardEntry) -> Iterator[Fault]:
    try:
        with opened(f"{url.rstrip('/')}/{shard.path}") as file:
            n, digest = sha256_of(file)
    except FileNotFoundError:
        yield Fault(shard.path, "missing")
        return
    if n != shard.bytes:
        yield Fault(shard.path, f"{n} bytes, the manifest says {shard.bytes}")
    elif digest != shard.sha256:
        yield Fault(shard.path, "its SHA-256 is not the manifest's: changed or damaged")


def _check_shard(
    url: str,
    manifest: Manifest,
    number: int,
    shard: ShardEntry,
    index: dict[str, np.ndarray],
    seen: Seen,
    bar: Progress,
) -> Iterator[Fault]:
    """One pass over a tar: its bytes, the members' headers, the blocks and every cell's columns in the index."""
    n_bytes, digest, named = 0, hashlib.sha256(), False
    buffers = BlockBuffers(column_dtype(manifest.genes.n_genes), count_dtype(manifest.statistics.largest_count))
    tag = vocab_tag(manifest.genes)
    numbers = np.flatnonzero(index["blocks"]["shard"] == number)
    try:
        with opened(f"{url.rstrip('/')}/{shard.path}") as file:

            def take(n: int) -> bytes:
                nonlocal n_bytes
                data = file.read(n)
                digest.update(data)
                n_bytes += len(data)
                return data

            for block in numbers:
                record = index["blocks"][block]
                where = f"{shard.path}: block {block}"
                if int(record["offset"]) < n_bytes:
                    yield Fault(BLOCK_INDEX_PATH, f"block {block} of {shard.path} overlaps the one before it")
                    named = True
                    break
                header = take(int(record["offset"]) - n_bytes)
                data = take(int(record["length"]))
                if len(data) < record["length"]:
                    seen.whole, named = False, True
                    yield Fault(where, f"truncated: the tar ends after {n_bytes} of {shard.bytes} bytes")
                    break
                found = list(_check_block(where, int(block), header, data, record, manifest, index, seen, buffers, tag))
                named |= bool(found)
                yield from found
                bar.advance(1)
            while take(1 << 20):
                pass
    except FileNotFoundError:
        seen.whole = False
        yield Fault(shard.path, "missing")
        return
    if not named and n_bytes != shard.bytes:
        yield Fault(shard.path, f"{n_bytes} bytes, the manifest says {shard.bytes}")
    elif not named and digest.hexdigest() != shard.sha256:
        yield Fault(shard.path, "its SHA-256 is not the manifest's. Its blocks are sound: padding or end was changed")


def _check_block(
    where: str, number: int, header: bytes, data: bytes, record: np.void, manifest: Manifest,
    index: dict[str, np.ndarray], seen: Seen, buffers: BlockBuffers, tag: int,
) -> Iterator[Fault]:  # fmt: skip
    try:
        member = tarfile.TarInfo.frombuf(header[-tarfile.BLOCKSIZE :], "utf-8", "strict")
        if (member.name, member.size) != (member_name(number), len(data)):
            yield Fault(where, f"the tar's member is {member.name!r} of {member.size} bytes")
    except tarfile.HeaderError as error:
        yield Fault(where, f"the tar's member header is damaged ({error})")
    if zlib.crc32(data) != record["crc32"]:
        seen.whole = False
        yield Fault(where, "its checksum is not the index's: changed or damaged")
        return
    if seen.slots is not None:
        yield from _check_latents(where, data, record, index, manifest, seen, seen.slots)
        return
    try:
        block = decode_block(data, buffers, vocab_tag=tag, where=where)
    except InputError as error:
        seen.whole = False
        yield Fault(where, str(error).removeprefix(f"{where}: "))
        return
    totals = np.add.reduceat(np.append(block.counts.astype(np.uint64), np.uint64(0)), block.indptr[:-1])
    columns = {"source": block.sources, "row": block.rows, "n_expressed": np.diff(block.indptr), "total_counts": totals}
    columns |= {f"condition.{name}": ids for name, ids in zip(manifest.conditions.names, block.conditions)}
    if len(block.conditions) != len(manifest.conditions.names):
        yield Fault(where, f"{len(block.conditions)} conditions, the manifest has {len(manifest.conditions.names)}")
    yield from _unlike(where, record, index, block.split, columns)
    _add(seen, block)


def _unlike(
    where: str, record: np.void, index: dict[str, np.ndarray], split: int, columns: dict[str, np.ndarray]
) -> Iterator[Fault]:
    """What a block says otherwise than the index. columns: of its cells, by the index's names"""
    n, first = len(columns["row"]), int(record["first_cell"])
    of_block = {"n_cells": (n, record["n_cells"]), "split": (split, record["split"])}
    of_cells = {name: (values, index[f"cells.{name}"][first : first + n]) for name, values in columns.items()}
    for name, (in_block, in_index) in {**of_block, **of_cells}.items():
        if not np.array_equal(in_block, in_index):
            yield Fault(where, f"its {name} is not the index's")


def _check_latents(
    where: str, data: bytes, record: np.void, index: dict[str, np.ndarray], manifest: Manifest, seen: Seen,
    slots: LatentSlots,
) -> Iterator[Fault]:  # fmt: skip
    assert seen.latents is not None
    try:
        slots.fill(0, np.frombuffer(data, np.uint8), where)
    except InputError as error:
        seen.whole = False
        yield Fault(where, str(error).removeprefix(f"{where}: "))
        return
    n, split = int(slots.n_cells[0]), int(np.frombuffer(data, LATENT_HEADER, count=1)["split"][0])
    columns = {"source": slots.identity[0, :n, 0], "row": slots.identity[0, :n, 1]}
    columns["total_counts"] = slots.total_counts[0, :n]
    columns |= {f"condition.{name}": slots.labels[0, :n, k] for k, name in enumerate(manifest.conditions.names)}
    yield from _unlike(where, record, index, split, columns)
    latent_BLZ = slots.latent[0, :n]
    if not np.isfinite(latent_BLZ).all():
        seen.whole = False
        yield Fault(where, "its latents are not finite")
    if record["split"] == 0:
        seen.latents += latent_BLZ.sum(0, dtype=np.float64), np.square(latent_BLZ, dtype=np.float64).sum(0)


def _add(seen: Seen, block: Block) -> None:
    seen.largest_count = max(seen.largest_count, int(block.counts.max(initial=0)))
    if block.split == 0:
        n_genes = len(seen.gene_total)
        seen.gene_total += np.bincount(block.columns, block.counts, n_genes)
        seen.gene_cells += np.bincount(block.columns, minlength=n_genes)


# --- order and statistics ------------------------------------------------------------------------------------------


def _check_order(manifest: Manifest, index: dict[str, np.ndarray]) -> Iterator[Fault]:
    """Every cell once, and each split in the order that its seed says."""
    source, row = index["cells.source"], index["cells.row"]
    order = np.lexsort((row, source))
    same = (np.diff(source[order].astype(np.int64)) == 0) & (np.diff(row[order]) == 0)
    if same.any():
        cell = order[np.flatnonzero(same)[0]]
        n = int(same.sum())
        yield Fault("index", f"{n} cells stand more than once in the set, the first is ({source[cell]}, {row[cell]})")
    shuffle = keys(manifest.seed, "shuffle", source, row)
    for split in manifest.splits:
        mine = shuffle[split.first_cell : split.first_cell + split.n_cells]
        if (mine[1:] < mine[:-1]).any():
            at = split.first_cell + int(np.flatnonzero(mine[1:] < mine[:-1])[0]) + 1
            yield Fault("index", f"split {split.name} is not in the order of its seed, from cell {at} on")


def _check_statistics(manifest: Manifest, index: dict[str, np.ndarray], seen: Seen) -> Iterator[Fault]:
    split = np.repeat(np.arange(len(manifest.splits)), [s.n_cells for s in manifest.splits])
    conditions = {name: index[f"cells.condition.{name}"] for name in manifest.conditions.names}
    totals, expressed = index["cells.total_counts"], index["cells.n_expressed"]
    stated = manifest.statistics
    # what the index says. Where every block could be read, what the blocks say
    counted = seen.whole and seen.slots is None  # latents have no counts
    largest = seen.largest_count if counted else stated.largest_count
    right = compute_statistics(split, len(manifest.splits), conditions, totals, expressed, largest)
    for name in ("combinations", "n_expressed_largest", "n_nonzeros", "largest_count"):
        if getattr(right, name) != getattr(stated, name):
            yield Fault("manifest.json", f"statistics.{name} is not what the cells say")
    if len(right.library_sizes) != len(stated.library_sizes):
        yield Fault("manifest.json", "statistics.library_sizes lack, or have more than, the choices of conditions")
    for ours, theirs in zip(right.library_sizes, stated.library_sizes):
        exact = (ours.by, ours.ids, ours.n) == (theirs.by, theirs.ids, theirs.n)
        if not exact or not np.allclose((ours.log_mean, ours.log_std), (theirs.log_mean, theirs.log_std), rtol=1e-9):
            yield Fault("manifest.json", f"statistics.library_sizes by {', '.join(ours.by) or 'nothing'} are wrong")
    n_train = manifest.splits[0].n_cells
    for name, sums in (("mean", seen.gene_total), ("fraction_expressed", seen.gene_cells)):
        if counted and not np.allclose(index[f"genes.{name}"], sums / n_train, rtol=1e-9):
            yield Fault(gene_column_path(name), "is not what the training cells say")


def _check_moments(manifest: Manifest, seen: Seen) -> Iterator[Fault]:
    """Mean and standard deviation of latents, by which training scales them."""
    n_train = manifest.splits[0].n_cells
    if seen.latents is None or not (seen.whole and n_train):
        return
    mean, of_squares = seen.latents / n_train
    for name, right in (("mean", mean), ("std", np.sqrt(np.maximum(of_squares - mean**2, 0)))):
        if not np.allclose(manifest.extra[name], right, rtol=1e-6, atol=1e-6):
            yield Fault("manifest.json", f"extra.{name} is not that of the training cells' latents")


# --- sources -------------------------------------------------------------------------------------------------------


def _compare_with_sources(
    url: str, manifest: Manifest, index: dict[str, np.ndarray], sample: int
) -> tuple[list[Fault], list[str], int]:
    """A sample of cells, gene by gene and label by label, with what the sources hold now."""
    names, query = manifest.conditions.names, manifest.query
    try:
        config = typed(SourceConfig, query.get("source"), "manifest.json: query.source")
        release = next((s.get("census_version", "") for s in manifest.sources), "") or config.census_version
        config = replace(config, census_version=typed(str, release, "manifest.json: census_version"))
        namespace = None if config.namespace == "auto" else config.namespace
        sources = open_sources(config, names, typed(str, query.get("missing"), "manifest.json: query.missing"))
        if [s.spec.uri for s in sources] != [s.get("uri") for s in manifest.sources]:
            return [], ["not compared with its sources: there are others now"], 0
        joined = join_genes(
            [s.genes for s in sources], config.join, namespace, config.gene_table, config.min_gene_share
        )
    except InputError as error:
        return [], [f"not compared with its sources: {error}"], 0
    place = manifest.genes.lookup(joined.vocab.ids) - 1
    rng = np.random.default_rng(0)
    chosen = np.sort(rng.choice(manifest.n_cells, min(sample, manifest.n_cells), replace=False))
    faults: list[Fault] = []
    for number, source in enumerate(sources):
        mine = chosen[index["cells.source"][chosen] == number]
        mine = mine[np.argsort(index["cells.row"][mine])]
        rows = index["cells.row"][mine]
        if not len(mine):
            continue
        where_now = np.searchsorted(source.rows, rows)
        gone = (where_now == len(source.rows)) | (source.rows[np.minimum(where_now, len(source.rows) - 1)] != rows)
        if gone.any():
            faults.append(Fault(source.genes.uri, f"row {rows[gone][0]} is no longer among its cells"))
            continue
        column_of = np.where(joined.column_of[number] >= 0, place[joined.column_of[number]], -1).astype(np.int32)
        sums = GeneSums(manifest.genes.n_genes)
        with closing(open_matrix(source.spec)) as matrix:
            at = 0
            for chunk in matrix.read(rows, 64 << 20):
                check_columns(chunk, source.spec.n_columns, source.genes.uri)
                cells = narrow_rows(
                    chunk, column_of, manifest.genes.n_genes, sums, np.zeros(len(chunk.rows), bool)
                ).cells
                for k in range(len(chunk.rows)):
                    cell = mine[at + k]
                    ours = _cell_of(url, manifest, index, int(cell))
                    theirs = cells.take(np.array([k]))
                    labels = {n: manifest.conditions.labels[n][index[f"cells.condition.{n}"][cell]] for n in names}
                    now = {n: source.obs[n].iloc[where_now[at + k]] for n in names}
                    if not _same_counts(ours, theirs.steps, theirs.small, theirs.far, theirs.large) or labels != now:
                        what = "counts" if labels == now else "labels"
                        name = matrix.row_name(int(rows[at + k]))
                        faults.append(Fault(source.genes.uri, f"the {what} of cell {name} are not the set's"))
                at += len(chunk.rows)
    return faults, [], len(chosen)


def _cell_of(url: str, manifest: Manifest, index: dict[str, np.ndarray], cell: int) -> tuple[np.ndarray, np.ndarray]:
    """Columns and counts of one cell of the set."""
    number = int(np.searchsorted(index["blocks"]["first_cell"], cell, "right")) - 1
    record = index["blocks"][number]
    with opened(f"{url.rstrip('/')}/{manifest.shards[record['shard']].path}") as file:
        file.seek(int(record["offset"]))
        block = decode_block(file.read(int(record["length"])), where=f"block {number}")
    k = cell - int(record["first_cell"])
    mine = slice(block.indptr[k], block.indptr[k + 1])
    return block.columns[mine], block.counts[mine]


def _same_counts(
    ours: tuple[np.ndarray, np.ndarray], steps: np.ndarray, small: np.ndarray, far: np.ndarray, large: np.ndarray
) -> bool:
    steps, counts = steps.astype(np.int64), small.astype(np.int64)
    steps[steps == 0], counts[counts == 0] = far, large
    return np.array_equal(ours[0], np.cumsum(steps) - 1) and np.array_equal(ours[1], counts)
