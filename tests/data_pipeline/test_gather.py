"""Cells out of slots: the same counts by every kernel, for any vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from data_pipeline.format.block import HEADER, Sections, encode_block, read_header, sections
from data_pipeline.format.read_shards import ShardSet
from data_pipeline.format.schema import vocab_tag
from data_pipeline.stream.gather import CellSlots
from data_pipeline.stream.gene_set_config import GeneSetConfig
from data_pipeline.stream.gene_sets import GeneSets
from scldm.batch import CompactCounts
from scldm.errors import InputError
from scldm.vocab import GeneVocab
from tests.data_pipeline.small_sets import known_cells, narrow, write_set

pytestmark = pytest.mark.heavy

N_CELLS = 40


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    shards = ShardSet(str(write_set(tmp_path_factory.mktemp("g") / "set", known_cells(), "none")))
    shards.close()
    return shards.manifest


def counts_of(n_genes: int) -> np.ndarray:
    """From none to all genes expressed, steps and counts on both sides of every escape, the first and the last gene."""
    rng = np.random.default_rng(n_genes)
    counts = np.zeros((N_CELLS, n_genes), np.int64)
    for cell, share in enumerate(np.geomspace(1e-5, 0.3, N_CELLS)):
        genes = rng.random(n_genes) < share
        counts[cell, genes] = rng.choice([1, 2, 14, 15, 16, 17, 254, 255, 256, 257, 70_000], genes.sum())
    counts[1] = 0
    counts[2] = np.arange(n_genes) % 300 + 1
    counts[3, [0, n_genes - 1]] = 16, 256
    for k, gap in enumerate((254, 255, 256, 509, 510, 511)):
        counts[4 + k, [0, gap]] = 1, 300
    return counts


def filled(manifest, counts: np.ndarray, harm: Callable[[Sections], object] = lambda _: None) -> CellSlots:
    n_genes = counts.shape[1]
    genes = GeneVocab(tuple(f"g{k}" for k in range(n_genes)), "symbol")
    cell, column = np.nonzero(counts)
    made = narrow(np.concatenate([[0], np.cumsum((counts > 0).sum(1))]), column, counts[cell, column], n_genes)
    ids = [np.zeros(N_CELLS, np.uint8) for _ in manifest.conditions.names]
    data = encode_block(
        made, split=0, n_genes=n_genes, vocab_tag=vocab_tag(genes), sources=np.zeros(N_CELLS, np.uint16),
        rows=np.arange(N_CELLS), conditions=ids, codec="none",
    )  # fmt: skip
    block = np.frombuffer(bytearray(data), np.uint8)
    harm(sections(block[HEADER.itemsize :], read_header(data)))
    slots = CellSlots(replace(manifest, genes=genes), 2)
    slots.fill(1, block, "block 0")
    return slots


def expressed_of(n_genes: int) -> GeneSets:
    return GeneSets(
        GeneSetConfig("expressed"), "given", seed=0, purpose=4, n_genes=n_genes, n_expressed_largest=n_genes,
        weights=None, micro_batch=N_CELLS, loud=False,
    )  # fmt: skip


@pytest.mark.parametrize("n_genes", [700, 65_535, 65_536, 70_000])
def test_every_kernel_gives_the_counts_that_were_stored(manifest, n_genes):
    counts = counts_of(n_genes)
    slots = filled(manifest, counts)
    rows = np.random.default_rng(0).permutation(N_CELLS)
    here, wanted = np.ones_like(rows), counts[rows]

    shared = np.random.default_rng(1).permutation(n_genes)[:300] + 1
    found, totals = slots.take(here, rows, shared)
    np.testing.assert_array_equal(found, wanted[:, shared - 1])
    np.testing.assert_array_equal(totals, wanted[:, shared - 1].sum(1))

    own = np.stack([np.random.default_rng(k).permutation(n_genes + 1)[:300] for k in rows])  # padding among them
    found, totals = slots.take(here, rows, own)
    np.testing.assert_array_equal(found, np.where(own, np.take_along_axis(wanted, np.maximum(own, 1) - 1, 1), 0))
    np.testing.assert_array_equal(totals, found.sum(1))

    expressed = expressed_of(n_genes)
    ids, found, totals = slots.take_of_the_cell(here, rows, expressed, np.zeros(N_CELLS, np.uint64))
    dense = np.zeros((N_CELLS, n_genes + 1), np.int64)
    np.put_along_axis(dense, ids, found, 1)
    np.testing.assert_array_equal(dense[:, 1:], wanted)
    np.testing.assert_array_equal(ids > 0, np.arange(ids.shape[1]) < (wanted > 0).sum(1)[:, None])
    np.testing.assert_array_equal(totals, wanted.sum(1))

    csr = slots.take_csr(here, rows)
    assert csr[1].dtype == (np.uint16 if n_genes < 65_536 else np.int32)  # where padding fits beside the genes
    compact = CompactCounts.from_numpy(*csr, n_genes + 1)
    np.testing.assert_array_equal(compact.dense()[:, 1:].numpy(), wanted)
    assert not compact.dense()[:, 0].any()


def test_a_count_before_the_first_gene_is_refused(manifest):
    """On what fills up an odd number of entries, taken from the gene after it: the tables do not show it."""
    counts = np.zeros((N_CELLS, 40), np.int64)
    counts[0, 5] = 3

    def harm(found: Sections) -> None:
        assert (found.steps.tolist(), found.packed[0]) == ([0, 6], 0x30)
        found.packed[0] = 0x03

    slots, one = filled(manifest, counts, harm), np.array([0])
    for take in (
        lambda: slots.take(one + 1, one, np.arange(1, 41)),
        lambda: slots.take(one + 1, one, np.arange(41)[None]),
        lambda: slots.take_of_the_cell(one + 1, one, expressed_of(40), np.zeros(1, np.uint64)),
        lambda: slots.take_csr(one + 1, one),
    ):
        with pytest.raises(InputError, match="block 0: damaged"):
            take()
