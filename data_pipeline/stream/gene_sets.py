"""Gene sets: which genes the encoder is given, and which the decoder is asked about. Each is a pure function of seed,
epoch and position in the epoch, and of the cell where the policy looks at it. ../README.md compares the policies.

The library size given to the likelihood is always that of the decoder's set.

Reading order: GeneSets, the kernels (numba, without the GIL).
"""

from __future__ import annotations

import sys

import numpy as np
from numba import njit

from data_pipeline.stream.gene_set_config import DRAWN, OF_THE_CELL, GeneSetConfig
from data_pipeline.stream.philox import four_words, random_words
from scldm.errors import InputError

WIDTH_STEP = 64  # a micro-batch's padded width is rounded up to it, so that a compiled model meets few shapes


class GeneSets:
    """The gene sets of one side, encoder or decoder.

    key: where the config stands in the run's, for messages
    purpose: DRAW_GIVEN or DRAW_ASKED, which keeps the draws of the two sides apart
    n_expressed_largest: expressed genes of the cell that has most
    weights: of the genes, (G,), for policy weighted

    Raises: InputError for a policy that this vocabulary, these cells or this micro-batch can't serve.
    """

    def __init__(
        self,
        config: GeneSetConfig,
        key: str,
        *,
        seed: int,
        purpose: int,
        n_genes: int,
        n_expressed_largest: int,
        weights: np.ndarray | None,
        micro_batch: int,
        loud: bool,
    ) -> None:
        config = config.of(n_genes)
        self.config, self.seed, self.purpose = config, seed, purpose
        self.total, self.width = n_genes, config.n_genes
        policy = config.policy
        if policy == "same":
            raise InputError(f"{key}.policy=same is for the decoder alone: say which genes the encoder is given")
        if policy in ("random", "weighted", "expressed_plus_zeros") and not 1 <= config.n_genes <= n_genes:
            raise InputError(
                f"{key}.n_genes={config.n_genes} must lie in 1 ... {n_genes}, the genes of the vocabulary"
                + (f". {key}.share takes a part of them" if config.policy in DRAWN else "")
            )
        if policy in DRAWN and config.gene_set_group > 1 and config.gene_set_group % micro_batch:
            down = config.gene_set_group // micro_batch * micro_batch
            near = f"{down} or {down + micro_batch}" if down else f"{micro_batch}"
            raise InputError(
                f"{key}.gene_set_group={config.gene_set_group} must be 1 or a multiple of micro_batch={micro_batch}, "
                f"which may not cross a group. Nearest: {near}"
            )
        if policy in OF_THE_CELL and 0 < config.n_genes < n_expressed_largest:
            if config.overflow == "refuse":
                raise InputError(
                    f"{key}.n_genes={config.n_genes}: a cell of this set expresses {n_expressed_largest} genes. "
                    f"n_genes={n_expressed_largest} takes all. overflow=sample takes a random part of such cells' genes"
                )
            if loud:
                text = f"{key}: cells of over {config.n_genes} expressed genes (up to {n_expressed_largest}) lose some"
                print(text, file=sys.stderr)
        self.rates: np.ndarray | None = None
        self.soon, self.least = np.inf, np.empty(0, np.int64)
        if policy == "weighted":
            assert weights is not None
            if (weights > 0).sum() < config.n_genes:
                n = (weights > 0).sum()
                raise InputError(f"{key}.n_genes={config.n_genes}: only {n} genes have a {config.weight_by} above 0")
            self.rates = weights.astype(np.float64)
            self.soon = _time_of(self.rates, config.n_genes + 6 * config.n_genes**0.5 + 16)
            self.least = _least_words(self.rates, self.soon)

    @property
    def of_the_cell(self) -> bool:
        """Whether the set depends on what the cell expresses."""
        return self.config.policy in OF_THE_CELL

    @property
    def shared(self) -> bool:
        """Whether the cells of a micro-batch share one set."""
        return self.config.policy == "all" or (self.config.policy in DRAWN and self.config.gene_set_group > 1)

    def ids(self, epoch: int, step: int, positions: np.ndarray) -> np.ndarray:
        """The vocabulary indices of the sets at these positions of the epoch's global batch `step`, int64: (S,) where
        they share one, else (B, S)."""
        assert not self.of_the_cell
        if self.config.policy == "all":
            return np.arange(1, self.total + 1)
        group = self.config.gene_set_group
        if group > 1:
            first = int(positions[0]) // group * group
            assert first == positions[-1] // group * group, "a micro-batch crosses a gene set's group"
            return self._draw(epoch, step, first, 1)[0]
        return self._draw(epoch, step, int(positions[0]), len(positions))

    def words(self, epoch: int, step: int, positions: np.ndarray) -> np.ndarray:
        """One random word (B,) for each cell, from which a policy that looks at the cell goes on."""
        if self.config.policy == "expressed" and (not self.width or self.config.overflow == "refuse"):
            return np.zeros(len(positions), np.uint64)  # draws nothing
        n, first = len(positions), int(positions[0])
        return random_words(self.seed, self.purpose, epoch, step, 4 * n, skip=first)[::4]

    def _draw(self, epoch: int, step: int, first: int, n_positions: int) -> np.ndarray:
        """Sets (n_positions, S)."""
        out = np.empty((n_positions, self.width), np.int64)
        seed, purpose, from_, at, of = map(np.uint64, (self.seed, self.purpose, first, step, epoch))
        if self.rates is None:
            _draw_without_replacement(self.total, seed, purpose, from_, at, of, out)
            return out
        for soon, least in ((self.soon, self.least), (np.inf, _least_words(self.rates, np.inf))):
            if _draw_first_arrivals(self.rates, soon, least, seed, purpose, from_, at, of, out):
                break
        return out


