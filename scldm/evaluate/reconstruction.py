"""How well an autoencoder gives cells back: likelihood, correlation and error in two readings, beside mean profiles.

RE is the negative log-likelihood of a cell in nats, summed over genes. PCC and MSE compare log1p of counts per 10,000
of a cell's own total. They have two readings, because the published numbers depend on how they were taken:

published: the reading of the published code. The other side is one draw of counts for each cell. PCC is Pearson's r of
    a gene over the cells of a batch of 128, averaged over the genes that have one, then over batches.
ours: the other side is the expected counts, and batches do not matter. PCC is Pearson's r of a gene over all cells,
    averaged over genes, and of a cell over all genes, averaged over cells.

A draw adds noise that no model can foresee, so that PCC is lower and MSE higher in the published reading.
Scores are fed block by block and keep a few numbers for each gene, whatever the number of cells.

Reading order: log_profile, PublishedScores, OurScores, Reconstruction, MeanProfile. Published numbers are in named.py.
Letters: B cells of a block, G genes, K combinations.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import scipy.sparse as sp
import torch
from scipy.special import digamma

from scldm.errors import InputError
from scldm.evaluate.space import TARGET_SUM, shape_of
from scldm.likelihood import nb_log_prob

PUBLISHED_BATCH = 128
# values of a gene or cell that differ by less than this share of the largest one are rounded copies of one number
CONSTANT = 1e-6


def log_profile(counts_BG: np.ndarray) -> np.ndarray:
    """log1p of counts per 10,000 of the cell's own total, float64, (B, G). A cell without a count is all 0."""
    counts_BG = np.asarray(counts_BG, np.float64)
    total_B1 = counts_BG.sum(1, keepdims=True)
    return np.log1p(counts_BG * (TARGET_SUM / np.where(total_B1 > 0, total_B1, 1.0)))


def pearson_along(x: np.ndarray, y: np.ndarray, axis: int) -> np.ndarray:
    """Pearson's r of x and y along an axis. NaN where one of them is constant there."""
    dx, dy = x - x.mean(axis, keepdims=True), y - y.mean(axis, keepdims=True)
    r = _ratio((dx * dy).sum(axis), (dx * dx).sum(axis), (dy * dy).sum(axis))
    constant = _constant(x.min(axis), x.max(axis)) | _constant(y.min(axis), y.max(axis))
    return np.where(constant, np.nan, r)


def _ratio(xy: np.ndarray, xx: np.ndarray, yy: np.ndarray) -> np.ndarray:
    """xy / sqrt(xx yy), NaN where that is 0 / 0."""
    root = np.sqrt(xx) * np.sqrt(yy)
    return np.divide(xy, root, out=np.full(root.shape, np.nan), where=root > 0)


def _constant(least: np.ndarray, most: np.ndarray) -> np.ndarray:
    return most - least <= CONSTANT * np.maximum(np.abs(least), np.abs(most))


def _mean(values: np.ndarray) -> float | None:
    """Mean of those that are not NaN. None where all are."""
    there = values[~np.isnan(values)]
    return float(there.mean()) if len(there) else None


# --- the published reading -----------------------------------------------------------------------------------------


class PublishedScores:
    """PCC and MSE as the published code takes them: one draw a cell, and genes correlated within batches of cells.

    PCC depends on the order of the cells and on the batch: fewer cells have more genes without a correlation. How the
    cells are divided into calls of `add` changes nothing. The last batch is as small as it comes. A batch in which no
    gene has a correlation, such as one of a single cell, is left out and counted.
    """

    def __init__(self, batch: int = PUBLISHED_BATCH) -> None:
        self.batch, self.n, self.squares = batch, 0, 0.0
        self.waiting: list[tuple[np.ndarray, np.ndarray]] = []
        self.pcc: list[float | None] = []
        self.genes: list[int] = []

    def add(self, real_BG: np.ndarray, drawn_BG: np.ndarray) -> None:
        """The next cells: log profiles of their counts and of the counts that were drawn for them, (B, G)."""
        start = 0
        while start < len(real_BG):
            stop = start + self.batch - sum(len(x) for x, _ in self.waiting)
            # a copy: the caller's block is not kept alive for the few cells that wait
            self.waiting.append((real_BG[start:stop].copy(), drawn_BG[start:stop].copy()))
            start = min(stop, len(real_BG))
            if sum(len(x) for x, _ in self.waiting) == self.batch:
                self._finish_batch()

    def _finish_batch(self) -> None:
        x, y = (np.concatenate(side) for side in zip(*self.waiting, strict=True))
        self.waiting = []
        self.n += x.size
        self.squares += float(np.square(x - y).sum())
        r_G = pearson_along(x, y, 0)
        self.pcc.append(_mean(r_G))
        self.genes.append(int((~np.isnan(r_G)).sum()))

    def result(self) -> dict:
        """pcc (None where no batch has one) and mse. Batches, and those without a correlation. Genes that had one, mean
        over batches. Ends the stream: what waits is the last batch."""
        if self.waiting:
            self._finish_batch()
        assert self.n > 0, "no cell was added"
        found = [pcc for pcc in self.pcc if pcc is not None]
        return {
            "pcc": float(np.mean(found)) if found else None,
            "mse": self.squares / self.n,
            "batch": self.batch,
            "batches": len(self.pcc),
            "batches_without_pcc": len(self.pcc) - len(found),
            "genes_with_pcc": float(np.mean(self.genes)),
        }


