"""Counts drawn by address: that of a cell's gene depends on its key alone (`draws.keys`), not on what is drawn with it.

All of it is tensor operations in float64, on any device: no generator, no loop over cells. A negative binomial is a
Poisson number of logarithmic ones (Quenouille 1949), so that most genes of a cell, which have none, cost one
comparison. Where that number is large, it is a Poisson draw whose rate is a gamma draw.
The host waits for a GPU wherever it is asked which elements are left. So there several tries, or terms, are computed
before that is asked: the counts are the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from scldm.draws import bits_of, uniform_of

DRAWS_VERSION = 2  # 1: NumPy generators, one a cell. Files of another version are not continued
MAX_RATE = 1e9  # counts stay below 2^31
SERIES_BELOW = 1.5  # Poisson numbers of a series
INVERTED_BELOW = 10.0  # Poisson rates. From there Hoermann's rejection is valid
# which of a key's uniform draws are whose
_NUMBER, _DROPOUT, _NORMAL, _SERIES, _REJECTED, _BOOST, _GAMMA = 0, 1, 2, 1 << 10, 1 << 20, 1 << 30, 1 << 31


def poisson(rate: Tensor, keys: Tensor) -> Tensor:
    """Counts from Poisson(rate), float64, of the keys' shape."""
    rate = rate.clamp(0, MAX_RATE).expand_as(keys)
    some = _perhaps_positive(rate, keys, INVERTED_BELOW)
    return _scattered(keys, some, _poisson(rate[some].double(), keys[some]))


def negative_binomial(mu: Tensor, theta: Tensor, keys: Tensor) -> Tensor:
    """Counts from NB(mean mu, inverse dispersion theta), float64, of the keys' shape."""
    mu, theta = mu.expand_as(keys), theta.expand_as(keys)
    some = _perhaps_positive(torch.log1p(mu / theta) * theta, keys, SERIES_BELOW)
    mu_N, theta_N, keys_N = mu[some].double(), theta[some].double(), keys[some]
    log_scale_N = torch.log1p(mu_N / theta_N)
    rate_N = theta_N * log_scale_N
    series = (rate_N < SERIES_BELOW).nonzero()[:, 0]
    number = _inverted(rate_N[series], uniform_of(keys_N[series], _NUMBER))
    counts_N = torch.empty_like(rate_N)
    counts_N[series] = _logarithmic_sum(log_scale_N[series], number.long(), keys_N[series])
    large = (rate_N >= SERIES_BELOW).nonzero()[:, 0]
    gamma = _gamma(theta_N[large], keys_N[large]) * (mu_N[large] / theta_N[large])
    counts_N[large] = _poisson(gamma.clamp_max(MAX_RATE), keys_N[large])
    return _scattered(keys, some, counts_N)


def zero_inflated(counts: Tensor, dropout: Tensor, keys: Tensor) -> Tensor:
    """The counts, or 0 with probability sigmoid(dropout)."""
    return counts.where(uniform_of(keys, _DROPOUT) >= torch.sigmoid(dropout.double()), 0.0)


def gaussian(mean: Tensor, std: Tensor, scale_B: Tensor, keys: Tensor) -> Tensor:
    """The integers nearest to scale x expm1(a normal draw, 0 where it is negative), float64.

    scale_B: total count of a cell over that to which values are scaled
    """
    values = mean.double() + std.double() * _normal(keys, _NORMAL)
    return (torch.expm1(values.clamp(0, 20)) * scale_B.double()[:, None]).clamp_max(MAX_RATE).round()


# --- how -----------------------------------------------------------------------------------------------------------


def _perhaps_positive(rate: Tensor, keys: Tensor, below: float) -> tuple[Tensor, ...]:
    """Where a Poisson number of the keys' draw _NUMBER is not surely 0: the indices, from 24 bits of the draw and in
    the precision that the rate has. All that follows is for these alone."""
    least = (bits_of(keys, _NUMBER) >> 40).bitwise_and_(0xFFFFFF).to(rate.dtype).mul_(2.0**-24)
    above = 1 - torch.exp(-rate)
    return ((least <= above * (1 + 1e-5) + 1e-7) | (rate > 0.99 * below)).nonzero(as_tuple=True)


def _scattered(keys: Tensor, at: tuple[Tensor, ...], counts_N: Tensor) -> Tensor:
    """The counts where they belong, elsewhere 0."""
    counts = torch.zeros(keys.shape, dtype=torch.float64, device=keys.device)
    counts[at] = counts_N
    return counts


def _poisson(rate_N: Tensor, keys_N: Tensor) -> Tensor:
    small, large = ((rate_N < INVERTED_BELOW) == is_small for is_small in (True, False))
    small, large = small.nonzero()[:, 0], large.nonzero()[:, 0]
    counts_N = torch.empty_like(rate_N)
    counts_N[small] = _inverted(rate_N[small], uniform_of(keys_N[small], _NUMBER))
    counts_N[large] = _rejected(rate_N[large], keys_N[large])
    return counts_N


