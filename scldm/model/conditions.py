"""How the diffusion transformer is told a condition, besides the plain table of a vector per label.

Reading order: ValueEmbedding (continuous conditions), SizeEmbedding (library sizes), FeatureEmbedding (labels known by
vectors), CombinationTokens, ConditionMeans.
"""

from __future__ import annotations

import math

import numpy as np
import scipy.sparse as sp
import torch
from scipy.sparse.linalg import splu
from torch import Tensor, nn

from scldm.errors import InputError

VALUE_SCALES = ("linear", "log")
FEW_CELLS = 10  # a mean of n cells counts n / (n + 10) where shifts are fitted
INTERACTION_BYTES = 2**28  # that interactions may take: of 65,536 combinations with latents of 64 x 16
FREQUENCIES = (0.5, 1.0, 2.0)  # of sines and cosines over the standardised value, whose training labels lie within +-2


class ValueEmbedding(nn.Module):
    """A number such as a dose or a time. Values between those of training are between them here too.

    values_K: the numbers that the training labels are
    scale: linear, or log: log(1 + x / smallest positive label), so that 0 has a place

    Raises: InputError where the labels are one number only, or negative on a log scale.
    """

    values_K: Tensor

    def __init__(self, values_K: Tensor, scale: str, width: int) -> None:
        super().__init__()
        self.scale = scale
        self.register_buffer("values_K", values_K.float().clone())
        if scale == "log" and (values_K < 0).any():
            raise InputError(f"model.continuous: value {values_K.min():g} has no logarithm. Use linear")
        if len(values_K) and values_K.min() == values_K.max():
            raise InputError(f"model.continuous: all labels are {values_K[0]:g}. There is nothing to learn from")
        self.mlp = _mlp(width)
        self.not_given = nn.Embedding(1, width)

    def forward(self, value_B: Tensor) -> Tensor:
        """(B, D). NaN is "not given"."""
        hidden = value_B.isnan()
        features = _waves(self._standardised(value_B.masked_fill(hidden, 0.0)))
        return torch.where(hidden[:, None], self.not_given.weight, self.mlp(features.to(self.not_given.weight.dtype)))

    def label_ids(self, value_B: Tensor) -> Tensor:
        """The label of each value, (B,) int64. The number of labels where none has it."""
        same_BK = value_B[:, None] == self.values_K
        return torch.where(same_BK.any(1), same_BK.int().argmax(1), len(self.values_K))

    def _standardised(self, value: Tensor) -> Tensor:
        known, x = self._scaled(self.values_K), self._scaled(value)
        return (x - known.mean()) / known.std(unbiased=False)

    def _scaled(self, value: Tensor) -> Tensor:
        if self.scale == "linear":
            return value
        return torch.log1p(value / self.values_K[self.values_K > 0].min())


class SizeEmbedding(nn.Module):
    """A cell's library size, by its logarithm.

    log_moments: mean and standard deviation of the log library size over training cells, (2,)
    """

    log_moments: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("log_moments", torch.arange(2.0))
        self.mlp = _mlp(width)

    def forward(self, size_B: Tensor) -> Tensor:
        """(B, D). A cell without counts is told as one of a single count."""
        mean, std = self.log_moments
        features = _waves((size_B.float().clamp_min(1).log() - mean) / std)
        return self.mlp(features.to(self.log_moments.dtype))


def _mlp(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(1 + 2 * len(FREQUENCIES), width), nn.SiLU(), nn.Linear(width, width))


def _waves(x_B: Tensor) -> Tensor:
    """A standardised number, its sines and cosines, (B, 1 + 2 * frequencies)."""
    x_B1 = x_B[:, None]
    angles = [frequency * math.pi / 2 * x_B1 for frequency in FREQUENCIES]
    return torch.cat([x_B1, *map(torch.sin, angles), *map(torch.cos, angles)], dim=1)