# --- our reading ---------------------------------------------------------------------------------------------------


class OurScores:
    """PCC of genes over all cells and of cells over all genes, and MSE, between log profiles of the counts and of the
    expected counts. The order of the cells changes nothing but the last bits.

    Sums are kept around the mean so far, as the variance of a gene of high mean would else be lost to rounding.
    Source: Chan, Golub & LeVeque 1979, eq. 2.1.
    """

    def __init__(self) -> None:
        self.n, self.squares = 0, 0.0
        self.r_cells: list[np.ndarray] = []
        self.mean_2G, self.moment_3G = np.zeros((2, 1)), np.zeros((3, 1))
        self.least_2G, self.most_2G = np.full((2, 1), np.inf), np.full((2, 1), -np.inf)

    def add(self, real_BG: np.ndarray, expected_BG: np.ndarray) -> None:
        """The next cells: log profiles of their counts and of their expected counts, (B, G)."""
        x, y, n = real_BG, expected_BG, len(real_BG)
        if not n:
            return
        self.squares += float(np.square(x - y).sum())
        self.r_cells.append(pearson_along(x, y, 1))
        mean_2G = np.stack([x.mean(0), y.mean(0)])
        dx, dy = x - mean_2G[0], y - mean_2G[1]
        moment_3G = np.stack([(dx * dx).sum(0), (dy * dy).sum(0), (dx * dy).sum(0)])
        least_2G, most_2G = np.stack([x.min(0), y.min(0)]), np.stack([x.max(0), y.max(0)])
        step_2G, total = mean_2G - self.mean_2G, self.n + n
        between_3G = np.stack([step_2G[0] ** 2, step_2G[1] ** 2, step_2G[0] * step_2G[1]])
        self.moment_3G = self.moment_3G + moment_3G + between_3G * (self.n * n / total)
        self.mean_2G = self.mean_2G + step_2G * (n / total)
        self.n = total
        self.least_2G, self.most_2G = np.minimum(self.least_2G, least_2G), np.maximum(self.most_2G, most_2G)

    def r_G(self) -> np.ndarray:
        """Pearson's r of every gene over all cells so far. NaN where one side is constant."""
        constant_G = _constant(self.least_2G, self.most_2G).any(0)
        return np.where(constant_G, np.nan, _ratio(self.moment_3G[2], self.moment_3G[0], self.moment_3G[1]))

    def result(self) -> dict:
        """pcc_gene, pcc_cell (None where there is no correlation at all), mse, how many genes and cells have one."""
        assert self.n > 0, "no cell was added"
        r_G, r_n = self.r_G(), np.concatenate(self.r_cells)
        return {
            "pcc_gene": _mean(r_G),
            "pcc_cell": _mean(r_n),
            "mse": self.squares / (self.n * len(r_G)),
            "genes_with_pcc": int((~np.isnan(r_G)).sum()),
            "cells_with_pcc": int((~np.isnan(r_n)).sum()),
        }


# --- all of it -----------------------------------------------------------------------------------------------------


