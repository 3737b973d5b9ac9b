"""What `scldm shards write` is asked for. It imports no package that takes long: what is wrong is said at once."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from data_pipeline.format.schema import BLOCK_CELLS, SPLIT_NAME, Codec
from scldm.checked import SEEDS, Checked, checked
from scldm.errors import InputError
from scldm.vocab import MIN_GENE_SHARE

Kind = Literal["auto", "h5ad", "soma", "census"]
Join = Literal["union", "intersection"]
BASE_BYTES = 320 << 20  # what a process takes before it has read a cell
LEAST_BYTES = 64 << 20  # what it needs beyond that


@dataclass(frozen=True)
class SourceConfig(Checked):
    """What to read.

    kind: h5ad stands for AnnData files, h5ad or zarr. auto looks at what lies there
    paths: h5ad or zarr files or globs of them, or the URI of a SOMA experiment or of a Census
    census_version: of the Census on the net, such as 2025-01-30, where no path is given
    organism: which experiment of a Census
    measurement: of a SOMA experiment
    layer: X, raw or a name in layers. Empty takes the one that holds counts from h5ad, and raw from SOMA
    obs_filter: cells to take, such as "tissue == 'lung' and n_genes > 500"
    var_filter: genes to take
    primary_data_only: of the Census, only cells with is_primary_data: each cell once
    gene_column: column of var with the gene ids. Empty takes the index from h5ad, and feature_id or var_id from SOMA
    namespace: of the gene vocabulary. auto takes the sources' own. Any other must be theirs, or needs gene_table
    join: several sources' genes: all, or those that every source has
    min_gene_share: of the smallest source's genes that the others must have, where only those of all are taken
    gene_table: CSV with the columns ensembl and symbol, for sources that name genes otherwise than the vocabulary
    """

    kind: Kind = "auto"
    paths: tuple[str, ...] = ()
    census_version: str = ""
    organism: str = "homo_sapiens"
    measurement: str = "RNA"
    layer: str = ""
    obs_filter: str = ""
    var_filter: str = ""
    primary_data_only: bool = False
    gene_column: str = ""
    namespace: Literal["auto", "ensembl", "symbol"] = "auto"
    join: Join = "intersection"
    min_gene_share: float = checked(MIN_GENE_SHARE, at_least=0, at_most=1)
    gene_table: str = ""


@dataclass(frozen=True)
class FilterConfig(Checked):
    """Which cells and genes of the sources are worth keeping.

    min_genes: genes with a count that a cell must have, over all genes of its source. 0 refuses cells without counts
    min_cells: cells, of all splits, that must express a gene
    gene_list: file of gene ids, one a line, to keep
    n_top_genes: keep this many most variable genes (seurat_v3, over the training cells). 0 keeps all
    """

    min_genes: int = checked(0, at_least=0)
    min_cells: int = checked(0, at_least=0)
    gene_list: str = ""
    n_top_genes: int = checked(0, at_least=0)


@dataclass(frozen=True)
class SplitConfig(Checked):
    """How cells are dealt to train, validation, test. A split that is named cells below draws none by its fraction.

    validation: fraction of the cells. What neither split takes is training
    test: fraction of the cells
    stratify: obs columns. The fractions hold within each combination of their values, as far as whole cells can
    by: obs column whose values stay together (donors, data sets). Fractions are then of its values that aren't named
    validation_values: values of `by` whose cells are the validation split
    test_values: values of `by` whose cells are the test split
    held_out: CSV whose header names obs columns and whose rows are combinations to hold out. A column `split` may
        name the split of each row (any name), else it is test
    """

    validation: float = checked(0.1, at_least=0, below=1)
    test: float = checked(0.1, at_least=0, below=1)
    stratify: tuple[str, ...] = ()
    by: str = ""
    validation_values: tuple[str, ...] = ()
    test_values: tuple[str, ...] = ()
    held_out: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.validation + self.test >= 1:
            raise InputError(f"split.validation={self.validation} and split.test={self.test} must add up to below 1")
        if (self.validation_values or self.test_values) and not self.by:
            raise InputError("split.validation_values and split.test_values are values of the column split.by: name it")
        if self.stratify and self.by:
            raise InputError(f"split.stratify={','.join(self.stratify)} and split.by={self.by} exclude each other")
        both = sorted(set(self.validation_values) & set(self.test_values))
        if both:
            raise InputError(f"split.by={self.by}: {both[0]!r} stands in both validation_values and test_values")


@dataclass(frozen=True)
class ShardsWriteConfig(Checked):
    """Write a shard set.

    out: folder or fsspec URL of the set
    conditions: obs columns to store with the cells, as labels
    missing: label of missing values of such a column. Empty refuses them
    max_labels: more labels than this in a condition are refused
    codec: how blocks are compressed
    codec_level: of zstd
    block_cells: cells of a block
    shard_cells: cells of a tar
    seed: of split and shuffle
    memory: what all processes together may take
    workers: processes. The set's bytes don't depend on them
    task: i/n, do the i-th of n shares (from 0) of what can be done now, as in an array job
    finish: with tasks, do what is left of their shares and write the manifest
    work: folder in which to make one for unfinished work. Empty: .work in the set's folder
    """

    out: str
    source: SourceConfig = field(default_factory=SourceConfig)
    conditions: tuple[str, ...] = ()
    missing: str = ""
    max_labels: int = checked(20_000, at_least=1)
    filter: FilterConfig = field(default_factory=FilterConfig)
    split: SplitConfig = field(default_factory=SplitConfig)
    codec: Codec = "zstd"
    codec_level: int = checked(1, at_least=1, at_most=22)
    block_cells: int = checked(BLOCK_CELLS, at_least=1, at_most=65_535)
    shard_cells: int = checked(1 << 16, at_least=1)
    seed: int = checked(0, at_least=0, below=SEEDS)
    memory: str = "2GiB"
    workers: int = checked(1, at_least=1)
    task: str = ""
    finish: bool = False
    work: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_bytes(self.memory, "memory")
        if self.shard_cells % self.block_cells:
            raise InputError(f"shard_cells={self.shard_cells} must be a multiple of block_cells={self.block_cells}")
        for name in self.conditions:
            if not SPLIT_NAME.fullmatch(re.sub("[- .]", "_", name)) or not name.strip("."):
                raise InputError(f"conditions: {name!r} can't be part of a file name")
            if self.conditions.count(name) > 1:
                raise InputError(f"conditions: {name!r} stands twice")
            if name in ("library_size", "n_cells"):
                raise InputError(
                    f"conditions: {name!r} has another meaning in the tables of conditions that cells are generated "
                    "from, so nobody could ask for it. Rename the column of obs"
                )
        _ = self.share

    @property
    def share(self) -> tuple[int, int]:
        """(i, n) of task=i/n. (0, 1) without one."""
        i, slash, n = self.task.partition("/")
        if not self.task:
            return 0, 1
        if not (slash and i.isdecimal() and n.isdecimal() and int(i) < int(n)):
            raise InputError(f"task={self.task!r} must be i/n with 0 <= i < n, such as 0/8")
        return int(i), int(n)

    @property
    def process_bytes(self) -> int:
        """What one process may take for cells.

        Raises: InputError where that is too little to work with.
        """
        processes = self.workers + (self.workers > 1)
        left = (parse_bytes(self.memory, "memory") - processes * BASE_BYTES) // self.workers
        if left < LEAST_BYTES:
            need = (processes * BASE_BYTES + self.workers * LEAST_BYTES) >> 20
            raise InputError(f"memory={self.memory} is too little for workers={self.workers}: at least {need}MiB")
        return left


def parse_bytes(text: str, key: str) -> int:
    """`2GiB`, `500 MB`, `1000000` as bytes. Raises: InputError for anything else."""
    units = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
    units |= {u + "ib": n for u, n in units.items() if len(u) == 1 and u != "b"}
    units |= {u + "b": 1000**k for k, u in enumerate("kmgt", 1)}
    number = text.strip().lower().rstrip("bikmgt ")
    unit = text.strip().lower()[len(number) :].strip()
    try:
        return int(float(number) * units[unit])
    except (ValueError, KeyError, OverflowError):  # of infinity
        raise InputError(f"{key}={text!r} is no amount of memory. Write 2GiB or 500MB") from None
