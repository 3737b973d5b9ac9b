"""Gene-gene correlation taken apart: what is shared by sets of one kind, beside chance."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from benchmarks import gene_correlation
from benchmarks.gene_correlation import BenchGeneCorrelationConfig, Groups, main, read_cells
from scldm.errors import InputError

N, N_GENES, N_MODULES = 250, 60, 6


def rates(n: int, seed: int) -> np.ndarray:
    """Modules of ten genes that vary together."""
    rng = np.random.default_rng(seed)
    return 4 * np.exp(0.6 * np.repeat(rng.standard_normal((n, N_MODULES)), N_GENES // N_MODULES, axis=1))


@pytest.fixture
def cells(tmp_path) -> BenchGeneCorrelationConfig:
    counts = np.random.default_rng(1).poisson(rates(N, 0)).astype(np.float32)
    split = np.repeat(["train", "test"], [200, 50])
    obs = pd.DataFrame({"cell_type": "a", "quality_split": split}, index=pd.Index(map(str, range(N))))
    ad.AnnData(sp.csr_matrix(counts), obs=obs).write_h5ad(tmp_path / "cells.h5ad")
    return BenchGeneCorrelationConfig(("none",), str(tmp_path / "cells.h5ad"), ("cell_type",), draws=8)


def test_a_right_model_has_the_amount_and_agreement_of_real_cells(cells, monkeypatch) -> None:
    """And one whose genes vary as much, each for itself, has none."""

    def scores(mu: np.ndarray, theta: float) -> dict[str, float]:
        monkeypatch.setattr(gene_correlation, "decoded_cells", lambda model, of: (mu, np.full(N_GENES, theta)))
        monkeypatch.setattr("benchmarks.gene_correlation.scldm.load", lambda path: type("Model", (), {"dit": None}))
        return {row.name: row.value for row in main(cells).rows if row.value is not None}

    right = scores(rates(N, 5), 1e6)
    assert right["training cells: agreement"] == pytest.approx(1, abs=0.25)
    with_others = "the same with library sizes of other cells of the combination"  # which these rates know nothing of
    for name in ("Poisson draws of these", "draws of these with the dispersion", with_others):
        assert right[f"{name}: amount"] == pytest.approx(1, abs=0.3)
        assert right[f"{name}: agreement"] == pytest.approx(1, abs=0.25)
        assert right[f"{name}: r"] == pytest.approx(right["training cells: r"], abs=0.1)
    noisy = scores(rates(N, 5), 0.5)
    assert noisy["draws of these with the dispersion: amount"] < 0.3 < noisy["Poisson draws of these: amount"]
    alone = np.random.default_rng(3).permuted(rates(N, 5), axis=0)
    assert scores(alone, 1e6)["Poisson draws of these: amount"] < 0.1


def test_sets_are_disjoint_and_as_large_as_the_test_cells(cells) -> None:
    made, split = read_cells(cells)
    groups = Groups.of(made, split, cells)
    numbered = sp.csr_matrix(np.arange(1.0, N + 1)[:, None] * np.ones((1, 2)) + [[0, 1]], dtype=np.float32)
    first, second = (of["cell_type=a"].toarray()[:, 0] for of in groups.halves(numbered, 0))
    assert len(first) == len(second) == 50
    assert not set(first.round(6)) & set(second.round(6))


def test_what_can_not_be_compared_is_refused(cells) -> None:
    made, split = read_cells(cells)
    with pytest.raises(InputError, match="no combination has 51 test cells"):
        Groups.of(made, split, BenchGeneCorrelationConfig(("m",), cells.h5ad, ("cell_type",), min_cells=51))
    with pytest.raises(InputError, match="no obs column 'donor'"):
        read_cells(BenchGeneCorrelationConfig(("m",), cells.h5ad, ("donor",)))
