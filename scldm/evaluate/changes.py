"""Changes of genes between two sets of cells of one source, their test, and the slope of one source's on another's.

A change is log2((mean counts per 10,000 treated + 1) / (mean control + 1)), for each gene.

The slope. Regressing generated changes on real ones underestimates it, as the real changes are noisy: it is multiplied
by the share of their variance that is no noise. So the test cells are halved. With z the change in one half, x in the
other and y in generated cells, slope = cov(z, y) / cov(z, x) over the genes that respond in the first half. The noise
of z is independent of that of x and y, so that neither covariance has a part of it, whichever genes z chose. Training
cells can't be this half: a model has learned their noise, so that y shares it, and copies of them would score above 1.
Source: Wald 1940. Fuller 1987, section 1.4 (instrumental variables). Angrist & Krueger 1995 (the split sample).

Reading order: the rank-sum test, changes of all cells and of parts of them, the variance of a sum, the slope.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

import numpy as np
import scipy.sparse as sp
from scipy.stats import t as student

from scldm.evaluate.space import normalise, shape_of

EPS = 1.0  # counts per 10,000, added to both means of a change
N_RESPONDING = 100  # genes of the largest Welch t that a slope is fitted over. A fifth of the genes where that is fewer
N_BLOCKS = 8  # of the cells of a label: 70 halves
RANK_CELLS = 5_000  # a side in rank-sum tests. Sums take all cells

# --- the rank-sum test ---------------------------------------------------------------------------------------------


def rank_sum(treated: sp.csr_matrix, control: sp.csr_matrix) -> np.ndarray:
    """z of the Wilcoxon rank-sum test of every gene, (genes,). Above 0 where treated cells rank higher, 0 where all
    values tie. Normal approximation with tie and continuity correction. p is 2 * norm.sf(|z|). Values are >= 0, and the
    zeros of a gene are one tie.
    Source: Mann & Whitney 1947. Ties as in Lehmann 1975, section 1.4."""
    both = sp.csc_matrix(sp.vstack([treated, control]))
    both.eliminate_zeros()
    n_1, n_2, n_genes = treated.shape[0], control.shape[0], both.shape[1]  # pyright: ignore[reportOptionalSubscript]
    n, n_expressed = n_1 + n_2, np.diff(both.indptr)
    n_zero = n - n_expressed
    gene = np.repeat(np.arange(n_genes), n_expressed)
    order = np.lexsort((both.data, gene))
    value, is_treated = both.data[order], both.indices[order] < n_1
    new = np.ones(len(value), bool)
    new[1:] = (value[1:] != value[:-1]) | (gene[1:] != gene[:-1])
    first = np.flatnonzero(new)
    tied = np.diff(np.append(first, len(value)))
    of_gene = gene[first]
    rank = n_zero[of_gene] + first - both.indptr[of_gene] + (tied + 1) / 2
    sum_1 = np.bincount(gene, np.repeat(rank, tied) * is_treated, n_genes)
    sum_1 += (n_1 - np.bincount(gene, is_treated, n_genes)) * (n_zero + 1) / 2
    ties = np.bincount(of_gene, tied.astype(float) ** 3 - tied, n_genes) + n_zero.astype(float) ** 3 - n_zero
    deviation = np.sqrt(np.clip(n_1 * n_2 / 12 * (n + 1 - ties / (n * (n - 1))), 0, None))
    above = sum_1 - n_1 * (n_1 + 1) / 2 - n_1 * n_2 / 2
    # all values tied: the clipped deviation may be some rounding above 0
    tells = deviation > 1e-6 * n
    z = np.sign(above) * np.clip(np.abs(above) - 0.5, 0, None)
    return np.divide(z, deviation, out=np.zeros(n_genes), where=tells)


# --- changes, of all cells and of parts of them --------------------------------------------------------------------


@dataclass(frozen=True)
class Blocks:
    """The cells of one label in K blocks, and the sums of each that every change of a part of them is made of.

    per_10k: counts per 10,000, CSR (cells, genes). Cell i is in block i % K
    n_K: cells of each block
    per_10k_KG, log_KG, squares_KG: sums of counts per 10,000, of their log1p and of its square
    """

    per_10k: sp.csr_matrix
    n_K: np.ndarray
    per_10k_KG: np.ndarray
    log_KG: np.ndarray
    squares_KG: np.ndarray

    @classmethod
    def of_counts(cls, counts: sp.csr_matrix, rng: np.random.Generator) -> Blocks:
        """Blocks drawn at random, of equal size but for one cell."""
        return cls.of(normalise(counts)[rng.permutation(shape_of(counts)[0])])

    @classmethod
    def of(cls, per_10k: sp.csr_matrix) -> Blocks:
        n = shape_of(per_10k)[0]
        block = np.arange(n) % N_BLOCKS
        member = sp.csr_matrix((np.ones(n), (block, np.arange(n))), shape=(N_BLOCKS, n))
        log = per_10k.copy()
        np.log1p(log.data, out=log.data)
        sums = (sp.csr_matrix(member @ m).toarray() for m in (per_10k, log, log.power(2)))
        return cls(per_10k, np.bincount(block, minlength=N_BLOCKS), *sums)

    def half(self, k: int) -> Blocks:
        return Blocks.of(self.per_10k[k::2])


@dataclass(frozen=True)
class Pair:
    """Treated and control cells of one source."""

    treated: Blocks
    control: Blocks

    def changes(self, parts_MK: np.ndarray) -> np.ndarray:
        """log2((mean counts per 10,000 treated + 1) / (mean control + 1)) in parts of the cells, (parts, genes)."""
        both = (self.treated, self.control)
        up, down = (np.log2(parts_MK @ b.per_10k_KG / (parts_MK @ b.n_K)[:, None] + EPS) for b in both)
        return up - down

    @cached_property
    def change(self) -> np.ndarray:
        """The same in all cells, (genes,)."""
        return self.changes(np.ones((1, N_BLOCKS)))[0]

    @cached_property
    def log1p_change(self) -> np.ndarray:
        """Difference of the means of log1p counts per 10,000, (genes,)."""
        up, down = (b.log_KG.sum(0) / b.n_K.sum() for b in (self.treated, self.control))
        return up - down

    @cached_property
    def z(self) -> np.ndarray:
        """rank_sum of at most 5,000 cells a side."""
        return rank_sum(self.treated.per_10k[:RANK_CELLS], self.control.per_10k[:RANK_CELLS])

    def top(self, k: int) -> np.ndarray:
        """The columns of the k genes of the largest |z|. Of equal ones that of the larger change goes first."""
        return np.lexsort((-np.abs(self.change), -np.abs(self.z)))[:k]

    def welch_t(self, parts_MK: np.ndarray) -> np.ndarray:
        """Welch's t of log1p counts per 10,000 in parts of the cells, (parts, genes). 0 where nothing varies."""
        means, errors = [], []
        for b in (self.treated, self.control):
            n = (parts_MK @ b.n_K)[:, None]
            means.append(parts_MK @ b.log_KG / n)
            errors.append(np.clip(parts_MK @ b.squares_KG / n - means[-1] ** 2, 0, None) / (n - 1))
        error = np.sqrt(errors[0] + errors[1])
        return np.divide(means[0] - means[1], error, out=np.zeros_like(error), where=error > 1e-9)

    def half(self, k: int) -> Pair:
        return Pair(self.treated.half(k), self.control.half(k))


