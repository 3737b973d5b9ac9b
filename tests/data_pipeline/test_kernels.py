"""Every numba kernel at the edges of what it may be given, and once with all its indices checked."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
from numba import njit

from data_pipeline.convert.narrow import GeneSums, Rows, coo_to_rows, narrow_rows
from data_pipeline.format.block import decode_block, encode_block
from data_pipeline.format.read_shards import ShardSet
from data_pipeline.format.schema import Manifest, vocab_tag
from data_pipeline.stream.gather import CellSlots
from data_pipeline.stream.gene_set_config import GeneSetConfig
from data_pipeline.stream.gene_sets import GeneSets
from scldm.batch import CompactCounts
from scldm.vocab import GeneVocab
from tests.data_pipeline.small_sets import known_cells, write_set

HERE = Path(__file__).parent
# between them these run all kernels, which the test below makes sure of
RUN_ALL = ("kernels", "block", "gather", "order", "variable_genes", "sources", "loader", "write_shards")

EDGES = {
    "one cell without a gene": [[0]],
    "one cell of one gene": [[1]],
    "one cell of the last of many genes": [[0] * 599 + [70_000]],
    "no cell has a gene": [[0] * 300] * 3,
    "the last cell alone": [[0] * 300] * 3 + [[300] * 300],
    "all but the last cell": [[1] * 511] * 3 + [[0] * 511],
    "half bytes that an odd gene fills up": [[15] * 17, [16] * 17, [0] * 16 + [255]],
    "a count of 32 bits": [[0, 2_000_000_000]],
}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    shards = ShardSet(str(write_set(tmp_path_factory.mktemp("edges") / "set", known_cells(), "none")))
    shards.close()
    return shards.manifest


@pytest.mark.heavy
@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("name", EDGES)
def test_what_goes_in_at_the_edges_comes_out(name: str, backwards: bool, manifest: Manifest) -> None:
    """A source's rows, narrow cells, a block, a slot, and every way out of it."""
    counts = np.array(EDGES[name])
    n, n_genes = counts.shape
    cell, column = (part[::-1] if backwards else part for part in np.nonzero(counts))
    every = np.arange(n, dtype=np.int32)
    found = coo_to_rows(np.arange(n), every, 0, [(cell[:0], column[:0], counts[cell, column][:0]),
                                                 (cell, column, counts[cell, column])])  # fmt: skip
    sums = GeneSums(n_genes)
    narrow = narrow_rows(found, np.arange(n_genes, dtype=np.int32), n_genes, sums, np.ones(n, bool))
    np.testing.assert_array_equal(sums.total, counts.sum(0))
    np.testing.assert_array_equal(narrow.totals, counts.sum(1))
    genes = GeneVocab(tuple(f"g{k}" for k in range(n_genes)), "symbol")
    data = encode_block(
        narrow.cells, split=0, n_genes=n_genes, vocab_tag=vocab_tag(genes), sources=np.zeros(n, np.uint16),
        rows=np.arange(n), conditions=[np.zeros(n, np.uint8) for _ in manifest.conditions.names], codec="none",
    )  # fmt: skip
    block = decode_block(data)
    np.testing.assert_array_equal(
        sp.csr_matrix((block.counts, block.columns, block.indptr), counts.shape).toarray(), counts
    )

    slots = CellSlots(replace(manifest, genes=genes, block_cells=n), 2)
    slots.fill(1, np.frombuffer(bytearray(data), np.uint8), "block 0")
    rows = np.arange(n)[::-1].copy()
    here, wanted = np.ones_like(rows), counts[rows]
    all_genes = np.arange(1, n_genes + 1)
    np.testing.assert_array_equal(slots.take(here, rows, all_genes)[0], wanted)
    np.testing.assert_array_equal(slots.take(here, rows, np.tile(all_genes, (n, 1)))[0], wanted)
    np.testing.assert_array_equal(slots.take(here, rows, np.zeros((n, 1), np.int64))[0], 0 * wanted[:, :1])
    csr = slots.take_csr(here, rows)
    compact = CompactCounts.from_numpy(*csr, n_genes + 1)
    np.testing.assert_array_equal(compact.dense()[:, 1:].numpy(), wanted)
    most = max(int((counts > 0).sum(1).max()), 1)
    for policy, width in (("expressed", most), ("expressed_plus_zeros", n_genes)):
        sets = GeneSets(
            GeneSetConfig(policy, 0 if policy == "expressed" else width), "given", seed=0, purpose=4, n_genes=n_genes,
            n_expressed_largest=most, weights=None, micro_batch=n, loud=False,
        )  # fmt: skip
        ids, values, totals = slots.take_of_the_cell(here, rows, sets, np.zeros(n, np.uint64))
        dense = np.zeros((n, n_genes + 1), np.int64)
        np.put_along_axis(dense, ids, values, 1)
        np.testing.assert_array_equal(dense[:, 1:], wanted)
        np.testing.assert_array_equal(totals, wanted.sum(1))


def test_genes_that_the_vocabulary_lacks_and_rows_that_nobody_wants() -> None:
    rows = Rows(np.arange(2), np.array([0, 3, 3]), np.array([2, 0, 1]), np.array([5, 0, 7]))
    narrow = narrow_rows(rows, np.array([-1, -1, 0], np.int32), 1, GeneSums(1), np.ones(2, bool))
    assert narrow.totals.tolist() == [5, 0]
    assert narrow.n_genes_all.tolist() == [2, 0]
    none = narrow_rows(rows, np.full(3, -1, np.int32), 1, GeneSums(1), np.ones(2, bool))
    assert none.totals.tolist() == [0, 0]
    unwanted = coo_to_rows(
        np.array([9]), np.array([-1, 0], np.int32), 8, [(np.array([8, 9]), np.array([1, 2]), np.ones(2))]
    )
    assert (unwanted.indptr.tolist(), unwanted.columns.tolist()) == ([0, 1], [2])
    assert coo_to_rows(np.arange(2), np.arange(2, dtype=np.int32), 0, []).indptr.tolist() == [0, 0, 0]


@njit
def beyond(values):
    return values[len(values)]


@pytest.mark.skipif(os.environ.get("NUMBA_BOUNDSCHECK") != "1", reason="the test below runs it")
def test_an_index_that_is_out_of_bounds_is_an_error() -> None:
    with pytest.raises(IndexError):
        beyond(np.zeros(3))


@pytest.mark.exhaustive
def test_no_kernel_leaves_its_arrays(tmp_path: Path) -> None:
    """The tests of kernels again, compiled with checks of every index; each kernel of the package takes part."""
    environment = {
        **os.environ,
        "NUMBA_BOUNDSCHECK": "1",
        "NUMBA_CACHE_DIR": str(tmp_path / "cache"),
        "SCLDM_TEST_UNRUN": str(tmp_path / "unrun"),
    }
    words = ["-m", "pytest", "-q", "-p", "tests.data_pipeline.every_kernel", "-p", "no:cacheprovider"]
    files = [str(HERE / f"test_{name}.py") for name in RUN_ALL]
    done = subprocess.run(
        [sys.executable, *words, *files], env=environment, cwd=HERE.parents[1], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-5000:]
    assert "skipped" not in done.stdout  # the test above has run: indices were checked
    assert (tmp_path / "unrun").read_text() == ""
