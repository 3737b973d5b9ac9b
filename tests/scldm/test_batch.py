"""The compact form gathers what the dense form holds."""

import numpy as np
import pytest
import torch

from scldm.batch import CellBatch, CompactCellBatch, CompactCounts, GeneCounts, narrow_ids, pinned


def compact(counts, given, asked, n_genes, dtype: type = np.uint16):
    cell, gene = np.nonzero(counts)
    values = counts[cell, gene]
    large = np.flatnonzero(values > 255)
    csr = CompactCounts.from_numpy(
        np.concatenate([[0], np.cumsum((counts > 0).sum(1))]).astype(np.int32),
        (gene + 1).astype(dtype),
        np.where(values > 255, 0, values).astype(np.uint8),
        large.astype(np.int32),
        values[large].astype(np.int64),
        n_genes + 1,
    )
    n = len(counts)
    return CompactCellBatch(
        csr, given, asked, library_size_all_B=torch.tensor(counts.sum(1)).float(), weight_B=torch.ones(n),
        conditions={"type": torch.arange(n)}, cell_ids_B2=torch.zeros(n, 2, dtype=torch.int64),
        positions_B=torch.arange(n), n_cells=n,
    )  # fmt: skip


def test_gene_ids_over_32767_and_counts_over_255_survive_the_narrow_dtypes():
    """The Census has about 60,000 features: they fit 16 bits only if the sign bit is read as a bit."""
    n_genes = 60_000
    rng = np.random.default_rng(0)
    counts = np.zeros((5, n_genes), np.int64)
    at = rng.integers(0, n_genes, (5, 400))
    counts[np.arange(5)[:, None], at] = rng.integers(1, 400, (5, 400))
    counts[2, 59_999], counts[3, 40_000] = 3_000_000_000, 70_000
    counts[4] = 0  # a cell without counts
    shared = torch.cat([torch.tensor([0]), torch.randperm(n_genes)[:5000] + 1, torch.tensor([60_000, 40_001])])
    each = torch.stack([torch.randperm(n_genes)[:3000] + 1 for _ in range(5)]).int()
    for dtype in (np.uint16, np.int32):
        batch = compact(counts, narrow_ids(shared.numpy().astype(dtype)), each, n_genes, dtype).to("cpu")
        padded = np.concatenate([np.zeros((5, 1), np.int64), counts], axis=1)
        np.testing.assert_array_equal(batch.given.counts_BS.numpy(), padded[:, shared.numpy()])
        expected = np.take_along_axis(padded, each.numpy().astype(np.int64), 1)
        np.testing.assert_array_equal(batch.asked.counts_BS.numpy(), expected)
        np.testing.assert_array_equal(batch.library_size_B.numpy(), expected.sum(1).astype(np.float32))
        assert not batch.given.mask[0]
        assert batch.asked.gene_ids.dtype == torch.int64


def test_the_same_set_is_gathered_once():
    ids = torch.tensor([3, 1, 2])
    batch = compact(np.array([[1, 0, 7]]), ids, ids, 3).to("cpu")
    assert batch.given is batch.asked
    assert batch.given.counts_BS.tolist() == [[7, 1, 0]]
    assert len(batch) == 1


def test_what_is_one_tensor_is_moved_once_and_stays_one(monkeypatch):
    ids = torch.tensor([3, 1, 2])
    small = compact(np.array([[1, 0, 7]]), ids, ids, 3)
    given = GeneCounts(ids, torch.tensor([[7, 1, 0]]))
    rest = {name: getattr(small, name) for name in ("weight_B", "conditions", "cell_ids_B2", "positions_B", "n_cells")}
    totals = torch.ones(1)
    dense = CellBatch(given, given, totals, library_size_all_B=totals, **rest)
    moved, to = [], torch.Tensor.to

    def counted(tensor, *args, **kwargs):
        if args[0] in ("meta", "cpu"):
            moved.append(tensor)
        return to(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", counted)
    there = dense.to("meta")
    assert there.given is there.asked
    assert there.library_size_B is there.library_size_all_B
    assert there.given.counts_BS.is_meta
    assert len(moved) == 7  # ids, counts, totals; weight, labels, identities, positions
    moved.clear()
    there = small.to("cpu")
    assert there.given is there.asked
    assert len(moved) == 5 + 1 + 5  # of the CSR; the ids; totals and the rest


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: pinned memory and a copy from it")
def test_a_gpu_gets_it_from_pinned_memory_and_gathers_the_same():
    rng = np.random.default_rng(0)
    counts = rng.poisson(0.2, (64, 5_000)) * rng.integers(1, 400, (64, 5_000))
    ids = torch.randperm(5_000)[:700] + 1
    batch = pinned(compact(counts, ids, torch.arange(1, 5_001), 5_000))
    assert batch.csr.gene_ids_X.is_pinned()
    here, there = batch.to("cpu"), batch.to("cuda")
    for a, b in ((here.given, there.given), (here.asked, there.asked)):
        assert b.counts_BS.is_cuda
        assert a.counts_BS.equal(b.counts_BS.cpu())
    assert here.library_size_B.equal(there.library_size_B.cpu())


def test_a_shared_set_says_whether_it_is_padded():
    """Attention leaves its mask out where it says no, so a padded set must never do."""
    counts = np.random.default_rng(0).integers(0, 3, (4, 20))
    full, padded = torch.arange(1, 13, dtype=torch.int16), torch.tensor([3, 0, 5], dtype=torch.int16)
    assert not compact(counts, full, full, 20).to("cpu").given.padded
    assert not compact(counts, full, full, 20).to("cpu").to("cpu").asked.padded
    own = full.expand(4, -1)
    assert not compact(counts, own, own, 20).to("cpu").given.padded
    for ids in (padded, padded.expand(4, -1)):
        assert compact(counts, ids, ids, 20).to("cpu").given.padded
    assert GeneCounts(full.long(), torch.zeros(4, 12)).padded, "unless it is known"
