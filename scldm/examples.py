"""Cells to try things on: real ones that come with scanpy, and simulated ones whose truth is known."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp


def pbmc() -> ad.AnnData:
    """700 PBMCs x 765 genes (10x Genomics, a subset in scanpy) with raw counts in CSR, and `cell_type` in obs.

    scanpy carries log1p of counts scaled to 10,000 per cell, rounded to three decimals, and the totals. The counts can
    be had back, since expm1(value) * total / 10,000 lies within 0.1 of an integer for each of the 174,400 nonzeros.
    Needs scanpy (extra `evaluate`).
    """
    import scanpy as sc

    source = sc.datasets.pbmc68k_reduced()
    scaled = sp.csr_matrix(source.raw.X)
    totals = np.repeat(source.obs["n_counts"].to_numpy(), np.diff(scaled.indptr))
    counts = np.expm1(scaled.data.astype(np.float64)) * totals / 10_000
    assert len(counts) == 174_400, "scanpy's file is not the one known"
    assert np.abs(counts - counts.round()).max() < 0.1, "scanpy's file does not hold scaled counts"
    matrix = sp.csr_matrix((counts.round().astype(np.int32), scaled.indices, scaled.indptr), shape=scaled.shape)
    obs = pd.DataFrame({"cell_type": source.obs["bulk_labels"].astype(str)}, index=source.obs_names)
    return ad.AnnData(matrix, obs=obs, var=pd.DataFrame(index=source.raw.var_names))


def perturbed(n_cells: int = 1_600, n_genes: int = 300, seed: int = 0) -> ad.AnnData:
    """Simulated cells of four types, `control` and `treated`: Poisson counts of log-normal rates.

    Genes `response0` to `response19` rise about eightfold under treatment in every type. Genes `TYPE_only0` to
    `TYPE_only4` rise fourfold in that type alone. Every gene also varies with two hidden states of a cell. obs has
    `cell_type` and `treatment`, uns["log2_effect"] the true log2 fold changes, (types, genes).
    """
    types = ("B", "T", "NK", "monocyte")
    truth, rng = np.random.default_rng([seed, 0]), np.random.default_rng([seed, 1])
    names = [f"response{k}" for k in range(20)] + [f"{kind}_only{k}" for kind in types for k in range(5)]
    names += [f"gene{k}" for k in range(n_genes - len(names))]
    log_rate_TG = truth.normal(-1.0, 1.0, n_genes) + truth.normal(0, 0.8, (len(types), n_genes))
    log_rate_TG[:, :40] = truth.normal(-0.5, 0.3, 40)
    effect_TG = np.zeros((len(types), n_genes))
    effect_TG[:, :20] = truth.normal(3.0, 0.3, 20) + truth.normal(0, 0.2, (len(types), 20))
    for k in range(len(types)):
        effect_TG[k, 20 + 5 * k : 25 + 5 * k] = 2.0
    states_2G = truth.normal(0, 0.3, (2, n_genes))
    type_n, treated_n = np.arange(n_cells) % len(types), np.arange(n_cells) // len(types) % 2
    log_rate_nG = log_rate_TG[type_n] + treated_n[:, None] * effect_TG[type_n] * np.log(2)
    log_rate_nG += rng.normal(size=(n_cells, 2)) @ states_2G + rng.normal(0, 0.2, (n_cells, 1))
    obs = pd.DataFrame(
        {
            "cell_type": pd.Categorical(np.array(types)[type_n]),
            "treatment": pd.Categorical(np.array(["control", "treated"])[treated_n]),
        },
        index=pd.Index([f"cell{k}" for k in range(n_cells)]),
    )
    counts = sp.csr_matrix(rng.poisson(np.exp(log_rate_nG)).astype(np.int32))
    made = ad.AnnData(counts, obs=obs, var=pd.DataFrame(index=pd.Index(names)))
    made.uns["log2_effect"] = pd.DataFrame(effect_TG, index=pd.Index(types), columns=pd.Index(names))
    return made
