"""How cells are made comparable, and which scores decide: ours, and the published one that can be known best.

A score means something only beside its protocol: the same cells have a W2 of 8 or 12 according to genes, components
and cells that it took. Every table names its protocol.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import scipy.sparse as sp

from scldm.errors import InputError
from scldm.evaluate.intervals import error_of_mean
from scldm.evaluate.metrics import METRICS
from scldm.evaluate.space import N_COMPONENTS, Space, fit_pca, log_normalise, shape_of

SPANS = (0.3, 0.5, 0.7, 1.0)
MIN_MEANS = 10

# --- protocols -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Protocol:
    """A way to compare cells.

    name, title: as in commands and as in tables
    meaning: what it does, for a reader of the table
    main: the scores that decide, in the order of the table. All others are computed as well
    n_components: principal components
    n_variable_genes: that many genes are judged. 0 for all
    fitted_on: the real cells on which genes and components are chosen
    weights: the mean over labels weighs each label by its real cells, or all labels alike
    """

    name: str
    title: str
    meaning: str
    main: tuple[str, ...]
    n_components: int
    n_variable_genes: int
    fitted_on: Literal["validation", "test"]
    weights: Literal["cells", "labels"]

    def fit(self, validation_counts: sp.csr_matrix, test_counts: sp.csr_matrix, seed: int) -> Space:
        """The space in which cells are compared, fitted on the real cells that the protocol says. Counts are raw, CSR
        (cells, genes). `Space.describe()` says what it is.

        Raises: InputError for too few cells or genes.
        """
        counts = {"validation": validation_counts, "test": test_counts}[self.fitted_on]
        n_cells, n_genes = shape_of(counts)
        if n_cells > self.n_components and 0 < self.n_variable_genes < n_genes:
            genes = variable_genes(counts, self.n_variable_genes)
        else:
            genes = None
        log = log_normalise(counts)
        pca = fit_pca(log if genes is None else log[:, genes], self.n_components, seed, self.fitted_on)
        return Space(pca, genes, self.name, f"{self.fitted_on} cells")

    def mean(self, by_label: Mapping[str, Mapping[str, float]], n_cells: Mapping[str, int]) -> dict[str, float]:
        """Mean over labels of every score, as the protocol weighs them. `n_cells`: real cells of each label."""
        w = self._weights(list(by_label), n_cells)
        names = next(iter(by_label.values()))
        return {m: float(np.average([by_label[t][m] for t in by_label], weights=w)) for m in names}

    def mean_error(self, by_label: Mapping[str, Mapping[str, float]], n_cells: Mapping[str, int]) -> dict[str, float]:
        """Standard error of `mean`, from those of each label."""
        return error_of_mean(list(by_label.values()), self._weights(list(by_label), n_cells))

    def _weights(self, labels: Sequence[str], n_cells: Mapping[str, int]) -> list[float]:
        return [float(n_cells[t]) if self.weights == "cells" else 1.0 for t in labels]


PROTOCOLS: Mapping[str, Protocol] = {
    "scldm": Protocol(
        name="scldm",
        title="scldm",
        meaning=(
            "All genes, counts per 10,000, log1p, 10 principal components fitted on validation cells, which are "
            "neither trained on nor judged. Equal numbers on both sides. The mean over labels weighs each by its "
            "cells."
        ),
        main=tuple(name for name, metric in METRICS.items() if metric.main),
        n_components=N_COMPONENTS,
        n_variable_genes=0,
        fitted_on="validation",
        weights="cells",
    ),
    "cfgen": Protocol(
        name="cfgen",
        title="CFGen",
        meaning=(
            "What CFGen's repository computes (2026): 2,000 variable genes (seurat_v3) of the real cells that are "
            "judged, counts per 10,000 of all genes, and log1p. 30 principal components are fitted on these cells. "
            "Exact W2 and W1, biased MMD² summed over widths of 0.01 to 100. Per label, then the plain mean over "
            "labels. FD, 1-NN accuracy, precision and recall are added. Two things differ. Generated cells are centred "
            "as real ones are, while the repository multiplies them with the loadings without centring. Both sides are "
            "cut to the same number of cells in every score, not in MMD² alone."
        ),
        main=("w2", "w1", "mmd2_multiscale", "fd", "nn_accuracy", "precision", "recall"),
        n_components=30,
        n_variable_genes=2_000,
        fitted_on="test",
        weights="labels",
    ),
}


# --- variable genes ------------------------------------------------------------------------------------------------


def variable_genes(counts: sp.csr_matrix, n: int) -> np.ndarray:
    """Ascending columns of the n genes of the highest variance of counts, standardised by a loess fit of log variance
    against log mean (`seurat_v3`, as scanpy computes it). The fit takes the narrowest span that works, of 0.3
    (scanpy's and Seurat's), 0.5, 0.7 and 1. Few cells of few counts have too few different means for a narrow one.
    Source: Stuart et al. 2019.
    Raises: InputError where no span works, or where scikit-misc is missing.
    """
    import anndata  # both take seconds
    import scanpy

    n_cells, n_genes = shape_of(counts)
    cells = anndata.AnnData(sp.csr_matrix(counts, dtype=np.float32))
    why = "too few genes vary"
    # the fit itself can crash the process on a handful of points
    spans = SPANS if len(np.unique(np.asarray(counts.mean(0)))) > MIN_MEANS else ()
    for span in spans:
        try:
            found = scanpy.pp.highly_variable_genes(
                cells, flavor="seurat_v3", n_top_genes=n, span=span, check_values=False, inplace=False
            )
        except ImportError as error:
            raise InputError(f"protocol=cfgen needs scikit-misc ({error}): pip install scikit-misc") from None
        except ValueError as error:  # loess: near singularities
            why = str(error)
            continue
        assert found is not None
        return np.flatnonzero(found["highly_variable"].to_numpy())
    raise InputError(
        f"protocol=cfgen can't choose {n} variable genes of {n_genes} on {n_cells} cells ({why}). "
        "Give more real cells, or take protocol=scldm"
    )


# --- the paper's numbers -------------------------------------------------------------------------------------------


PUBLISHED_NOTE = (
    "protocol not fully known: Palla et al. 2025 (arXiv 2511.02986, workshop version) score on highly variable genes. "
    "Whether in principal components, and of how many cells, is not said. Read them beside, not against, our scores."
)
_D, _T, _H, _P = "dentate gyrus", "Tabula Muris", "HLCA", "Parse 1M"
_U, _C, _N = "unconditional", "conditional", "unseen combinations"
# data, setting, method, W2, MMD2, FD
PUBLISHED: tuple[tuple[str, str, str, float, float, float], ...] = (
    (_D, _U, "scDiffusion", 17.44, 0.258, 256.6),
    (_D, _U, "CFGen", 12.62, 0.022, 28.1),
    (_D, _U, "scLDM", 10.82, 0.023, 28.4),
    (_D, _C, "scDiffusion", 17.32, 0.689, 261.2),
    (_D, _C, "CFGen", 11.61, 0.075, 41.4),
    (_D, _C, "scLDM", 10.62, 0.102, 34.4),
    (_T, _C, "scDiffusion", 14.14, 0.144, 159.0),
    (_T, _C, "CFGen", 8.92, 0.026, 21.5),
    (_T, _C, "scLDM", 7.72, 0.016, 11.0),
    (_H, _C, "scDiffusion", 15.89, 0.163, 210.9),
    (_H, _C, "CFGen", 9.76, 0.090, 33.9),
    (_H, _C, "scLDM", 8.45, 0.074, 21.0),
    (_P, _N, "scVI", 35.5, 1.372, 1233.0),
    (_P, _N, "CPA", 13.5, 1.117, 181.3),
    (_P, _N, "scLDM", 12.46, 0.027, 18.1),
)
