"""Counts drawn by address: that of a cell's gene depends on its key alone (`draws.keys`), not on what is drawn with it.

All of it is tensor operations in float64, on any device: no generator, no loop over cells. A negative binomial is a
Poisson number of logarithmic ones (Quenouille 1949), so that most genes of a cell, which have none, cost one
comparison. Where that number is large, it is a Poisson draw whose rate is a gamma draw.
A CPU splits elements by how they are drawn, which saves it work. The host would wait for a GPU at every split. So
there each element is drawn in every way, with a few tries each. Those for which they do not suffice stay NaN, and they
alone are drawn again with more tries. But for rounding, the counts are the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from scldm.draws import bits_of, uniform_of

DRAWS_VERSION = 2  # 1: NumPy generators, one a cell. Files of another version are not continued
MAX_RATE = 1e9  # counts stay below 2^31
SERIES_BELOW = 1.5  # Poisson numbers of a series
INVERTED_BELOW = 10.0  # Poisson rates. From there Hoermann's rejection is valid
TRIES, MORE = 8, 2  # on a GPU: tries of all elements, and how many times as many those have that are left
# which of a key's uniform draws are whose
_NUMBER, _DROPOUT, _NORMAL, _SERIES, _REJECTED, _BOOST, _GAMMA = 0, 1, 2, 1 << 10, 1 << 20, 1 << 30, 1 << 31


def poisson(rate: Tensor, keys: Tensor) -> Tensor:
    """Counts from Poisson(rate), float64, of the keys' shape."""
    rate = rate.clamp(0, MAX_RATE).expand_as(keys)
    some = _perhaps_positive(rate, keys, INVERTED_BELOW)
    return _scattered(keys, some, _drawn(_poisson, rate[some].double(), keys[some]))


def negative_binomial(mu: Tensor, theta: Tensor, keys: Tensor) -> Tensor:
    """Counts from NB(mean mu, inverse dispersion theta), float64, of the keys' shape."""
    mu, theta = mu.expand_as(keys), theta.expand_as(keys)
    some = _perhaps_positive(torch.log1p(mu / theta) * theta, keys, SERIES_BELOW)
    return _scattered(keys, some, _drawn(_negative_binomial, mu[some].double(), theta[some].double(), keys[some]))


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


def _drawn(draw: Callable[..., Tensor], *of_N: Tensor) -> Tensor:
    """Counts of all elements, (N,).

    draw: from some elements' tensors, and a number of tries, to counts. NaN where it does not suffice. Where it is
        None, they are drawn to the end
    """
    n_tries = _tries(of_N[0])
    counts_N = draw(*of_N, n_tries)
    if n_tries is None:
        return counts_N
    left = counts_N.isnan().nonzero()[:, 0]
    while len(left):
        n_tries *= MORE
        again = draw(*(x[left] for x in of_N), n_tries)
        counts_N[left] = again
        left = left[again.isnan().nonzero()[:, 0]]
    return counts_N


def _tries(x: Tensor) -> int | None:
    return None if x.device.type == "cpu" else TRIES


def _either(
    first_N: Tensor, one: Callable[..., Tensor], other: Callable[..., Tensor], *of_N: Tensor, n_tries: int | None
) -> Tensor:
    """Draws by `one` where first_N, else by `other`. Either is defined for any element."""
    if n_tries is not None:
        return torch.where(first_N, one(*of_N, n_tries), other(*of_N, n_tries))
    counts_N = torch.empty_like(of_N[0])
    for some_N, draw in ((first_N, one), (~first_N, other)):
        at = some_N.nonzero()[:, 0]
        counts_N[at] = draw(*(x[at] for x in of_N), None)
    return counts_N


def _negative_binomial(mu_N: Tensor, theta_N: Tensor, keys_N: Tensor, n_tries: int | None) -> Tensor:
    is_series_N = torch.log1p(mu_N / theta_N) * theta_N < SERIES_BELOW
    return _either(is_series_N, _series, _gamma_poisson, mu_N, theta_N, keys_N, n_tries=n_tries)


def _series(mu_N: Tensor, theta_N: Tensor, keys_N: Tensor, n_tries: int | None) -> Tensor:
    log_scale_N = torch.log1p(mu_N / theta_N)
    rate_N = (theta_N * log_scale_N).clamp_max(SERIES_BELOW)
    number_N = _inverted(rate_N, uniform_of(keys_N, _NUMBER), n_tries)
    return _logarithmic_sum(log_scale_N, number_N, keys_N, n_tries)


def _gamma_poisson(mu_N: Tensor, theta_N: Tensor, keys_N: Tensor, n_tries: int | None) -> Tensor:
    rate_N = _gamma(theta_N, keys_N, n_tries) * (mu_N / theta_N)
    return _poisson(rate_N.clamp_max(MAX_RATE), keys_N, n_tries)


def _poisson(rate_N: Tensor, keys_N: Tensor, n_tries: int | None) -> Tensor:
    return _either(rate_N < INVERTED_BELOW, _small_poisson, _rejected, rate_N, keys_N, n_tries=n_tries)


def _small_poisson(rate_N: Tensor, keys_N: Tensor, n_tries: int | None) -> Tensor:
    most = None if n_tries is None else 3 * n_tries
    return _inverted(rate_N.clamp_max(INVERTED_BELOW), uniform_of(keys_N, _NUMBER), most)