class Reconstruction:
    """All scores of one model, fed with blocks of cells."""

    def __init__(self) -> None:
        self.published, self.ours = PublishedScores(), OurScores()
        self.nll: list[np.ndarray] = []

    def add(self, real_BG: np.ndarray, expected_BG: np.ndarray, drawn_BG: np.ndarray, nll_B: np.ndarray) -> None:
        """The next cells.

        real_BG: log profiles of their counts (`log_profile`)
        expected_BG: expected counts
        drawn_BG: counts, one draw a cell
        nll_B: negative log-likelihood in nats, summed over genes: `-log_prob_BG.sum(1)`
        """
        self.nll.append(np.asarray(nll_B, np.float64))
        self.ours.add(real_BG, log_profile(expected_BG))
        self.published.add(real_BG, log_profile(drawn_BG))

    @property
    def nll_n(self) -> np.ndarray:
        return np.concatenate(self.nll)

    def result(self) -> dict:
        """re: mean over cells in nats, and its standard error. Also the two readings of PCC and MSE."""
        return {
            "re": mean_and_error(self.nll_n),
            "published": self.published.result(),
            "ours": self.ours.result(),
        }


def mean_and_error(values_n: np.ndarray) -> dict[str, float | None]:
    """Mean over cells, and its standard error (None of a single cell)."""
    n = len(values_n)
    return {"mean": float(values_n.mean()), "se": float(values_n.std(ddof=1) / n**0.5) if n > 1 else None}


# --- mean profiles -------------------------------------------------------------------------------------------------

# a gene without a count in training is given half a count. A combination is given one more cell of the pooled profile
GENE_PSEUDO_COUNT = 0.5
THETA_RANGE = (1e-4, 1e6)  # at 1e6 the variance of a mean of 1,000 is 0.1 % above Poisson's
THETA_STEPS = 24  # halvings of log(1e10) = 23: theta to a millionth
THETA_VALUES = 20_000_000  # cells x genes that theta is fitted on: 10,000 cells at 2,000 genes
THETA_GENES = 32  # genes at once: 10,000 x 32 x 8 B = 2.6 MB, which a cache holds


@dataclass(frozen=True)
class MeanProfile:
    """What is known without a network: expected counts are library size x mean share of the training cells, with a
    dispersion for each gene. A model that is no better has learnt nothing about single cells.

    share_G: share of a gene in all counts of the training cells. None is 0
    theta_G: inverse dispersion of the negative binomial, by maximum likelihood given the means
    sums_KG: summed counts of each combination's training cells. No rows for the pooled profile
    row_of: combination -> row of sums_KG
    weight: total count of the cell of the pooled profile that every combination is given: the mean library size
    """

    share_G: np.ndarray
    theta_G: np.ndarray
    sums_KG: sp.csr_matrix
    row_of: dict[str, int] = field(default_factory=dict)
    weight: float = 1.0

    def mean_BG(self, library_size_B: np.ndarray, types_B: np.ndarray) -> np.ndarray:
        """Expected counts, (B, G). A combination without training cells has the pooled profile."""
        if not self.row_of:
            return library_size_B[:, None] * self.share_G
        mean_BG = np.empty((len(types_B), len(self.share_G)))
        for label in np.unique(types_B):
            cells = types_B == label
            prior_G = self.weight * self.share_G
            row = self.row_of.get(str(label))
            sum_G = prior_G if row is None else prior_G + np.asarray(self.sums_KG[row].toarray()).ravel()
            mean_BG[cells] = library_size_B[cells, None] * (sum_G / sum_G.sum())
        return mean_BG


