"""What the autoencoder says of a cell: where its latent tokens lie, and a distribution for each asked gene's count.

Tuples: an engine that shards weights looks for tensors in what a network returns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from scldm import count_draws
from scldm.batch import GeneCounts
from scldm.likelihood import (
    NORMALISED_TO,
    LikelihoodKind,
    gaussian_log_prob,
    nb_log_prob,
    normalised,
    poisson_log_prob,
    zinb_log_prob,
)

MOST_ODDS = 15.0  # log odds of zero inflation beyond which a mean is not made up for it: a count in three million


class Posterior(NamedTuple):
    """q(latent | cell): a diagonal Gaussian, or a point where `log_var_BLZ` is None."""

    mean_BLZ: Tensor
    log_var_BLZ: Tensor | None

    def sample(self, noise_BLZ: Tensor | None) -> Tensor:
        """mean + std * noise. The mean itself for a point, or without noise."""
        if self.log_var_BLZ is None or noise_BLZ is None:
            return self.mean_BLZ
        return self.mean_BLZ + torch.exp(0.5 * self.log_var_BLZ) * noise_BLZ

    def kl_B(self) -> Tensor:
        """KL(q || N(0, I)) in nats per cell, (B,). 0 for a point, where it is not part of the loss."""
        if self.log_var_BLZ is None:
            return self.mean_BLZ.new_zeros(len(self.mean_BLZ))
        mean, log_var = self.mean_BLZ.float(), self.log_var_BLZ.float()
        return 0.5 * (mean.square() + log_var.exp() - 1 - log_var).sum((1, 2))


class Predicted(NamedTuple):
    """p(counts | latent) of the asked genes, in float32.

    likelihood: its kind, on which the other fields depend
    value_BQ: log of a gene's share of the asked genes' expected total count, -inf at padding. gaussian: mean of its
        value, log1p of counts scaled to 10,000 over all genes of the cell
    dispersion: (Q,) or (B, Q): nb and zinb: inverse dispersion theta. gaussian: standard deviation. poisson: None
    dropout_BQ: zinb: log odds of a zero besides the negative binomial's. Else None
    """

    likelihood: LikelihoodKind
    value_BQ: Tensor
    dispersion: Tensor | None = None
    dropout_BQ: Tensor | None = None

    def expected(self, library_size_B: Tensor) -> Tensor:
        """Mean of a gene's count, (B, Q): share x library size. That is the total over the asked genes, or over those
        that shares are of. For gaussian it is the mean of a normal value, which counts as 0 where it is negative,
        scaled back from the cell's whole total.
        """
        if self.likelihood != "gaussian":
            return self.value_BQ.exp() * library_size_B[:, None]
        assert self.dispersion is not None
        z_BQ, std = self.value_BQ / self.dispersion, self.dispersion
        above_BQ = (self.value_BQ + std.square() / 2).clamp_max(20).exp() * torch.special.ndtr(z_BQ + std)
        return (above_BQ - torch.special.ndtr(z_BQ)).clamp_min(0) * (library_size_B[:, None] / NORMALISED_TO)

    def mu(self, library_size_B: Tensor) -> Tensor:
        """Mean of the negative binomial or Poisson, (B, Q). zinb: larger than the expected count, by what zero
        inflation takes away, so that expected counts sum to the library size."""
        expected_BQ = self.expected(library_size_B)
        return (
            expected_BQ if self.dropout_BQ is None else expected_BQ * (1 + self.dropout_BQ.clamp_max(MOST_ODDS).exp())
        )

    def log_prob_BQ(self, counts_BQ: Tensor, library_size_B: Tensor) -> Tensor:
        """Log p of every gene's count in nats, (B, Q). gaussian: log density of its value."""
        dispersion, dropout_BQ = self.dispersion, self.dropout_BQ
        if self.likelihood == "gaussian":
            assert dispersion is not None
            log_prob_BQ = gaussian_log_prob(normalised(counts_BQ, library_size_B), self.value_BQ, dispersion.log())
            # a cell without a count has no profile. The other likelihoods expect 0 of it, and lose nothing
            return log_prob_BQ * (library_size_B > 0)[:, None]
        mu_BQ = self.mu(library_size_B)
        if self.likelihood == "poisson":
            return poisson_log_prob(counts_BQ, mu_BQ)
        assert dispersion is not None
        if self.likelihood == "nb":
            return nb_log_prob(counts_BQ, mu_BQ, dispersion)
        assert dropout_BQ is not None
        return zinb_log_prob(counts_BQ, mu_BQ, dispersion, dropout_BQ)

    def nll_B(self, asked: GeneCounts, library_size_B: Tensor) -> Tensor:
        """Reconstruction error of a cell, (B,): -log p summed over its asked genes, in nats."""
        return -(self.log_prob_BQ(asked.counts_BS, library_size_B) * asked.mask).sum(1)

    def take(self, columns_K: Tensor) -> Predicted:
        """Of some of the asked genes, which the cells share. Shares stay those of the same total."""
        dispersion, dropout_BQ = self.dispersion, self.dropout_BQ
        return Predicted(
            self.likelihood,
            self.value_BQ[:, columns_K],
            None if dispersion is None else dispersion[columns_K],
            None if dropout_BQ is None else dropout_BQ[:, columns_K],
        )

    def sample(self, library_size_B: Tensor, keys_BQ: Tensor) -> Tensor:
        """Counts drawn for each cell's gene by its key (`draws.keys`), (B, Q) int32. Cells share the asked genes."""
        if self.likelihood == "gaussian":
            assert self.dispersion is not None
            scale_B = library_size_B / NORMALISED_TO
            return count_draws.gaussian(self.value_BQ, self.dispersion, scale_B, keys_BQ).int()
        mu_BQ = self.mu(library_size_B)
        if self.likelihood == "poisson":
            return count_draws.poisson(mu_BQ, keys_BQ).int()
        assert self.dispersion is not None
        counts_BQ = count_draws.negative_binomial(mu_BQ, self.dispersion, keys_BQ)
        if self.dropout_BQ is not None:
            counts_BQ = count_draws.zero_inflated(counts_BQ, self.dropout_BQ, keys_BQ)
        return counts_BQ.int()
