"""The likelihood of raw counts. `log_prob` is always log p in nats, in float32 whatever the precision around it.

Reading order: nb_log_prob, nb_sample.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

MIN_MEAN = 1e-30  # a mean of exactly 0 has no logarithm; float32's smallest normal number is 1e-38
STIRLING_FROM = 1e3  # there, the first two terms of Stirling's series err by less than 1 / (360 theta^3) = 3e-12


def nb_log_prob(counts_BQ: Tensor, mu_BQ: Tensor, theta_Q: Tensor) -> Tensor:
    """Log NB(counts; mean mu, inverse dispersion theta) in nats, (B, Q), float32; variance mu + mu^2 / theta.

    For integer counts >= 0 and mu, theta > 0. Source: Lopez et al. 2018 (scVI), eq. 2 and supplement; the difference of
    log-gammas is taken by Stirling's series for large theta, where subtracting them in float32 would leave noise.
    """
    mu_BQ, theta_Q = at_least_float32(mu_BQ).clamp_min(MIN_MEAN), at_least_float32(theta_Q)
    counts_BQ = counts_BQ.to(mu_BQ.dtype)
    log_theta_plus_mu = torch.log(theta_Q + mu_BQ)
    rising = _log_rising(counts_BQ, theta_Q.expand_as(counts_BQ))
    zeros = -theta_Q * torch.log1p(mu_BQ / theta_Q)
    return rising - torch.lgamma(counts_BQ + 1) + zeros + counts_BQ * (mu_BQ.log() - log_theta_plus_mu)


def at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


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


def nb_sample(mu_Q: np.ndarray, theta_Q: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One cell's counts from NB(mu, theta), int64 (Q,): a Poisson whose rate is Gamma(theta, mu / theta)."""
    return rng.poisson(rng.gamma(theta_Q, mu_Q / theta_Q))
