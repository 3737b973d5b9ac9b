"""Each protocol fits on the cells and genes that it says."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
from sklearn.decomposition import PCA

from scldm.errors import InputError
from scldm.evaluate.metrics import METRICS
from scldm.evaluate.protocols import PROTOCOLS, PUBLISHED, PUBLISHED_NOTE, variable_genes
from scldm.evaluate.space import Profile


@pytest.fixture(scope="module")
def counts() -> tuple[sp.csr_matrix, sp.csr_matrix]:
    """validation and test counts of 60 genes."""
    rng = np.random.default_rng(0)
    return tuple(sp.csr_matrix(rng.poisson(rng.gamma(2, 1, size=(n, 60)))) for n in (70, 50))  # type: ignore[return-value]


def per_10k(x: sp.csr_matrix) -> np.ndarray:
    dense = x.toarray()
    return np.log1p(dense / dense.sum(1, keepdims=True) * 10_000)


def test_scldm_fits_on_validation_cells_and_cfgen_on_the_judged_ones(counts):
    validation, test = counts
    for name, fitted, n in (("scldm", validation, 10), ("cfgen", test, 30)):
        space = PROTOCOLS[name].fit(validation, test, 0)
        full = PCA(n, svd_solver="full").fit(per_10k(fitted))
        np.testing.assert_allclose(
            Profile.of(test, np.array(["a"] * 50), space).components, full.transform(per_10k(test)), atol=1e-6
        )
        said = space.describe()
        assert (said["protocol"], said["n_components"], said["n_genes"]) == (name, n, 60)  # 60 < 2,000: all are taken
        assert said["explained_variance"] == pytest.approx(full.explained_variance_ratio_.sum())


def test_cfgen_judges_the_variable_genes_at_counts_per_10k_of_all():
    rng = np.random.default_rng(1)
    mean = rng.gamma(2, 1, size=2_050)
    x = rng.poisson(mean, size=(200, 2_050))
    flat = rng.choice(2_050, 50, replace=False)
    x[:, flat] = np.maximum(np.round(mean[flat]), 1)  # the same in every cell
    counts = sp.csr_matrix(x)
    space = PROTOCOLS["cfgen"].fit(counts[:0], counts, 0)
    assert space.genes is not None
    assert set(space.genes) == set(range(2_050)) - set(flat)
    judged = Profile.of(counts, np.array(["a"] * 200), space)
    np.testing.assert_allclose(judged.log.toarray(), per_10k(counts)[:, space.genes])
    assert (judged.counts != counts[:, space.genes]).nnz == 0
    assert (judged.total == x.sum(1)).all()
    assert space.describe()["n_genes"] == 2_000


def test_too_few_judged_cells_are_refused_by_name(counts):
    with pytest.raises(InputError, match="at least 31 test cells and genes. There are 20 cells x 60 genes"):
        PROTOCOLS["cfgen"].fit(counts[0], counts[1][:20], 0)
    with pytest.raises(InputError, match="can't choose 10 variable genes of 60 on 2 cells"):
        variable_genes(sp.csr_matrix(np.arange(120).reshape(2, 60) % 2), 10)


def test_variable_genes_are_found_in_few_cells_of_few_counts():
    rng = np.random.default_rng(2)
    mean = rng.gamma(0.3, 0.3, 3_000)
    x = rng.poisson(mean, size=(100, 3_000))
    x[:, :20] = rng.negative_binomial(0.1, 0.1 / (0.1 + 2), size=(100, 20))  # variance 42 at a mean of 2
    found = variable_genes(sp.csr_matrix(x), 300)  # the usual span fails here: loess is nearly singular
    assert len(found) == 300
    assert len(set(range(20)) & set(found)) >= 12  # by chance 2; seurat_v3 clips what single cells add


def test_means_over_labels_weigh_as_the_protocol_says():
    by_label, n_cells = {"a": {"w2": 1.0}, "b": {"w2": 4.0}}, {"a": 200, "b": 100}
    assert PROTOCOLS["scldm"].mean(by_label, n_cells) == {"w2": pytest.approx(2)}
    assert PROTOCOLS["cfgen"].mean(by_label, n_cells) == {"w2": pytest.approx(2.5)}
    assert PROTOCOLS["cfgen"].mean_error(by_label, n_cells) == {"w2": pytest.approx(np.hypot(1, 4) / 2)}


def test_the_table_of_protocols_and_the_papers_numbers_are_whole():
    for name, protocol in PROTOCOLS.items():
        assert protocol.name == name
        assert set(protocol.main) <= set(METRICS)
    assert PROTOCOLS["scldm"].main == ("mmd2", "w2", "fd", "nn_accuracy")
    assert "not fully known" in PUBLISHED_NOTE
    assert len({row[:3] for row in PUBLISHED}) == len(PUBLISHED) == 15
    ours = [row for row in PUBLISHED if row[2] == "scLDM" and row[1] != "unconditional"]
    found = {data: fd for data, *_, fd in ours}
    assert found == {"dentate gyrus": 34.4, "Tabula Muris": 11.0, "HLCA": 21.0, "Parse 1M": 18.1}
