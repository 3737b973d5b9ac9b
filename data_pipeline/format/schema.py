"""The shard set's schema: names, dtypes, versions, and the manifest that says what a set is.

../README.md is the specification. This module is the part of it that Python code imports. Reading order:
constants, dtypes that follow from a vocabulary, the block index, manifest, whether its parts fit each other, opening a
set.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, get_args

import numpy as np

from data_pipeline.stores import file_system, store_explained
from scldm.errors import InputError
from scldm.files import disk_explained
from scldm.given_json import Count, known_of, sealed, typed, unsealed
from scldm.vocab import ConditionVocab, GeneVocab

FORMAT = "scldm-shards"
VERSION = 3
BLOCK_CELLS = 256
MANIFEST = "manifest.json"
SPLIT_NAME = re.compile(r"[A-Za-z0-9_]{1,100}")

Setkind = Literal["cells", "latents"]
Codec = Literal["none", "lz4", "zstd"]
CODECS: tuple[Codec, ...] = get_args(Codec)  # a block's header stores the position in this tuple

# a row per block, in block order. README.md says what each field is
BLOCK_INDEX = np.dtype(
    [
        ("split", "<u1"),
        ("shard", "<u4"),
        ("offset", "<u8"),
        ("length", "<u8"),
        ("n_cells", "<u2"),
        ("first_cell", "<u8"),
        ("crc32", "<u4"),
    ]
)
CELL_COLUMNS = {"source": "<u2", "row": "<i8", "total_counts": "<u8", "n_expressed": "<u4"}
GENE_COLUMNS = {"mean": "<f8", "fraction_expressed": "<f8"}


# --- dtypes and names that follow from the data --------------------------------------------------------------------


def column_dtype(n_genes: int) -> np.dtype:
    """The unsigned dtype that holds a gene's column: uint16 up to 65,536 genes (the Census has about 60,000)."""
    return np.dtype("<u2" if n_genes <= 1 << 16 else "<u4")


def count_dtype(largest_count: int) -> np.dtype:
    """The narrowest of uint16, int32, int64 that holds every count of a set."""
    return np.dtype("<u2" if largest_count < 1 << 16 else "<i4" if largest_count < 1 << 31 else "<i8")


def condition_dtype(n_labels: int) -> np.dtype:
    """The unsigned dtype that holds the label ids of a condition."""
    return np.dtype("<u1" if n_labels <= 1 << 8 else "<u2" if n_labels <= 1 << 16 else "<u4")


def vocab_tag(genes: GeneVocab) -> int:
    """The first 8 bytes of the vocabulary's hash: stands in every block, so that one of another set is refused."""
    return int.from_bytes(bytes.fromhex(genes.hash)[:8], "little")


def shard_name(split: str, number: int) -> str:
    return f"shards/{split}-{number:06d}.tar"


def member_name(block: int) -> str:
    return f"{block:08d}.block"


def cell_column_path(column: str) -> str:
    return f"index/cells.{column}.npy"


def gene_column_path(column: str) -> str:
    return f"index/genes.{column}.npy"


BLOCK_INDEX_PATH = "index/blocks.npy"


# --- manifest ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SplitEntry:
    """One split: its cells are `first_cell ... first_cell + n_cells` in set order, its blocks likewise."""

    name: str
    n_cells: Count
    first_cell: Count
    n_blocks: Count
    first_block: Count


@dataclass(frozen=True)
class ShardEntry:
    """One tar: its path within the set, whose split's it is, and what it must contain."""

    path: str
    split: Annotated[int, range(256)]
    n_cells: Count
    first_cell: Count
    n_blocks: Count
    first_block: Count
    bytes: Count
    sha256: str


@dataclass(frozen=True)
class FileEntry:
    """One index file."""

    path: str
    bytes: Count
    sha256: str