def _inverted(rate_N: Tensor, v_N: Tensor, most: int | None) -> Tensor:
    """Poisson(rate) of a uniform draw v: of how many k it lies below P(more than k). NaN where it is above `most`."""
    p_N, above_N = torch.exp(-rate_N), -torch.expm1(-rate_N)
    beyond_N = v_N < above_N
    # p is 0 in the end, while rounding may leave something above
    if most is not None:
        p_TN = p_N * (rate_N / torch.arange(1, most + 1, device=rate_N.device)[:, None]).cumprod(0)
        beyond_TN = (v_N < above_N - p_TN.cumsum(0)) & (p_TN > 0)
        beyond_TN = torch.cat((beyond_N[None], beyond_TN)).cumprod(0, dtype=torch.int8)
        return beyond_TN.sum(0).double().masked_fill_(beyond_TN[-1] > 0, math.nan)
    counts_N, left, k = torch.zeros_like(rate_N), torch.arange(len(rate_N)), 0
    while True:
        more = beyond_N.nonzero()[:, 0]
        if not len(more):
            return counts_N
        left, rate_N, v_N, p_N, above_N = (x[more] for x in (left, rate_N, v_N, p_N, above_N))
        k += 1
        counts_N.index_fill_(0, left, k)
        p_N = p_N * rate_N / k
        above_N = above_N - p_N
        beyond_N = (v_N < above_N) & (p_N > 0)


def _logarithmic_sum(log_scale_N: Tensor, number_N: Tensor, keys_N: Tensor, n_tries: int | None) -> Tensor:
    """The sum of `number` draws with P(k) = q^k / (k log(1 / (1 - q))), k >= 1, where log(1 / (1 - q)) = log_scale.
    Each is a geometric draw whose own q is drawn, and at most this q. Source: Kemp 1981, algorithm LK with its
    shortcut."""
    most_q_N = -torch.expm1(-log_scale_N)  # a uniform draw above it is above every q: a draw of 1
    if n_tries is not None:
        term_T1 = torch.arange(n_tries, device=keys_N.device)[:, None]
        v_TN = uniform_of(keys_N, _SERIES + 2 * term_T1)
        beyond_TN = _beyond_one(log_scale_N, v_TN, uniform_of(keys_N, _SERIES + 2 * term_T1 + 1))
        is_more_TN = (term_T1 < number_N) & (v_TN < most_q_N)
        return (number_N + beyond_TN.where(is_more_TN, 0.0).sum(0)).clamp_max(MAX_RATE)
    of_M = torch.repeat_interleave(number_N.long())
    first_N = number_N.long().cumsum(0) - number_N.long()
    k_M = _SERIES + 2 * (torch.arange(len(of_M)) - first_N[of_M])
    v_M = uniform_of(keys_N[of_M], k_M)
    more = (v_M < most_q_N[of_M]).nonzero()[:, 0]
    of, v, k = of_M[more], v_M[more], k_M[more]
    beyond = _beyond_one(log_scale_N[of], v, uniform_of(keys_N[of], k + 1))
    return number_N.index_add_(0, of, beyond).clamp_max(MAX_RATE)


def _beyond_one(log_scale: Tensor, v: Tensor, u: Tensor) -> Tensor:
    """By how much a logarithmic draw exceeds 1."""
    return torch.floor(torch.log(v) / _log1mexp(u * log_scale)).clamp_max(MAX_RATE)


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(-x)) for x > 0."""
    return torch.where(x < math.log(2), torch.log(-torch.expm1(-x)), torch.log1p(-torch.exp(-x)))


def _rejected(rate_N: Tensor, keys_N: Tensor, n_tries: int | None) -> Tensor:
    """Poisson(rate) for rates of 10 or more. Source: Hoermann 1993, algorithm PTRS."""
    rate_N = rate_N.clamp_min(INVERTED_BELOW)

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

    return _first_accepted(attempt, rate_N, n_tries)


def _gamma(shape_N: Tensor, keys_N: Tensor, n_tries: int | None) -> Tensor:
    """Gamma(shape, 1). Source: Marsaglia & Tsang 2000, shapes below 1 by one above (their section 6)."""
    below = shape_N < 1
    d_N = shape_N + below.double() - 1 / 3

    def attempt(left: Tensor, tries: Tensor) -> tuple[Tensor, Tensor]:
        d, keys, k = d_N[left], keys_N[left], _GAMMA + 3 * tries
        x = _normal(keys, k)
        v = (1 + x / (9 * d).sqrt()) ** 3
        log_u = torch.log(uniform_of(keys, k + 2))
        return d * v, (v > 0) & (log_u < x.square() / 2 + d * (1 - v + torch.log(v.clamp_min(1e-300))))

    out_N = _first_accepted(attempt, shape_N, n_tries)
    return torch.where(below, out_N * uniform_of(keys_N, _BOOST) ** (1 / shape_N), out_N)


def _first_accepted(
    attempt: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], like_N: Tensor, n_tries: int | None
) -> Tensor:
    """What the first accepted of each element's tries gives, (N,). NaN where none of n_tries is.

    attempt: from elements (M,) and numbers of tries (T, 1) to values and whether they are accepted, (T, M)
    """
    out_N, left = torch.empty_like(like_N), torch.arange(len(like_N), device=like_N.device)
    tries = torch.arange(n_tries or 1, device=like_N.device)[:, None]
    while len(left):
        value_TM, accepted_TM = attempt(left, tries)
        value_M, is_left_M = value_TM.gather(0, accepted_TM.int().argmax(0)[None])[0], ~accepted_TM.any(0)
        out_N.index_copy_(0, left, value_M.masked_fill_(is_left_M, math.nan))
        if n_tries is not None:
            return out_N
        left, tries = left[is_left_M.nonzero()[:, 0]], tries + 1
    return out_N


def _normal(keys: Tensor, k: int | Tensor) -> Tensor:
    """Standard normal, by Box-Muller from a key's draws k and k + 1."""
    radius = (-2 * torch.log(uniform_of(keys, k))).sqrt()
    return radius * torch.cos(2 * math.pi * uniform_of(keys, k + 1))
