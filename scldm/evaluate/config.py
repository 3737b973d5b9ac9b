"""How generated cells are judged."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from scldm.checked import Checked, checked
from scldm.evaluate.intervals import IntervalConfig
from scldm.vocab import MIN_GENE_SHARE


@dataclass(frozen=True)
class EvaluateConfig(Checked):
    """How generated cells are judged.

    seed: of every random draw: floor, baselines, subsamples, UMAP
    n_draws: how often the floor and each baseline are drawn. Tables give their mean and standard deviation. The
        classifier takes the first 3
    min_cells: combinations and labels with at least this many compared cells are scored one by one. All cells at once
        need as many
    max_combinations: at most so many are scored one by one, the largest
    max_cells: scores that compare every cell with every other take at most so many cells a side
    max_group_cells: of a combination or label, at most so many
    max_drawn_cells: of floor and each baseline at most so many cells are drawn in all draws together, in no fewer than
        3 draws
    max_real_cells: of each split at most so many cells are taken. They are a seeded draw, with combinations in the
        shares at which they are compared. 100,000 cells of 3,000 expressed genes take 2.4 GB
    min_gene_share: of the genes of real or generated cells, whichever are fewer, that both must have
    """

    seed: int = checked(0, at_least=0, below=1 << 31)  # scikit-learn's lie below 2^32, and parts add to it
    n_draws: int = checked(10, at_least=2)
    min_cells: int = checked(20, at_least=8)  # a half of them still has a covariance
    max_combinations: int = checked(100, at_least=0)
    max_cells: int = checked(2_000, at_least=100)
    max_group_cells: int = checked(500, at_least=20)
    max_drawn_cells: int = checked(200_000, at_least=1_000)
    max_real_cells: int = checked(100_000, at_least=1_000)
    min_gene_share: float = checked(MIN_GENE_SHARE, at_least=0, at_most=1)
    intervals: IntervalConfig = field(default_factory=IntervalConfig)

    def rng(self, *key: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, *key])
