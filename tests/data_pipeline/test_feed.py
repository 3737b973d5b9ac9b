"""Blocks are read ahead into no more memory than the steps need, and none more often than without."""

import pytest

from data_pipeline.gene_sets import GeneSetConfig
from data_pipeline.read_shards import ShardSet
from tests.data_pipeline.small_sets import known_cells, write_set
from tests.data_pipeline.streams import open_loader


@pytest.fixture(scope="module")
def thin(tmp_path_factory):
    """400 blocks of 32 cells of few genes, of which a selection uses a few cells each."""
    cells = known_cells(n_train=12_800, n_validation=8, n_genes=40)
    return str(write_set(tmp_path_factory.mktemp("thin") / "set", cells, "none", block_cells=32))


@pytest.mark.parametrize(
    "changes", [{}, {"select": {"donor": [f"d{k}" for k in range(10)]}}, {"balance": ["type", "donor"]}]
)
def test_reading_ahead_reads_no_block_more_often(thin, monkeypatch, changes):
    """Blocks read ahead must not push out those that are needed before them; some are read before an epoch's end."""
    fetches: list[int] = []
    fetch = ShardSet.fetch

    def counted(self, block, into=None):
        fetches.append(block)
        return fetch(self, block, into)

    monkeypatch.setattr(ShardSet, "fetch", counted)
    n_fetches = {}
    for read_ahead in (0, 8):
        fetches.clear()
        few = GeneSetConfig("random", 8, gene_set_group=32)
        with open_loader(
            thin, global_batch=32, micro=32, given=few, read_ahead=read_ahead, prefetch=0, **changes
        ) as loader:
            for _ in range(min(loader.steps_per_epoch, 60)):
                next(loader)
            slots = loader.feed.n_slots
        n_fetches[read_ahead] = len(fetches)
    assert n_fetches[8] <= n_fetches[0] + slots, n_fetches