# --- kernels --------------------------------------------------------------------------------------------------------


@njit(nogil=True, inline="always")
def nth_word(seed, j):
    """The j-th word of the stream that begins at `seed` (SplitMix64; Steele, Lea & Flood 2014)."""
    z = np.uint64(seed) + np.uint64(j + 1) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@njit(nogil=True, inline="always")
def below(word, n):
    """A whole number in 0 ... n - 1 from a random word."""
    return np.int64(np.float64(np.uint64(word) >> np.uint64(11)) * 2.0**-53 * n)


@njit(nogil=True, cache=True)
def _draw_without_replacement(n, seed, purpose, first, step, epoch, out):
    """Sets of out.shape[1] of the indices 1 ... n, a row for each position's random word. What was drawn before is
    drawn again. Where that would be often, the first steps of a Fisher-Yates shuffle draw them."""
    width = out.shape[1]
    often = 2 * width > n
    items, taken = np.empty(n if often else 0, np.int32), np.zeros(0 if often else n, np.uint8)
    for i in range(len(out)):
        word = four_words(seed, purpose, first + np.uint64(i), step, epoch)[0]
        if often:
            for k in range(n):
                items[k] = k + 1
            for k in range(width):
                chosen = k + below(nth_word(word, k), n - k)
                out[i, k] = items[chosen]
                items[chosen] = items[k]
            continue
        k, draws = np.uint64(0), np.uint64(0)
        while k < np.uint64(width):
            gene = np.uint64(below(nth_word(word, draws), n))
            draws += np.uint64(1)
            # written whether or not it was taken, and kept only if not: no branch to mispredict
            out[i, k] = gene + np.uint64(1)
            k += np.uint64(1 - taken[gene])
            taken[gene] = 1
        for j in range(width):
            taken[out[i, j] - 1] = 0


def _time_of(rates: np.ndarray, n: float) -> float:
    """The time by which n genes are expected to have arrived at these rates. inf if fewer ever do."""
    if n >= (rates > 0).sum():
        return np.inf
    low, high = 1e-3 / rates.sum(), 1 / rates[rates > 0].min()
    while -np.expm1(-rates * high).sum() < n:
        high *= 2
    for _ in range(60):
        middle = low * (high / low) ** 0.5  # rates may be of any magnitude
        low, high = (middle, high) if -np.expm1(-rates * middle).sum() < n else (low, middle)
    return high


def _least_words(rates: np.ndarray, soon: float) -> np.ndarray:
    """For each gene what the upper 53 bits of its random word must exceed for it to arrive before `soon` or hardly
    after. At a rate of 0 it is 2^53, which no word exceeds."""
    with np.errstate(invalid="ignore"):
        left = np.where(rates > 0, np.exp(-rates * soon), 1.0)
    return np.where(rates > 0, np.maximum(np.floor(left * (1 - 1e-12) * 2.0**53) - 2, -1), 2.0**53).astype(np.int64)


@njit(nogil=True, cache=True)
def _draw_first_arrivals(rates, soon, least, seed, purpose, first, step, epoch, out):
    """Sets of out.shape[1] genes, ascending: those that arrive first at these rates, which is successive sampling
    without replacement (Efraimidis & Spirakis 2006). Only the few that may arrive before `soon` are looked at, and the
    logarithm taken of no other. False where too few do, which must be drawn again without that limit."""
    n, width = len(rates), out.shape[1]
    blocks = np.uint64((n + 3) // 4)
    genes, arrivals = np.empty(n + 4, np.int32), np.empty(n + 4, np.float64)
    words = np.empty(4, np.uint64)
    for i in range(len(out)):
        found = 0
        for k in range(blocks):
            words[0], words[1], words[2], words[3] = four_words(
                seed, purpose, (first + np.uint64(i)) * blocks + k, step, epoch
            )
            for q in range(min(4, n - 4 * np.int64(k))):
                gene, upper = 4 * np.int64(k) + q, np.int64(words[q] >> np.uint64(11))
                # written always, kept where it may be soon: no branch to mispredict
                genes[found], arrivals[found] = gene, np.float64(upper + 1)
                found += upper > least[gene]
        if found < width:
            return False
        for j in range(found):
            arrivals[j] = -np.log(arrivals[j] * 2.0**-53) / rates[genes[j]]
        last = np.partition(arrivals[:found], width - 1)[width - 1]
        if last >= soon * (1 - 1e-9) and soon < np.inf:
            return False
        written = 0
        for j in range(found):
            if arrivals[j] <= last and written < width:
                out[i, written] = genes[j] + 1
                written += 1
    return True
