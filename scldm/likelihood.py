"""Likelihoods of a gene's counts. `log_prob` is log p in nats, in float32 whatever the precision around it, or float64.

Counts are integers >= 0, means mu and inverse dispersions theta > 0. For mu and theta from 1e-8 to 1e8 and counts up
to 1e6 everything is finite, gradients too.
Counts are drawn in `count_draws.py`.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

LikelihoodKind = Literal["nb", "zinb", "poisson", "gaussian"]

MIN_MEAN = 1e-30  # a mean of exactly 0 has no logarithm. float32's smallest normal number is 1e-38
STIRLING_FROM = 1e3  # there, the first two terms of Stirling's series err by less than 1 / (360 theta^3) = 3e-12
NORMALISED_TO = 1e4  # total count to which the values of the Gaussian likelihood are scaled


def at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def nb_log_prob(counts_BQ: Tensor, mu_BQ: Tensor, theta_Q: Tensor) -> Tensor:
    """Log NB(counts; mean mu, inverse dispersion theta), (B, Q). The variance is mu + mu^2 / theta.

    Source: Lopez et al. 2018 (scVI), eq. 2 and supplement. The difference of log-gammas is taken by Stirling's series
    for large theta, where subtracting them in float32 would leave noise.
    """
    mu_BQ, theta_Q = at_least_float32(mu_BQ).clamp_min(MIN_MEAN), at_least_float32(theta_Q)
    counts_BQ = counts_BQ.to(mu_BQ.dtype)
    # log(theta / mu): through softplus neither a probability near 1 nor a large count costs the gradient its digits
    log_odds_BQ = theta_Q.log() - mu_BQ.log()
    failures = theta_Q * _softplus(-log_odds_BQ) + counts_BQ * _softplus(log_odds_BQ)
    return _log_rising(counts_BQ, theta_Q.expand_as(counts_BQ)) - torch.lgamma(counts_BQ + 1) - failures


def zinb_log_prob(counts_BQ: Tensor, mu_BQ: Tensor, theta_Q: Tensor, dropout_BQ: Tensor) -> Tensor:
    """Log of a mixture, (B, Q): 0 with probability sigmoid(dropout), else NB(mu, theta). Source: as `nb_log_prob`."""
    dropout_BQ = at_least_float32(dropout_BQ)
    log_nb_BQ = nb_log_prob(counts_BQ, mu_BQ, theta_Q)
    zero_BQ = torch.logaddexp(dropout_BQ, log_nb_BQ)
    return torch.where(counts_BQ == 0, zero_BQ, log_nb_BQ) - _softplus(dropout_BQ)


def poisson_log_prob(counts_BQ: Tensor, mu_BQ: Tensor) -> Tensor:
    """Log Poisson(counts; mu), (B, Q)."""
    mu_BQ = at_least_float32(mu_BQ).clamp_min(MIN_MEAN)
    counts_BQ = counts_BQ.to(mu_BQ.dtype)
    return counts_BQ * mu_BQ.log() - mu_BQ - torch.lgamma(counts_BQ + 1)


def gaussian_log_prob(values_BQ: Tensor, mean_BQ: Tensor, log_std_Q: Tensor) -> Tensor:
    """Log density of N(mean, std^2), (B, Q). std is the same in every cell."""
    mean_BQ, log_std_Q = at_least_float32(mean_BQ), at_least_float32(log_std_Q)
    standardised = (values_BQ - mean_BQ) * torch.exp(-log_std_Q)
    return -0.5 * standardised.square() - log_std_Q - 0.5 * math.log(2 * math.pi)


def normalised(counts_BQ: Tensor, library_size_B: Tensor) -> Tensor:
    """What the Gaussian likelihood judges: log1p of counts scaled to a total of 10,000, (B, Q)."""
    return torch.log1p(counts_BQ * (NORMALISED_TO / library_size_B.clamp_min(1.0))[:, None])


def _softplus(x: Tensor) -> Tensor:
    return F.softplus(x, threshold=50.0)  # torch's own threshold of 20 errs by 2e-9


def _log_rising(counts: Tensor, theta: Tensor) -> Tensor:
    """log Gamma(counts + theta) - log Gamma(theta), without cancellation for theta up to 1e8."""
    large = theta > STIRLING_FROM
    small_theta, large_theta = theta.where(~large, 1.0), theta.where(large, STIRLING_FROM)
    exact = torch.lgamma(counts + small_theta) - torch.lgamma(small_theta)
    total = large_theta + counts
    series = (
        (large_theta - 0.5) * torch.log1p(counts / large_theta)
        + counts * (total.log() - 1)
        + (1 / total - 1 / large_theta) / 12
    )
    return torch.where(large, series, exact)
