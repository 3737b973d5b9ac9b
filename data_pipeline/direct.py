"""Cells straight from a Census, a SOMA experiment or h5ad files, for queries too small to be worth a kept shard set.

The query is converted to a shard set in a temporary folder, by the code that writes those that last, and read from
there. So the order, the splits, the checks and the batches are those that `scldm shards write` would have led to, bit
for bit; a whole read of the query is also the only way to shuffle it before it is dealt to ranks, since a Census is
ordered by data set.

Reading order: DirectConfig, DirectCells.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from dataclasses import dataclass, field
from pathlib import Path

from data_pipeline.convert.open import open_sources
from data_pipeline.convert.plan import FilterConfig, ShardsWriteConfig
from data_pipeline.convert.source import SourceConfig
from data_pipeline.convert.splits import SplitConfig
from data_pipeline.convert.write_shards import write_shards
from data_pipeline.format.read_shards import ShardSet
from scldm.checked import SEEDS, Checked, checked
from scldm.errors import InputError


@dataclass(frozen=True)
class DirectConfig(Checked):
    """A query that is read without a shard set being kept. Every process that trains on it reads it for itself.

    source: what to read
    conditions: obs columns to store with the cells, as labels
    missing: label of missing values of such a column; empty refuses them
    filter: which cells and genes are worth keeping
    split: how the cells are dealt to splits
    seed: of split and shuffle
    limit_gb: most that the query may take in the temporary folder, in 1e9 bytes
    folder: where the temporary folder is made; empty: where the system has them
    """

    source: SourceConfig = field(default_factory=SourceConfig)
    conditions: tuple[str, ...] = ()
    missing: str = ""
    filter: FilterConfig = field(default_factory=FilterConfig)
    split: SplitConfig = field(default_factory=SplitConfig)
    seed: int = checked(0, at_least=0, below=SEEDS)
    limit_gb: float = checked(4.0, above=0)
    folder: str = ""


class DirectCells(ShardSet):
    """The cells of a query, open for reading; `close`, or the end of `with`, removes them. Until then loaders take it
    as `cells=`, and whatever takes a shard set takes its `url`. README.md trains on one.

    Raises: InputError for what is wrong with the query, or where it is too large for this.
    """

    def __init__(self, config: DirectConfig) -> None:
        sources = open_sources(config.source, (), config.missing)
        # while a set is written its counts are there twice, at about 2 bytes each
        expected_gb = sum(4 * s.spec.mean_nonzeros * len(s.rows) for s in sources) / 1e9
        if expected_gb > config.limit_gb:
            raise InputError(
                f"the query's {sum(len(s.rows) for s in sources):,} cells would take about {expected_gb:.3g} GB, more "
                f"than limit_gb={config.limit_gb}; convert it once with scldm shards write and train from the shards"
            )
        self.temporary = Path(tempfile.mkdtemp(prefix="scldm-direct-", dir=config.folder or None))
        self._removal = weakref.finalize(self, shutil.rmtree, self.temporary, ignore_errors=True)
        try:
            write_shards(
                ShardsWriteConfig(
                    out=str(self.temporary / "set"),
                    source=config.source,
                    conditions=config.conditions,
                    missing=config.missing,
                    filter=config.filter,
                    split=config.split,
                    seed=config.seed,
                    codec="none",
                )
            )
            super().__init__(str(self.temporary / "set"))
        except BaseException:
            self._removal()
            raise

    def close(self) -> None:
        super().close()
        self._removal()

    def __enter__(self) -> DirectCells:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