def fit_mean_profile(counts: sp.csr_matrix, types: np.ndarray | None = None, seed: int = 0) -> MeanProfile:
    """The mean profile of training cells. With their combinations, a profile of each and a theta for each gene.

    theta is fitted on a seeded draw of cells where there are more than THETA_VALUES / genes.

    Raises: InputError where the cells have no counts.
    """
    sum_G = np.asarray(counts.sum(0), np.float64).ravel()
    if not sum_G.sum() > 0:
        raise InputError("the training cells have no counts, so that there is no mean profile")
    share_G = (sum_G + GENE_PSEUDO_COUNT) / (sum_G.sum() + GENE_PSEUDO_COUNT * len(sum_G))
    labels = np.empty(0, str) if types is None else np.unique(types)
    row_n = np.zeros(0, np.int64) if types is None else np.searchsorted(labels, types)
    one_KN = sp.csr_matrix((np.ones(len(row_n)), (row_n, np.arange(len(row_n)))), (len(labels), len(row_n)))
    sums_KG = sp.csr_matrix(one_KN @ counts) if len(labels) else sp.csr_matrix((0, len(sum_G)))
    row_of = {str(label): k for k, label in enumerate(labels)}
    weight = float(sum_G.sum() / shape_of(counts)[0])

    rows, most = np.arange(shape_of(counts)[0]), max(1_000, THETA_VALUES // len(sum_G))
    if len(rows) > most:
        rows = np.sort(np.random.default_rng(seed).choice(rows, most, replace=False))
    few = counts[rows]
    size_n = np.asarray(few.sum(1), np.float64).ravel()
    columns, sums_KG_by_gene = few.tocsc(), sums_KG.tocsc()
    columns.eliminate_zeros()
    total_K1 = np.asarray(sums_KG.sum(1)) + weight  # shares add up to 1
    theta_G = np.empty(len(sum_G))
    for start in range(0, len(sum_G), THETA_GENES):
        genes = slice(start, start + THETA_GENES)
        share_NS = share_G[genes]
        if row_of:
            share_KS = (sums_KG_by_gene[:, genes].toarray() + weight * share_G[genes]) / total_K1
            share_NS = share_KS[row_n[rows]]
        theta_G[genes] = fit_theta(sp.csc_matrix(columns[:, genes]), size_n[:, None] * share_NS)
    return MeanProfile(share_G, theta_G, sums_KG, row_of, weight)


def fit_theta(counts_NS: sp.csc_matrix, mean_NS: np.ndarray) -> np.ndarray:
    """Inverse dispersion of each gene by maximum likelihood given the means, (S,), within THETA_RANGE.

    The derivative of the log-likelihood by theta,
    sum_n psi(c + theta) - psi(theta) - log(1 + mu / theta) + (mu - c) / (theta + mu), is brought to 0 by bisection of
    log theta. A gene that varies no more than Poisson counts gets the largest theta. counts_NS stores no zeros.
    """
    n_genes = mean_NS.shape[1]
    gene_E = np.repeat(np.arange(n_genes), np.diff(counts_NS.indptr))
    count_E = counts_NS.data.astype(np.float64)
    mean_E = mean_NS[counts_NS.indices, gene_E]
    # psi is expensive, and the same for equal counts of a gene
    width = int(count_E.max(initial=0)) + 1
    pair_U, n_U = np.unique(gene_E * width + count_E.astype(np.int64), return_counts=True)
    gene_U, count_U = np.divmod(pair_U, width)
    low, high = (np.full(n_genes, np.log(end)) for end in THETA_RANGE)
    for _ in range(THETA_STEPS):
        middle = (low + high) / 2
        theta = np.exp(middle)
        ratio_NS = mean_NS / theta
        slope = (ratio_NS / (1 + ratio_NS) - np.log1p(ratio_NS)).sum(0)  # what all counts share, and zeros have alone
        slope -= np.bincount(gene_E, count_E / (theta[gene_E] + mean_E), minlength=n_genes)
        psi_U = digamma(count_U + theta[gene_U]) - digamma(theta)[gene_U]
        slope += np.bincount(gene_U, n_U * psi_U, minlength=n_genes)
        low, high = np.where(slope > 0, middle, low), np.where(slope > 0, high, middle)
    return np.exp((low + high) / 2)


def nb_nll(counts: sp.csr_matrix, mean_BG: np.ndarray, theta_G: np.ndarray) -> np.ndarray:
    """-log NB(counts; mean, theta) summed over genes, in nats, (B,). Formula: scldm.likelihood.nb_log_prob.

    Of a zero it is theta log(1 + mean / theta), which is taken for all genes. Log-gammas are taken of counts alone.
    """
    counts = sp.csr_matrix(counts, copy=True)
    counts.eliminate_zeros()
    nll_B = np.log1p(mean_BG / theta_G) @ theta_G
    cell_E = np.repeat(np.arange(shape_of(counts)[0]), np.diff(counts.indptr))
    mean_E, theta_E = mean_BG[cell_E, counts.indices], theta_G[counts.indices]
    count_E = torch.from_numpy(counts.data.astype(np.float64))
    log_prob_E = nb_log_prob(count_E, torch.from_numpy(mean_E), torch.from_numpy(theta_E)).numpy()
    return nll_B - np.bincount(cell_E, log_prob_E + theta_E * np.log1p(mean_E / theta_E), minlength=len(nll_B))
