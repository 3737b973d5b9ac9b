"""What the flow is told of a cell's library size: as large for its kind as the cell is, of sizes that its kind has.

Told a size unlike all of a kind's, the network, which never saw the two together, makes cells of another kind.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from scldm.library_size import LibrarySizeModel

MOST_STDS = 2.0  # of log library sizes: 5 % of training cells lie further from the mean of their combination
USUALLY_FAR = 0.1  # of cells like those of training, at most this share lies further
EVER_FAR = 2 * MOST_STDS  # and none this far


@dataclass(frozen=True)
class ToldSizes:
    """Moments of log library sizes, a row a combination of labels, (mean, std), float64 (combinations, 2).

    own_K2: of the cells' own labels
    asked_K2: of the labels that the network is asked for
    """

    own_K2: Tensor
    asked_K2: Tensor

    @classmethod
    def of(cls, sizes: LibrarySizeModel, labels: pd.DataFrame, asked: pd.DataFrame) -> Self:
        """labels, asked: a row for each combination. Where no label was fitted, all cells stand for it."""
        own, of_asked = (sizes.of(of, or_all=True) for of in (labels, asked))
        own_K2, asked_K2 = (torch.from_numpy(np.stack(of[:2], axis=1)) for of in (own, of_asked))
        return cls(own_K2, asked_K2)

    def tell(self, size_B: Tensor, combination_B: Tensor) -> Tensor:
        """The sizes to tell, (B,) float64: as far from the mean as the cells' own, at most MOST_STDS away."""
        mean_B, std_B = self.asked_K2.to(size_B.device, non_blocking=True)[combination_B].unbind(1)
        return torch.exp(mean_B + std_B * self._stds(size_B, combination_B).clamp(-MOST_STDS, MOST_STDS))

    def far(self, size_B: Tensor, combination_B: Tensor) -> Tensor:
        """Which sizes are unlike their kind's, (B,) bool."""
        return self._stds(size_B, combination_B).abs() > MOST_STDS

    def note(self, size_B: Tensor, combination_B: Tensor, labels: pd.DataFrame) -> tuple[str, ...]:
        """A sentence where sizes are unlike their kind's. labels: those of each combination, as text"""
        far_B, stds_B = self.far(size_B, combination_B), self._stds(size_B, combination_B).abs()
        if far_B.double().mean() <= USUALLY_FAR and stds_B.max() <= EVER_FAR:
            return ()
        first = int(stds_B.argmax())
        row = int(combination_B[first])
        kind = ", ".join(f"{name}={label}" for name, label in labels.iloc[row].items()) or "any kind"
        mean, std = self.own_K2[row].tolist()
        low, high = np.exp([mean - MOST_STDS * std, mean + MOST_STDS * std])
        return (
            f"{int(far_B.sum()):,} of {len(far_B):,} cells have a library size unlike their kind's, such as "
            f"{float(size_B[first]):,.0f}, where most training cells of {kind} have {low:,.0f} to {high:,.0f}. The "
            "flow is told the nearest of these. Counts have the size that was given",
        )

    def _stds(self, size_B: Tensor, combination_B: Tensor) -> Tensor:
        """How many standard deviations sizes lie from the mean of their kind. 0 is taken as 1."""
        mean_B, std_B = self.own_K2.to(size_B.device, non_blocking=True)[combination_B].unbind(1)
        return (size_B.double().clamp_min(1).log() - mean_B) / std_B.clamp_min(1e-3)