class FeatureEmbedding(nn.Module):
    """A label known by a vector of numbers (a gene's or a drug's), so that labels never trained have a place too.

    features_KF: a row for each label. Columns are standardised here
    """

    features_KF: Tensor

    def __init__(self, features_KF: Tensor, width: int) -> None:
        super().__init__()
        self.register_buffer("features_KF", features_KF.float().clone())
        self.linear = nn.Linear(features_KF.shape[1], width)
        self.not_given = nn.Embedding(1, width)

    def forward(self, id_B: Tensor) -> Tensor:
        """(B, D). The id after the last label is "not given"."""
        n, F = self.features_KF.shape
        mean_F, std_F = self.features_KF.mean(0), self.features_KF.std(0, unbiased=False)
        # divided by the root of F as well: the sum over columns then has the scale of a learnt embedding's start
        features_BF = (self.features_KF[id_B.clamp_max(n - 1)] - mean_F) / std_F.clamp_min(1e-6) / math.sqrt(F)
        return torch.where((id_B == n)[:, None], self.not_given.weight, self.linear(features_BF))


class CombinationTokens(nn.Module):
    """The combinations of all conditions that training cells had, and a vector for each, if asked for.

    labels_KC: label ids of each combination
    interaction_KLZ: by how much each one's mean of standardised latents differs from the sum of its labels' shifts, as
        measured. None without `latent_shape`, as where they would take too much
    cells_K: training cells that it was measured on, 0 before
    noise: so many cells say as much as is usual for an interaction: the variance within combinations over that between
    """

    labels_KC: Tensor
    interaction_KLZ: Tensor | None
    cells_K: Tensor
    noise: Tensor

    def __init__(
        self,
        labels_KC: Tensor,
        n_labels: tuple[int, ...],
        width: int,
        tokens: bool,
        latent_shape: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.n_labels, labels_KC = n_labels, labels_KC.to(torch.int64)
        for column in reversed(range(len(n_labels))):  # sorted by the first condition, then the second, and so on
            labels_KC = labels_KC[labels_KC[:, column].argsort(stable=True)]
        self.register_buffer("labels_KC", labels_KC)
        K = len(labels_KC)
        self.register_buffer("interaction_KLZ", None if latent_shape is None else torch.zeros(K, *latent_shape))
        if latent_shape is not None:
            self.register_buffer("cells_K", torch.zeros(K))
            self.register_buffer("noise", torch.tensor(float(FEW_CELLS)))
        if tokens:
            self.embedding = nn.Embedding(len(labels_KC) + 1, width, padding_idx=len(labels_KC))

    @torch.no_grad()
    def fit(self, index_K: Tensor, n_K: Tensor, mean_KLZ: Tensor, sum_KLZ: Tensor, variance: float) -> None:
        """What labels do together, of the combinations at `index_K`. The others are not known.

        index_K: int64. n_K: cells. mean_KLZ: of standardised latents. sum_KLZ: of the labels' shifts
        variance: of cells within combinations, summed over L and Z
        """
        if self.interaction_KLZ is None:
            return
        self.interaction_KLZ.zero_()
        self.cells_K.zero_()
        self.noise.fill_(FEW_CELLS)
        self.interaction_KLZ[index_K] = (mean_KLZ - sum_KLZ).float()
        self.cells_K[index_K] = n_K.float()
        # the fit of the sum takes as many numbers as there are labels, less one for each condition but the first
        n_labels = sum(len(column.unique()) for column in self.labels_KC[index_K].T)
        n_free = len(index_K) - (n_labels - len(self.n_labels) + 1)
        if n_free <= 0:
            return
        square = float(self.interaction_KLZ[index_K].double().square().sum((1, 2)).sum()) / n_free
        between = square - variance * float((1 / n_K).mean())
        self.noise.fill_(min(variance / max(between, 1e-9), 1e9))

    def forward(self, label_ids_BC: Tensor, with_token_B: Tensor | None) -> Tensor:
        """(B, D). 0 for a combination that was not trained, or where a condition is not given."""
        index_B = self.index(label_ids_BC)
        if with_token_B is not None:
            index_B = index_B.masked_fill(~with_token_B, len(self.labels_KC))
        return self.embedding(index_B)

    def index(self, label_ids_BC: Tensor) -> Tensor:
        """Which of the trained combinations each row is, (B,) int64. Their number where it is none.

        Condition after condition, a row is known by the first combination that has the same labels so far. So its
        number stays small however many conditions and labels there are.
        """
        B, K = len(label_ids_BC), len(self.labels_KC)
        row_B = torch.zeros(B, dtype=torch.int64, device=label_ids_BC.device)
        if not K:
            return row_B
        row_K, known_B = row_B.new_zeros(K), torch.ones_like(row_B, dtype=torch.bool)
        for column, n in enumerate(self.n_labels):
            code_K = row_K * (n + 1) + self.labels_KC[:, column]  # ascending, as the combinations are sorted
            code_B = row_B * (n + 1) + label_ids_BC[:, column]
            row_K, row_B = (torch.searchsorted(code_K, code).clamp_max(K - 1) for code in (code_K, code_B))
            known_B = known_B & (code_K[row_B] == code_B)
        return torch.where(known_B, row_B, K)

    def trained_parts(self, label_ids_BC: Tensor, given_BC: Tensor) -> list[frozenset[frozenset[int]]]:
        """For each row the sets of given conditions, by position, whose labels some training cell had together. A label
        that none had at all, as one known by its features, counts as if all had it: no part leaves it out for that."""
        known: dict[tuple, frozenset[frozenset[int]]] = {}
        parts, labels_KC = [], self.labels_KC.cpu()
        for ids, given in zip(label_ids_BC.tolist(), given_BC.tolist(), strict=True):
            key = (*ids, *given)
            if key not in known:
                same_KC = labels_KC == torch.tensor(ids)
                same_KC = (same_KC | ~same_KC.any(0)) & torch.tensor(given)
                known[key] = _closed({frozenset(row.nonzero()[:, 0].tolist()) for row in same_KC.unique(dim=0)})
            parts.append(known[key])
        return parts


class ConditionMeans(nn.Module):
    """By how much each label shifts the mean of standardised latents, (labels, L, Z) a condition. 0 until fitted.

    fitted: positions of the conditions that have shifts: those of plain labels. A value or a vector never trained would
        have none, unlike its neighbours
    """

    def __init__(self, n_labels: dict[str, int], fitted: list[int], latent_shape: tuple[int, int]) -> None:
        super().__init__()
        self.names = {k: name for k, name in enumerate(n_labels) if k in fitted}
        for k, name in self.names.items():
            # the row after the last label, "not given", stays 0
            self.register_buffer(f"shift_{k}", torch.zeros(n_labels[name] + 1, *latent_shape))
            self.register_buffer(f"has_shift_{k}", torch.zeros(n_labels[name] + 1, dtype=torch.bool))

    def forward(self, conditions: dict[str, Tensor]) -> Tensor | float:
        """The sum of the shifts of what is given, (B, L, Z)."""
        return sum((self.get_buffer(f"shift_{k}")[conditions[name]] for k, name in self.names.items()), start=0.0)

    def fit(self, labels_KC: Tensor, n_K: Tensor, mean_KLZ: Tensor) -> None:
        """Shifts that together come nearest to the means of trained combinations, by least squares. Each combination
        counts once, but less where it has few cells (`FEW_CELLS`). A shift is drawn to 0 as by one tenth of a
        combination. A label of none of these combinations has no shift.

        labels_KC: label ids of all conditions. n_K: cells. mean_KLZ: of standardised latents
        """
        sizes = [len(self.get_buffer(f"shift_{k}")) for k in self.names]
        column_KC = np.stack([labels_KC[:, k].numpy() for k in self.names], 1) + np.cumsum([0, *sizes[:-1]])
        n, C = column_KC.shape
        of_label = sp.csr_matrix((np.ones(n * C), column_KC.ravel(), np.arange(n + 1) * C), shape=(n, sum(sizes)))
        weighted = sp.diags_array((n_K / (n_K + FEW_CELLS)).double().numpy()) @ of_label
        normal = sp.csc_matrix(of_label.T @ weighted + 0.1 * sp.eye_array(sum(sizes)))
        shift = splu(normal).solve(weighted.T @ mean_KLZ.flatten(1).double().numpy())
        seen = np.asarray(of_label.sum(0)).ravel() > 0
        ends = np.cumsum(sizes)[:-1]
        for k, of, has in zip(self.names, np.split(shift, ends), np.split(seen, ends), strict=True):
            buffer = self.get_buffer(f"shift_{k}")
            buffer.copy_(torch.from_numpy(of).view_as(buffer))
            self.get_buffer(f"has_shift_{k}").copy_(torch.from_numpy(has))


def _closed(largest: set[frozenset[int]]) -> frozenset[frozenset[int]]:
    """All parts of some sets, the empty one too."""
    parts: set[frozenset[int]] = {frozenset()}
    waiting = list(largest)
    while waiting:
        part = waiting.pop()
        if part not in parts:
            parts.add(part)
            waiting += [part - {element} for element in part]
    return frozenset(parts)