def parts_of(n: int) -> np.ndarray:
    """All choices of n of the K blocks as rows of zeros and ones, (choices, K)."""
    chosen = list(combinations(range(N_BLOCKS), n))
    out = np.zeros((len(chosen), N_BLOCKS))
    for row, blocks in enumerate(chosen):
        out[row, list(blocks)] = 1
    return out


HALVES, QUARTERS = parts_of(N_BLOCKS // 2), parts_of(N_BLOCKS // 4)


# --- the variance of a sum -----------------------------------------------------------------------------------------


def variance_of_sum(
    replicates_NS: np.ndarray, weights: Sequence[float] | np.ndarray, groups: Sequence[Hashable]
) -> float:
    """The variance of the weighted sum of N contrasts, from S replicates of each by the delete-half jackknife.

    The contrasts of a group share their control cells, so that their errors are correlated. Replicate s of all of them
    must leave out the same control cells: they are summed within each replicate. Groups share no cells, and their
    variances add up.
    Source: Shao & Wu 1989, deleting half, where the factor is 1.
    """
    number = {group: k for k, group in enumerate(dict.fromkeys(groups))}
    sums_GS = np.zeros((len(number), replicates_NS.shape[1]))
    np.add.at(sums_GS, [number[group] for group in groups], np.multiply(replicates_NS.T, weights).T)
    return float(sums_GS.var(1).sum())


# --- the slope -----------------------------------------------------------------------------------------------------


def instruments(test: Pair, parts_MK: np.ndarray) -> sp.csr_matrix:
    """Weights of genes, CSR (parts, genes), over the genes of the largest Welch t in each part of the test cells. Their
    product with changes is the covariance of these with the change z in that part."""
    z, t = test.changes(parts_MK), np.abs(test.welch_t(parts_MK))
    k = max(2, min(N_RESPONDING, z.shape[1] // 5))
    chosen = np.argpartition(-t, k - 1, axis=1)[:, :k]
    weight = np.take_along_axis(z, chosen, 1)
    weight = (weight - weight.mean(1, keepdims=True)) / k
    rows = np.repeat(np.arange(len(parts_MK)), k)
    return sp.csr_matrix((weight.ravel(), (rows, chosen.ravel())), shape=z.shape)


@dataclass(frozen=True)
class Covariances:
    """What slopes are ratios of, in log2 units squared: covariances with the change in a half of the test cells, means
    over all ways to halve them.

    generated, real: of generated cells' changes, and of those in the other half
    train: of training cells' changes. None where they have too few
    replicates_2S: generated and real again, each time from half of the generated and of the test cells
    """

    generated: float
    real: float
    train: float | None
    replicates_2S: np.ndarray

    @classmethod
    def of(cls, test: Pair, generated: Pair, train: Pair | None, halves_SK: np.ndarray) -> Covariances:
        """halves_SK: HALVES in any order. Replicate s has half s of the test cells and this one of generated cells."""
        of_half, of_quarter = instruments(test, HALVES), instruments(test, QUARTERS)
        real = of_half.multiply(test.changes(1 - HALVES)).sum() / len(HALVES)
        y, x = (None if p is None else float((of_half @ p.change).mean()) for p in (generated, train))
        assert y is not None
        with_y = of_quarter @ generated.changes(halves_SK).T
        with_x = of_quarter @ test.changes(QUARTERS).T
        replicates = np.empty((2, len(HALVES)))
        for s, half in enumerate(HALVES):  # is a quarter and another one, in 6 ways
            inside = np.flatnonzero(QUARTERS @ half == N_BLOCKS // 4)
            a, b = np.nonzero(QUARTERS[inside] @ QUARTERS[inside].T == 0)
            replicates[:, s] = with_y[inside, s].mean(), with_x[inside[a], inside[b]].mean()
        return cls(y, float(real), x, replicates)


@dataclass(frozen=True)
class Score:
    """A number of generated cells beside that of real ones. None where it can't be told.

    error: its standard deviation. None where none is computed
    """

    value: float | None
    ceiling: float | None
    error: float | None = None

    def as_json(self) -> dict:
        """`low` and `high` bound the 95 % interval: Student's t of as many degrees as there are blocks, less one."""
        out: dict = {"value": self.value, "ceiling": self.ceiling}
        if self.value is not None and self.error is not None:
            reach = float(student.ppf(0.975, N_BLOCKS - 1)) * self.error
            out |= {"low": self.value - reach, "high": self.value + reach}
        return out


def slope(covariances: Sequence[Covariances], weights: Sequence[float], groups: Sequence[Hashable]) -> Score:
    """The ratio of the weighted sums of covariances, generated over real. 1 is right. Its error is that of numerator
    less ratio times denominator, over the denominator, by `variance_of_sum` over cells of both sides.

    groups: of each contrast. Those of one group share their control cells

    None where no response of real cells is told from noise: the denominator is within two standard deviations of 0.
    """
    w = np.asarray(weights, float)
    y_NS, x_NS = (np.array([c.replicates_2S[k] for c in covariances]) for k in (0, 1))
    with_real = float(w @ [c.real for c in covariances])
    if min(with_real, size := float(w @ x_NS.mean(1))) <= 2 * np.sqrt(variance_of_sum(x_NS, w, groups)):
        return Score(None, None)
    value = float(w @ [c.generated for c in covariances]) / with_real
    error = float(np.sqrt(variance_of_sum(y_NS - value * x_NS, w, groups))) / size
    trained = [(c.train, c.real, weight) for c, weight in zip(covariances, w, strict=True) if c.train is not None]
    base = sum(real * weight for _, real, weight in trained)
    of_train = sum(train * weight for train, _, weight in trained)
    return Score(value, float(of_train / base) if base > 0 else None, error)
