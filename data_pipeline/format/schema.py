"""The shard set's schema: names, dtypes, versions, and the manifest that says what a set is.

README.md beside this file is the specification; this module is the part of it that Python code imports. Reading order:
constants, dtypes that follow from a vocabulary, the block index, manifest, opening a set.
"""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from data_pipeline.stores import file_system, store_explained
from scldm.errors import InputError
from scldm.files import disk_explained
from scldm.vocab import ConditionVocab, GeneVocab

FORMAT = "scldm-shards"
VERSION = 3
KINDS = ("cells", "latents")
BLOCK_CELLS = 256
MANIFEST = "manifest.json"
SPLIT_NAME = re.compile(r"[A-Za-z0-9_]+")

Codec = Literal["none", "lz4", "zstd"]
CODECS: tuple[Codec, ...] = ("none", "lz4", "zstd")  # a block's header stores the position in this tuple

# One row per block, in block order. `shard` is the position in the manifest's shards, `offset` and `length` give the
# block's bytes within that tar, `first_cell` is the position of its first cell in every index/cells.*.npy.
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
    n_cells: int
    first_cell: int
    n_blocks: int
    first_block: int


@dataclass(frozen=True)
class ShardEntry:
    """One tar: its path within the set, whose split's it is, and what it must contain."""

    path: str
    split: int
    n_cells: int
    first_cell: int
    n_blocks: int
    first_block: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class FileEntry:
    """One index file."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class LibrarySizes:
    """log library sizes of the training cells by combination of the conditions `by` (all cells where `by` is empty).

    by: condition names
    ids: one row of label ids per combination that occurs, sorted
    n: its training cells
    log_mean, log_std: mean and standard deviation (divided by n) of the natural log of a cell's total counts
    """

    by: tuple[str, ...]
    ids: tuple[tuple[int, ...], ...]
    n: tuple[int, ...]
    log_mean: tuple[float, ...]
    log_std: tuple[float, ...]


@dataclass(frozen=True)
class CombinationCounts:
    """Cells of every combination of all conditions that occurs, by split: n[k][s] of combination k in split s."""

    by: tuple[str, ...]
    ids: tuple[tuple[int, ...], ...]
    n: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Statistics:
    """What later stages want to know without reading a block.

    library_sizes: from all conditions together over every coarser choice of them down to none, of the training split
    combinations: cells by combination and split
    n_expressed_largest: expressed genes of the cell that has most, over all splits
    n_nonzeros: stored counts, over all splits
    largest_count: the largest count, over all splits

    Gene means and the fraction of training cells that express a gene are index/genes.*.npy.
    """

    library_sizes: tuple[LibrarySizes, ...]
    combinations: CombinationCounts
    n_expressed_largest: int
    n_nonzeros: int
    largest_count: int


@dataclass(frozen=True)
class Manifest:
    """What a shard set is. The JSON has these keys, `format`, `version`, and the fields of the classes above within.

    kind: `cells`, or `latents` for encoded cells
    n_cells: of all splits
    genes: the gene vocabulary, with its hash
    conditions: the condition vocabularies
    splits: in order; a split's number is its position here
    split_rule: how the splits were drawn
    shards: in order; a shard's number is its position here
    index: every file under index/
    block_cells: cells per block, but for the last one of each split
    codec, codec_level: how a block's payload is compressed
    seed: of split and shuffle
    sources: one entry per file or experiment, a cell's source number is its position here
    query: what was asked of them
    report: what was dropped, and why
    tools: versions of what wrote the set
    statistics: see Statistics
    extra: what a kind adds (the latents' shape, the model they come from)
    """

    kind: str
    n_cells: int
    genes: GeneVocab
    conditions: ConditionVocab
    splits: tuple[SplitEntry, ...]
    split_rule: dict[str, Any]
    shards: tuple[ShardEntry, ...]
    index: tuple[FileEntry, ...]
    block_cells: int
    codec: Codec
    codec_level: int
    seed: int
    sources: tuple[dict[str, Any], ...]
    query: dict[str, Any]
    report: dict[str, Any]
    tools: dict[str, str]
    statistics: Statistics
    extra: dict[str, Any] = field(default_factory=dict)

    def split_number(self, name: str) -> int:
        """Raises: InputError with the splits that there are."""
        names = [s.name for s in self.splits]
        if name not in names:
            raise InputError(f"split {name!r} is not in the shard set; it has {', '.join(names)}")
        return names.index(name)

    def to_json(self) -> dict[str, Any]:
        obj = {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}
        return {"format": FORMAT, "version": VERSION, **obj}

    @classmethod
    def from_json(cls, obj: dict[str, Any], where: str = MANIFEST) -> Manifest:
        """Raises: InputError for another format, an unknown version, kind or codec, a missing key, a wrong hash."""
        if not isinstance(obj, dict) or obj.get("format") != FORMAT:
            raise InputError(f"{where}: not the manifest of a shard set (format {FORMAT!r} expected)")
        if obj.get("version") != VERSION:
            version = obj.get("version")
            if isinstance(version, int) and version < VERSION:
                raise InputError(f"{where}: format version {version}; this scldm reads {VERSION}: write the set again")
            raise InputError(f"{where}: format version {version!r} is unknown; this scldm reads version {VERSION}")
        try:
            given = {f.name: obj[f.name] for f in dataclasses.fields(cls)}
            if given["kind"] not in KINDS:
                raise InputError(f"{where}: kind {given['kind']!r} is unknown; there are {', '.join(KINDS)}")
            if given["codec"] not in CODECS:
                raise InputError(f"{where}: codec {given['codec']!r} is unknown; there are {', '.join(CODECS)}")
            given["genes"] = GeneVocab.from_json(given["genes"], where)
            given["conditions"] = ConditionVocab.from_json(given["conditions"])
            given["splits"] = tuple(SplitEntry(**e) for e in given["splits"])
            given["shards"] = tuple(ShardEntry(**e) for e in given["shards"])
            given["index"] = tuple(FileEntry(**e) for e in given["index"])
            given["sources"] = tuple(given["sources"])
            statistics = dict(given["statistics"])
            statistics["library_sizes"] = tuple(LibrarySizes(**_tuples(e)) for e in statistics["library_sizes"])
            statistics["combinations"] = CombinationCounts(**_tuples(statistics["combinations"]))
            given["statistics"] = Statistics(**statistics)
            return cls(**given)
        except (KeyError, TypeError) as error:
            raise InputError(f"{where}: not a whole manifest: {error}") from None


def _plain(value: Any) -> Any:
    """Dataclasses and vocabularies as what JSON holds."""
    if isinstance(value, (GeneVocab, ConditionVocab)):
        return value.to_json()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value


def _tuples(entry: dict[str, Any]) -> dict[str, Any]:
    """An entry with its lists, and the lists within them, as tuples."""

    def freeze(value: Any) -> Any:
        return tuple(freeze(v) for v in value) if isinstance(value, list) else value

    return {key: freeze(value) for key, value in entry.items()}


# --- opening a set -------------------------------------------------------------------------------------------------


def read_manifest(url: str) -> Manifest:
    """The manifest of the shard set at a folder or fsspec URL.

    Raises: InputError where there is none, or one that can't be read.
    """
    with store_explained(f"{url.rstrip('/')}/{MANIFEST}"):
        text = manifest_text(url)
    return parsed_manifest(url, text)


def manifest_text(url: str) -> bytes:
    """Raises: InputError where there is none, or a path that can't be used; else what the store's client raises."""
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
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError
        raise InputError(f"{path}: not JSON: {error}") from None
    return Manifest.from_json(obj, path)
