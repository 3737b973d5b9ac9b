"""Likelihoods against scipy, at their extremes, and their samplers against them."""

from __future__ import annotations

import itertools
from typing import get_args

import numpy as np
import pytest
import torch
from scipy import stats

from scldm.batch import GeneCounts
from scldm.likelihood import (
    LikelihoodKind,
    gaussian_log_prob,
    nb_log_prob,
    normalised,
    poisson_log_prob,
    zinb_log_prob,
)
from scldm.model.vae import VAE, VAEConfig

GRID = np.array(list(itertools.product([0, 1, 7, 300], [1e-2, 0.7, 40.0], [0.05, 1.0, 30.0, 5e3])))
COUNTS, MU, THETA = (torch.tensor(column)[None] for column in GRID.T)
# of a count of 0 and one of a million, every pairing of means and dispersions
EXTREMES = torch.tensor(list(itertools.product([0.0, 1e6], [1e-8, 1.0, 1e8], [1e-8, 1.0, 1e3, 1e8])))


def test_negative_binomial_is_scipys():
    found = nb_log_prob(COUNTS, MU, THETA)
    true = stats.nbinom.logpmf(GRID[:, 0], GRID[:, 2], GRID[:, 2] / (GRID[:, 2] + GRID[:, 1]))
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found[0].numpy(), true, rtol=1e-9, atol=1e-9)


def test_negative_binomial_of_huge_theta_is_poisson():
    found = nb_log_prob(COUNTS.float(), MU.float(), torch.full_like(THETA, 1e8).float())
    np.testing.assert_allclose(found[0].numpy(), stats.poisson.logpmf(GRID[:, 0], GRID[:, 1]), rtol=3e-5, atol=3e-5)


def test_poisson_and_gaussian_are_scipys():
    np.testing.assert_allclose(poisson_log_prob(COUNTS, MU)[0], stats.poisson.logpmf(GRID[:, 0], GRID[:, 1]), rtol=1e-9)
    found = gaussian_log_prob(COUNTS, MU, THETA.log())[0]
    np.testing.assert_allclose(found, stats.norm.logpdf(GRID[:, 0], GRID[:, 1], GRID[:, 2]), rtol=1e-9)


def test_zero_inflated_sums_to_one_and_inflates():
    counts = torch.arange(4_000.0, dtype=torch.float64)[None]
    dropout, theta = torch.tensor(0.5, dtype=torch.float64), torch.tensor(0.8, dtype=torch.float64)
    mu = torch.full_like(counts, 12.0)
    p = zinb_log_prob(counts, mu, theta, dropout.expand_as(counts)).exp()[0]
    nb = nb_log_prob(counts, mu, theta).exp()[0]
    share = torch.sigmoid(dropout)
    torch.testing.assert_close(p.sum(), torch.ones((), dtype=torch.float64))
    torch.testing.assert_close(p[0], share + (1 - share) * nb[0])
    torch.testing.assert_close(p[5], (1 - share) * nb[5])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extremes_are_finite_with_their_gradients(dtype):
    counts, *given = EXTREMES.T[:, None]
    mu, theta = (x.to(dtype).requires_grad_() for x in given)
    dropout = torch.tensor([-80.0, 0.0, 80.0], dtype=dtype).repeat(8)[None].requires_grad_()
    log_std = theta.log()
    for name, log_p in {
        "nb": nb_log_prob(counts, mu, theta),
        "zinb": zinb_log_prob(counts, mu, theta, dropout),
        "poisson": poisson_log_prob(counts, mu),
        "gaussian": gaussian_log_prob(normalised(counts, counts.amax(1)), mu, log_std.clamp(-18, 18)),
    }.items():
        assert log_p.dtype == torch.float32, "whatever the precision around it"
        assert torch.isfinite(log_p).all(), name
        if name != "gaussian":
            assert (log_p < 1e-2).all(), f"{name}: no probability is above 1"
        for gradient in torch.autograd.grad(log_p.sum(), (mu, theta, dropout), allow_unused=True, retain_graph=True):
            assert gradient is None or torch.isfinite(gradient).all(), name


def test_the_gradient_at_a_million_counts_has_digits():
    """d log p / d log mu = theta (k - mu) / (theta + mu): a difference of two numbers of size k, taken in float32."""
    log_mu = torch.tensor([[13.8, 13.81, 13.9]], requires_grad=True)
    nb_log_prob(torch.full((1, 3), 1e6), log_mu.exp(), torch.tensor(2.0)).sum().backward()
    mu = log_mu.detach().double().exp()
    assert log_mu.grad is not None
    torch.testing.assert_close(log_mu.grad.double(), 2.0 * (1e6 - mu) / (2.0 + mu), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("likelihood", get_args(LikelihoodKind))
def test_a_set_without_a_count_teaches_nothing(likelihood):
    """A random set of a sparse cell's genes may hold none of its counts: what is not known of it must not be fitted."""
    torch.manual_seed(0)
    vae = VAE(VAEConfig(width=16, n_latents=2, latent_width=4, n_layers=1, n_heads=2, likelihood=likelihood), 30)
    asked = GeneCounts(torch.arange(1, 11), torch.zeros(1, 10, dtype=torch.int32))
    latent = torch.randn(1, 2, 4, requires_grad=True)
    nll = vae.decode(latent, asked.gene_ids).nll_B(asked, torch.zeros(1)).sum()
    nll.backward()
    assert latent.grad is not None
    assert float(nll.detach()) == pytest.approx(0, abs=1e-6)
    assert float(latent.grad.abs().max()) < 1e-6