def array_file(path: str, array: np.ndarray) -> tuple[FileEntry, memoryview]:
    """An index file of an array: what the manifest says of it, and its bytes."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(array), version=(1, 0))
    data = buffer.getbuffer()
    return FileEntry(path, len(data), hashlib.sha256(data).hexdigest()), data


@dataclass(frozen=True)
class LibrarySizes:
    """Log library sizes of the training cells, natural log, by combination of the conditions `by`. README.md says
    what each is."""

    by: tuple[str, ...]
    ids: tuple[tuple[Count, ...], ...]
    n: tuple[Count, ...]
    log_mean: tuple[float, ...]
    log_std: tuple[float, ...]


@dataclass(frozen=True)
class CombinationCounts:
    """Cells of every combination of all conditions that occurs, by split: n[k][s] of combination k in split s."""

    by: tuple[str, ...]
    ids: tuple[tuple[Count, ...], ...]
    n: tuple[tuple[Count, ...], ...]


@dataclass(frozen=True)
class Statistics:
    """What later stages want to know without reading a block. README.md says what each is."""

    library_sizes: tuple[LibrarySizes, ...]
    combinations: CombinationCounts
    n_expressed_largest: Count
    n_nonzeros: Count
    largest_count: Count


@dataclass(frozen=True)
class Source:
    """One source of cells, and all that it takes to read its counts again.

    n_rows, n_columns: shape of the matrix, before filters
    mean_nonzeros: stored values a row, without a dense matrix's zeros. Of some rows, where counting all takes long
    size, modified_ns: bytes and modification time of the file, 0 where it is none
    """

    kind: str
    uri: str
    layer: str
    n_rows: Count
    n_columns: Count = 0
    mean_nonzeros: float = 0.0
    size: Count = 0
    modified_ns: int = 0
    measurement: str = ""
    organism: str = ""
    census_version: str = ""


@dataclass(frozen=True, kw_only=True)
class SourceEntry(Source):
    """What the manifest says of a source: that, and how many of its cells are in the set."""

    n_cells: Count


@dataclass(frozen=True)
class GenesReport:
    """What verbs read of the report on genes: numbers of genes by source."""

    not_in_vocabulary: dict[str, Count] = field(default_factory=dict)
    without_name: dict[str, Count] = field(default_factory=dict)
    without_version: dict[str, Count] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """What a shard set is. The JSON has these keys, and `format` and `version`. README.md says what each is."""

    kind: Setkind
    n_cells: Count
    genes: GeneVocab
    conditions: ConditionVocab
    splits: tuple[SplitEntry, ...]
    split_rule: dict[str, Any]
    shards: tuple[ShardEntry, ...]
    index: tuple[FileEntry, ...]
    block_cells: Annotated[int, range(1, 1 << 16)]
    codec: Codec
    codec_level: int
    seed: int
    sources: tuple[dict[str, Any], ...]
    query: dict[str, Any]
    report: dict[str, Any]
    tools: dict[str, str]
    statistics: Statistics
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def genes_report(self) -> GenesReport:
        """Raises: InputError."""
        return known_of(GenesReport, self.report.get("genes", {}), "report.genes")

    def split_number(self, name: str) -> int:
        """Raises: InputError with the splits that there are."""
        names = [s.name for s in self.splits]
        if name not in names:
            raise InputError(f"split {name!r} is not in the shard set. It has {', '.join(names)}")
        return names.index(name)

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, "version": VERSION, **json.loads(json.dumps(vars(self), default=_plain))}

    def file(self) -> bytes:
        """What the set's manifest.json holds."""
        return json.dumps(sealed(self.to_json()), indent=1).encode()

    @classmethod
    def from_json(cls, obj: Any, where: str = MANIFEST) -> Manifest:
        """Raises: InputError for another format or version, a wrong hash, values that can't be or don't fit."""
        if not isinstance(obj, dict) or obj.get("format") != FORMAT:
            raise InputError(f"{where}: not the manifest of a shard set (format {FORMAT!r} expected)")
        version = obj.get("version")
        if version != VERSION or type(version) is not int:
            if isinstance(version, int) and version < VERSION:
                raise InputError(f"{where}: format version {version}. This scldm reads {VERSION}: write the set again")
            raise InputError(f"{where}: format version {version!r} is unknown. This scldm reads version {VERSION}")
        stated = unsealed(obj, where)
        manifest = typed(cls, {key: of for key, of in stated.items() if key not in ("format", "version")}, where)
        for wrong in misfits(manifest):
            raise InputError(f"{where}: {wrong}")
        return manifest


def _plain(value: Any) -> Any:
    """A vocabulary, or a dataclass of the manifest, as what JSON holds."""
    return value.to_json() if isinstance(value, (GeneVocab, ConditionVocab)) else vars(value)


# --- whether the parts fit each other ------------------------------------------------------------------------------


@dataclass(frozen=True)
class OfLatents:
    """What `extra` holds for a set of kind latents, and what a run on latents keeps of it. mean and std, each (L, Z),
    are there where a set has training cells.

    vae: hash of the autoencoder's weights
    shape: (L, Z)
    genes: gene set that the encoder was given
    precision: in which the autoencoder computed. A run whose cells came as counts does not say
    cells: hash of the set of cells. A run has none whose cells came as counts
    encoded: how such a run had them
    """

    vae: str
    shape: tuple[Annotated[int, range(1, 1 << 32)], Annotated[int, range(1, 1 << 32)]]
    genes: dict[str, Any]
    precision: Literal["float32", "bfloat16"] = "float32"
    cells: str = ""
    encoded: str = ""
    mean: tuple[tuple[float, ...], ...] = ()
    std: tuple[tuple[float, ...], ...] = ()


