"""The token of a gene and its count."""

from __future__ import annotations

import pytest
import torch

from scldm.batch import GeneCounts
from scldm.count_basis import N_BINS, basis, position
from scldm.model.token import GeneToken
from scldm.model.vae import VAE, VAEConfig
from tests.rounding import APART

COUNTS = torch.tensor([0, 1, 2, 3, 4, 7, 100, 65_535, 1_000_000])


def test_a_count_lies_between_two_bins_that_share_it() -> None:
    phi = basis(position(COUNTS.double(), "bins"), "bins")
    assert phi.shape == (len(COUNTS), N_BINS)
    assert (phi[0] == 0).all(), "a count of 0 adds nothing"
    torch.testing.assert_close(phi[1:].sum(1), torch.ones(len(COUNTS) - 1).double())
    assert ((phi > 0).sum(1) <= 2).all()
    for count, k in ((1, 0), (3, 1), (7, 2), (65_535, N_BINS - 1), (1_000_000, N_BINS - 1)):
        assert phi[COUNTS == count, k] == 1, count
    two = phi[COUNTS == 2][0]
    assert (two[:2] > 0.4).all(), "2 lies between 1 and 3"


def test_linear_is_equation_9() -> None:
    """Linear([repeat_D(log1p(count)), E_g]), whose first D columns enter by their sum alone."""
    torch.manual_seed(0)
    D, token = 8, GeneToken(8, "linear")
    torch.nn.init.normal_(token.count)
    projection = torch.nn.Linear(2 * D, D)
    with torch.no_grad():
        columns = torch.randn(D, D)
        columns[:, 0] += token.count[0] - columns.sum(1)
        projection.weight.copy_(torch.cat((columns, token.gene.weight), dim=1))
        projection.bias.copy_(token.gene.bias)
    embedded, counts = torch.randn(5, D), torch.randint(0, 50, (3, 5))
    both = torch.cat((torch.log1p(counts)[..., None].expand(-1, -1, D), embedded.expand(3, -1, -1)), dim=-1)
    torch.testing.assert_close(token(embedded, counts), projection(both), atol=APART * 1e-6, rtol=1e-5)


@pytest.mark.parametrize("likelihood", ["nb", "zinb", "poisson"])
def test_a_decoder_starts_at_the_mean_cell(likelihood) -> None:
    """Before it has learnt anything it says the genes' means, whatever the cell, of any set of genes."""
    torch.manual_seed(0)
    n_genes, mean_G = 300, torch.rand(300) ** 6 + 1e-4
    vae = VAE(VAEConfig(width=16, n_latents=2, latent_width=4, n_layers=1, n_heads=2, likelihood=likelihood), n_genes)
    every, latent_BLZ = torch.arange(1, n_genes + 1), torch.randn(4, 2, 4)
    share_G = mean_G / mean_G.sum()

    def divergence(ids: torch.Tensor) -> torch.Tensor:
        own = share_G[ids - 1] / share_G[ids - 1].sum()
        return (own * (own.log() - vae.decode(latent_BLZ, ids).value_BQ)).sum(1)

    before = divergence(every).mean()
    vae.start_at(mean_G)
    assert divergence(every).mean() < 0.1 * before
    assert divergence(torch.arange(1, n_genes + 1, 7)).mean() < 0.1 * before


def test_without_the_direct_ways_the_network_learns_from_the_first_step() -> None:
    torch.manual_seed(0)
    vae = VAE(VAEConfig(width=16, n_latents=2, latent_width=4, n_layers=1, n_heads=2, direct=False), 12)
    given = GeneCounts(torch.arange(1, 13), torch.randint(0, 9, (5, 12)))
    _, predicted = vae(given, given.gene_ids)
    predicted.nll_B(given, given.counts_BS.sum(1).float()).sum().backward()
    assert not [name for name, p in vae.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]


def test_the_direct_ways_are_a_mean_and_an_inner_product() -> None:
    """By their definition, gene by gene; the same where cells share a set and where each has its own, in any order."""
    torch.manual_seed(0)
    vae = VAE(VAEConfig(width=8, n_latents=2, latent_width=4, n_layers=1, n_heads=2), 30).double()
    ids, counts = torch.randperm(30)[:12] + 1, torch.randint(0, 9, (3, 12))
    ids[-2:], counts[:, -2:], counts[1] = 0, 0, 0  # padding, and a cell of zeros
    table, weight = vae.gene_embedding.weight, torch.log1p(counts.double())
    for cell in range(3):
        total = sum((weight[cell, k] * table[ids[k]] for k in range(12)), torch.zeros(8).double())
        mean = total / weight[cell].sum() if weight[cell].sum() > 0 else total
        expected = vae.genes_in(vae.norm_genes(mean))
        torch.testing.assert_close(vae.direct_in(GeneCounts(ids, counts))[cell], expected)
    order = torch.stack([torch.randperm(12) for _ in range(3)])
    apart = GeneCounts(ids[order], counts.gather(1, order))
    torch.testing.assert_close(vae.direct_in(apart), vae.direct_in(GeneCounts(ids, counts)))
    cell_BD = torch.randn(3, 8).double()
    shared = vae.direct_out(cell_BD, ids, vae.gene_embedding(ids))
    torch.testing.assert_close(shared[2, 4], cell_BD[2] @ table[ids[4]])
    for many in (1, 4):  # fewer genes than the vocabulary has, and more
        own = ids[order].repeat(1, many)
        for embedded in (None, vae.gene_embedding(own)):  # of the whole vocabulary, or of these genes
            found = vae.direct_out(cell_BD, own, embedded)
            torch.testing.assert_close(found, shared.gather(1, order).repeat(1, many))


def test_a_gaussian_decoder_has_no_shares_to_start_from() -> None:
    vae = VAE(VAEConfig(width=16, n_latents=2, latent_width=4, n_layers=1, n_heads=2, likelihood="gaussian"), 10)
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    vae.start_at(torch.ones(10))
    assert all(torch.equal(before[name], value) for name, value in vae.state_dict().items())