def _inverted(rate_N: Tensor, v_N: Tensor) -> Tensor:
    """Poisson(rate) of a uniform draw v: of how many k it lies below P(more than k)."""
    counts_N, k = torch.zeros_like(rate_N), 0
    p_N, above_N = torch.exp(-rate_N), -torch.expm1(-rate_N)
    left = (v_N < above_N).nonzero()[:, 0]
    rate_N, v_N, p_N, above_N = (x[left] for x in (rate_N, v_N, p_N, above_N))
    n_terms = _before_asking(rate_N).terms
    while len(left):
        beyond, count_N = torch.ones_like(v_N, dtype=torch.bool), torch.full_like(v_N, k)
        for _ in range(n_terms):
            k += 1
            count_N += beyond
            p_N = p_N * rate_N / k
            above_N = above_N - p_N
            # p is 0 in the end, while rounding may leave something above
            beyond = beyond & (v_N < above_N) & (p_N > 0)
        counts_N.index_copy_(0, left, count_N)
        more = beyond.nonzero()[:, 0]
        left, rate_N, v_N, p_N, above_N = (x[more] for x in (left, rate_N, v_N, p_N, above_N))
        n_terms *= 2 if n_terms > 1 else 1
    return counts_N


def _logarithmic_sum(log_scale_N: Tensor, number_N: Tensor, keys_N: Tensor) -> Tensor:
    """The sum of `number` draws with P(k) = q^k / (k log(1 / (1 - q))), k >= 1, where log(1 / (1 - q)) = log_scale: of
    geometric ones whose q is drawn, and at most this q. Source: Kemp 1981, algorithm LK with its shortcut."""
    of_M = torch.repeat_interleave(number_N)
    first_N = number_N.cumsum(0) - number_N
    k_M = _SERIES + 2 * (torch.arange(len(of_M), device=keys_N.device) - first_N[of_M])
    v_M = uniform_of(keys_N[of_M], k_M)
    more = (v_M < -torch.expm1(-log_scale_N)[of_M]).nonzero()[:, 0]  # else below every q: a draw of 1
    of, v, k = of_M[more], v_M[more], k_M[more]
    log_q = _log1mexp(uniform_of(keys_N[of], k + 1) * log_scale_N[of])
    beyond = torch.floor(torch.log(v) / log_q).clamp_max(MAX_RATE)
    return number_N.double().index_add_(0, of, beyond).clamp_max(MAX_RATE)


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(-x)) for x > 0."""
    return torch.where(x < math.log(2), torch.log(-torch.expm1(-x)), torch.log1p(-torch.exp(-x)))


def _rejected(rate_N: Tensor, keys_N: Tensor) -> Tensor:
    """Poisson(rate) for rates of 10 or more. Source: Hoermann 1993, algorithm PTRS."""

    def attempt(left: Tensor, tries: Tensor) -> tuple[Tensor, Tensor]:
        rate, keys, k = rate_N[left], keys_N[left], _REJECTED + 2 * tries
        b = 0.931 + 2.53 * rate.sqrt()
        a = -0.059 + 0.02483 * b
        u, v = uniform_of(keys, k) - 0.5, uniform_of(keys, k + 1)
        from_edge = 0.5 - u.abs()
        count = torch.floor((2 * a / from_edge + b) * u + rate + 0.43)
        log_hat = torch.log(v * (1.1239 + 1.1328 / (b - 3.4)) / (a / from_edge.square() + b))
        log_p = count * rate.log() - rate - torch.lgamma(count.clamp_min(0) + 1)
        return count, (count >= 0) & (log_hat <= log_p)

    return _first_accepted(attempt, rate_N)


def _gamma(shape_N: Tensor, keys_N: Tensor) -> Tensor:
    """Gamma(shape, 1). Source: Marsaglia & Tsang 2000, shapes below 1 by one above (their section 6)."""
    below = shape_N < 1
    d_N = shape_N + below.double() - 1 / 3

    def attempt(left: Tensor, tries: Tensor) -> tuple[Tensor, Tensor]:
        d, keys, k = d_N[left], keys_N[left], _GAMMA + 3 * tries
        x = _normal(keys, k)
        v = (1 + x / (9 * d).sqrt()) ** 3
        log_u = torch.log(uniform_of(keys, k + 2))
        return d * v, (v > 0) & (log_u < x.square() / 2 + d * (1 - v + torch.log(v.clamp_min(1e-300))))

    out_N = _first_accepted(attempt, shape_N)
    return torch.where(below, out_N * uniform_of(keys_N, _BOOST) ** (1 / shape_N), out_N)


def _first_accepted(attempt: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], like_N: Tensor) -> Tensor:
    """What the first accepted of each element's tries gives, (N,): the same however many are made at a time.

    attempt: from elements (M,) and numbers of tries (T, 1) to values and whether they are accepted, (T, M)
    """
    out_N, n_tries = torch.empty_like(like_N), _before_asking(like_N).tries
    left, tries = (torch.arange(n, device=like_N.device) for n in (len(like_N), n_tries))
    while len(left):
        value_TM, accepted_TM = attempt(left, tries[:, None])
        first_M = accepted_TM.int().argmax(0)
        out_N.index_copy_(0, left, value_TM.gather(0, first_M[None])[0])  # where none is accepted, for the time being
        left, tries = left[(~accepted_TM.any(0)).nonzero()[:, 0]], tries + n_tries
    return out_N


class _Ahead(NamedTuple):
    """tries: of a rejection. terms: of an inversion, twice as many each time."""

    tries: int
    terms: int


def _before_asking(like: Tensor) -> _Ahead:
    """How much is computed before it is asked which elements are left. At .75 a try, one in 65,536 is after eight."""
    return _Ahead(1, 1) if like.device.type == "cpu" else _Ahead(8, 4)


def _normal(keys: Tensor, k: int | Tensor) -> Tensor:
    """Standard normal, by Box-Muller from a key's draws k and k + 1."""
    radius = (-2 * torch.log(uniform_of(keys, k))).sqrt()
    return radius * torch.cos(2 * math.pi * uniform_of(keys, k + 1))
