"""Cells straight from a Census, a SOMA experiment or h5ad files, for queries too small to be worth a kept shard set.

The query is written as a shard set to a temporary folder, by the code that writes sets to keep, and read from there. So
order, splits, checks and batches are bit for bit those of `scldm shards write`. A Census is ordered by data set, so it
must be read whole before it can be shuffled.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from pathlib import Path
from typing import Any

from data_pipeline.convert.config import ShardsWriteConfig
from data_pipeline.convert.open import open_sources
from data_pipeline.convert.write_shards import write_shards
from data_pipeline.format.read_shards import ShardSet
from scldm.errors import InputError


class DirectCells(ShardSet):
    """The cells of a query, open for reading. `close`, or the end of `with`, removes them. Until then loaders take it
    as `cells=`, and whatever takes a shard set takes its `url`. README.md trains on one.

    limit_gb: most that the query may take in the temporary folder, in 1e9 bytes
    folder: where the temporary folder is made. Empty: where the system has them
    query: settings of ShardsWriteConfig, such as `source` and `conditions`

    Raises: InputError for what is wrong with the query, or where it is too large for this.
    """

    def __init__(self, *, limit_gb: float = 4.0, folder: str = "", **query: Any) -> None:
        self.temporary = Path(tempfile.mkdtemp(prefix="scldm-direct-", dir=folder or None))
        self._removal = weakref.finalize(self, shutil.rmtree, self.temporary, ignore_errors=True)
        try:
            config = ShardsWriteConfig(out=str(self.temporary / "set"), codec="none", **query)
            _refuse_what_is_large(config, limit_gb)
            write_shards(config)
            super().__init__(config.out)
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


def _refuse_what_is_large(config: ShardsWriteConfig, limit_gb: float) -> None:
    sources = open_sources(config.source, (), config.missing)
    # while a set is written its counts are there twice, at about 2 bytes each
    expected_gb = sum(4 * s.spec.mean_nonzeros * len(s.rows) for s in sources) / 1e9
    if expected_gb > limit_gb:
        raise InputError(
            f"the query's {sum(len(s.rows) for s in sources):,} cells would take about {expected_gb:.3g} GB, more "
            f"than limit_gb={limit_gb}. Convert it once with scldm shards write, and train from the shards."
        )