def misfits(m: Manifest) -> Iterator[str]:
    """What a manifest says that can't be, one sentence each. Readers act on all of it."""
    names = [split.name for split in m.splits]
    if not names or len(set(names)) < len(names) or not all(map(SPLIT_NAME.fullmatch, names)):
        yield f"splits {', '.join(names) or 'none'}: each needs a name of its own of letters, digits and _"
        return
    if wrong := [name for name in m.conditions.names if "/" in name or "\0" in name]:
        yield f"conditions: {wrong[0]!r} can't be part of a file name"
    cell = block = 0
    for number, split in enumerate(m.splits):
        mine = [shard for shard in m.shards if shard.split == number]
        if (split.n_cells, split.n_blocks) != (sum(s.n_cells for s in mine), sum(s.n_blocks for s in mine)):
            yield f"split {split.name}: its shards don't add up to its {split.n_cells} cells in {split.n_blocks} blocks"
        if split.n_cells and (split.first_cell, split.first_block) != (cell, block):
            yield (
                f"split {split.name}: first_cell={split.first_cell}, first_block={split.first_block}. The splits "
                f"before it end at cell {cell}, block {block}"
            )
        for k, shard in enumerate(mine):
            if shard.path != shard_name(split.name, k):
                yield f"shards: {shard.path!r} must be {shard_name(split.name, k)}"
            if (shard.first_cell, shard.first_block) != (cell, block):
                yield f"{shard.path}: does not begin where the one before it ends"
            if shard.n_blocks != -(-shard.n_cells // m.block_cells):
                yield f"{shard.path}: {shard.n_cells} cells are not {shard.n_blocks} blocks of {m.block_cells}"
            cell, block = cell + shard.n_cells, block + shard.n_blocks
    if [shard.split for shard in m.shards] != sorted(shard.split for shard in m.shards if shard.split < len(names)):
        yield "shards: not split by split"
    if cell != m.n_cells:
        yield f"its shards hold {cell} cells, it says {m.n_cells}"
    paths = [entry.path for entry in m.index]
    expected = index_kinds(m)
    if sorted(paths) != sorted(expected):
        missing, more = sorted(set(expected) - set(paths)), sorted(set(paths) - set(expected))
        yield f"index: {missing[0]} is not listed" if missing else f"index: {(more or paths)[0]} can't be in it"
    yield from _misfits_of_origin(m)
    yield from _misfits_of_statistics(m)
    if m.kind == "latents":
        yield from _misfits_of_latents(m)


def _misfits_of_origin(m: Manifest) -> Iterator[str]:
    try:
        for k, source in enumerate(m.sources):
            known_of(SourceEntry, source, f"sources[{k}]")
        _ = m.genes_report
        typed(str, m.query.get("missing", ""), "query.missing")
    except InputError as error:
        yield str(error)


def _misfits_of_statistics(m: Manifest) -> Iterator[str]:
    of = m.statistics
    tables = [(f"library_sizes by {', '.join(entry.by) or 'nothing'}", entry) for entry in of.library_sizes]
    for what, table in [("combinations", of.combinations), *tables]:
        if not set(table.by) <= set(m.conditions.names) or len(set(table.by)) < len(table.by):
            yield f"statistics.{what}: {', '.join(table.by)} are not conditions of the set"
            continue
        n_labels = [m.conditions.n_labels(name) for name in table.by]
        if any(len(ids) != len(n_labels) or any(k >= n for k, n in zip(ids, n_labels)) for ids in table.ids):
            yield f"statistics.{what}: ids that are no labels"
        if len(table.n) != len(table.ids):
            yield f"statistics.{what}: {len(table.n)} numbers of cells for {len(table.ids)} combinations"
    for what, entry in tables:
        if not len(entry.n) == len(entry.log_mean) == len(entry.log_std) or min(entry.log_std, default=0.0) < 0:
            yield f"statistics.{what}: each combination has one log_mean, and one log_std of at least 0"
    by_split = [0] * len(m.splits)
    for row in of.combinations.n:
        if len(row) != len(m.splits):
            yield f"statistics.combinations: {len(row)} numbers for {len(m.splits)} splits"
            return
        by_split = [have + more for have, more in zip(by_split, row)]
    if by_split != [split.n_cells for split in m.splits]:
        yield "statistics.combinations: do not add up to the cells of the splits"
    if of.n_expressed_largest > m.genes.n_genes:
        yield f"statistics.n_expressed_largest={of.n_expressed_largest} of {m.genes.n_genes} genes"


def _misfits_of_latents(m: Manifest) -> Iterator[str]:
    try:
        of = typed(OfLatents, m.extra, "extra")
    except InputError as error:
        yield str(error)
        return
    if not of.cells:
        yield "extra.cells: must be the hash of the set of cells"
    (tokens, width), n_train = of.shape, m.splits[0].n_cells
    for name, moments in (("mean", of.mean), ("std", of.std)):
        if n_train and (len(moments) != tokens or any(len(row) != width for row in moments)):
            yield f"extra.{name}: must be {tokens} x {width} numbers"
    if any(value < 0 for row in of.std for value in row):
        yield "extra.std: must not be negative"
    for shard in m.shards:
        if shard.bytes < 4 * tokens * width * shard.n_cells:
            yield f"{shard.path}: {shard.bytes} bytes are too few for {shard.n_cells} latents of {tokens} x {width}"
            return


def index_kinds(m: Manifest) -> dict[str, tuple[np.dtype, tuple[int]]]:
    """Every file under index/, with the dtype and shape of its array."""
    labels = {name: condition_dtype(m.conditions.n_labels(name)) for name in m.conditions.names}
    cells = {**CELL_COLUMNS, **{f"condition.{name}": dtype for name, dtype in labels.items()}}
    return {
        BLOCK_INDEX_PATH: (BLOCK_INDEX, (sum(s.n_blocks for s in m.shards),)),
        **{cell_column_path(name): (np.dtype(dtype), (m.n_cells,)) for name, dtype in cells.items()},
        **{gene_column_path(name): (np.dtype(dtype), (m.genes.n_genes,)) for name, dtype in GENE_COLUMNS.items()},
    }


def misfits_of_index(m: Manifest, blocks: np.ndarray) -> Iterator[str]:
    """What the block index says that can't be, or that the manifest contradicts."""
    n_cells, n_blocks = int(blocks["n_cells"].sum(dtype=np.int64)), sum(s.n_blocks for s in m.shards)
    if (n_cells, len(blocks)) != (m.n_cells, n_blocks):
        yield f"{len(blocks)} blocks of {n_cells} cells, the manifest says {n_blocks} of {m.n_cells}"
        return
    shard_of = np.repeat(np.arange(len(m.shards)), [s.n_blocks for s in m.shards])
    before = np.cumsum(blocks["n_cells"], dtype=np.int64) - blocks["n_cells"]
    first_of_shard = np.array([s.first_cell for s in m.shards], np.int64)[shard_of]
    in_shard = np.array([s.n_cells for s in m.shards], np.int64)[shard_of]
    size = np.array([s.bytes for s in m.shards], np.uint64)[shard_of]
    right = {
        "shard": shard_of,
        "split": np.array([s.split for s in m.shards], np.int64)[shard_of],
        "first_cell": before,
        "n_cells": np.minimum(m.block_cells, first_of_shard + in_shard - before),
    }
    for name, values in right.items():
        if (wrong := blocks[name] != values).any():
            at = int(np.argmax(wrong))
            yield f"block {at}: {name}={blocks[name][at]}, the manifest says {values[at]}"
    beyond = (blocks["offset"] > size) | (blocks["length"] > size - np.minimum(blocks["offset"], size))
    if beyond.any():
        at = int(np.argmax(beyond))
        yield f"block {at}: {blocks['length'][at]} bytes at {blocks['offset'][at]} are beyond its shard's {size[at]}"


# --- opening a set -------------------------------------------------------------------------------------------------


def read_manifest(url: str) -> Manifest:
    """The manifest of the shard set at a folder or fsspec URL.

    Raises: InputError where there is none, or one that can't be read.
    """
    with store_explained(f"{url.rstrip('/')}/{MANIFEST}"):
        text = manifest_text(url)
    return parsed_manifest(url, text)


def manifest_text(url: str) -> bytes:
    """Raises: InputError where there is none, or a path that can't be used. Else what the store's client raises."""
    fs, root = file_system(url)
    with disk_explained(f"{url.rstrip('/')}/{MANIFEST}"):
        try:
            with fs.open(f"{root.rstrip('/')}/{MANIFEST}", "rb") as file:
                return file.read()
        except (FileNotFoundError, NotADirectoryError):
            raise InputError(f"{url}: no {MANIFEST}: not a shard set, or one that is not finished") from None


def parsed_manifest(url: str, text: bytes) -> Manifest:
    """The manifest whose file says this. Raises: InputError for one that can't be read."""
    path = f"{url.rstrip('/')}/{MANIFEST}"
    try:
        obj = json.loads(text)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError, JSONDecodeError. Or lists in lists in lists
        raise InputError(f"{path}: not JSON: {error}") from None
    return Manifest.from_json(obj, path)
