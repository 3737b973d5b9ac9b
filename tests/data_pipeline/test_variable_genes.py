"""Moments of genes, where integers end."""

from __future__ import annotations

import numpy as np
import pytest

from data_pipeline.convert.narrow import Rows
from data_pipeline.convert.variable_genes import CELLS, SQUARES, add_moments, clip_values
from scldm.errors import InputError


def test_squares_that_64_bits_can_not_sum_are_refused():
    """They would wrap around, and choose other genes without a word; cells are still counted, as min_cells needs."""
    n_cells, n_genes = 40, 30
    x = np.random.default_rng(0).poisson(3, (n_cells, n_genes)) + 1
    for large, refused in ((1_000_000, False), (1_000_000_000, True), (2**62, True)):
        x[:, 7] = large
        indptr, columns = np.arange(n_cells + 1) * n_genes, np.tile(np.arange(n_genes), n_cells)
        rows = Rows(np.arange(n_cells), indptr, columns, x.ravel())
        sums = np.zeros((4, n_genes), np.int64)
        add_moments(rows, np.arange(n_genes, dtype=np.int32), np.full(n_genes, np.inf), 0, np.ones(n_cells, bool), sums)
        assert (sums[CELLS] == n_cells).all()
        if refused:
            with pytest.raises(InputError, match=r"filter.n_top_genes: counts of 1 genes are too large"):
                clip_values(sums, n_cells)
        else:
            assert sums[SQUARES, 7] == n_cells * large**2
